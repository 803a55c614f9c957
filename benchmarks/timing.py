"""Side-by-side timing: medians of interleaved samples, so that a noisy neighbour slows every competitor alike."""

import gc
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

Call = Callable[[], object]

SAMPLE_SECONDS = 200e-6  # a sample repeats its call until it lasts about this long
ROUNDS = 100  # samples of one call at most
SLOW_SECONDS = 0.5  # a call slower than this is not repeated beyond its budget
MIN_ROUNDS = 3


@dataclass(frozen=True)
class Timing:
    """Microseconds per call over `runs` samples."""

    median: float
    p20: float
    p80: float
    runs: int


def _seconds(call: Call, repeats: int) -> float:
    start = perf_counter()
    for _ in range(repeats):
        call()
    return (perf_counter() - start) / repeats


def summary(samples: list[float]) -> Timing:
    """Of seconds of a call."""
    deciles = statistics.quantiles(samples * 2 if len(samples) == 1 else samples, n=10, method="inclusive")
    return Timing(statistics.median(samples) * 1e6, deciles[1] * 1e6, deciles[7] * 1e6, len(samples))


def side_by_side(calls: dict[str, Call], budget: float) -> dict[str, Timing]:
    """Times each call for about `budget` seconds, at most ROUNDS samples; next is always the call that has had the least of its share.

    So the samples of all, slow and fast, are spread over the same time.
    The first call of each warms up and is dropped, unless it took so long that it is the sample.
    """
    samples: dict[str, list[float]] = {}
    repeats: dict[str, int] = {}
    least: dict[str, int] = {}
    spent = dict.fromkeys(calls, 0.0)
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for name, call in calls.items():
            first = _seconds(call, 1)
            slow = first > SLOW_SECONDS
            samples[name], spent[name], least[name] = ([first], first, 1) if slow else ([], 0.0, MIN_ROUNDS)
            repeats[name] = 1 if slow else math.ceil(SAMPLE_SECONDS / _seconds(call, 1))

        def progress(name: str) -> float:
            taken = len(samples[name])
            return min(taken / least[name], max(spent[name] / budget, taken / ROUNDS))

        while progress(name := min(calls, key=progress)) < 1:
            took = _seconds(calls[name], repeats[name])
            samples[name].append(took)
            spent[name] += took * repeats[name]
    finally:
        if enabled:
            gc.enable()
    return {name: summary(taken) for name, taken in samples.items()}
