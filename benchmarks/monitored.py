"""What a Monitor adds to a training step: the two timed in turn within one loop, by the CPU time of the thread, which what else runs on the machine hardly shows in."""

import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, thread_time

import torch

import mmfast as mf
from benchmarks.attached import HEADS, Step
from benchmarks.timing import Timing, summary
from mmfast.plots.log import read

EVERY = 10


@dataclass
class Case:
    """A training step with a block."""

    k: int
    n: int  # elements of a gradient
    step: Callable[[], object]
    block: torch.nn.Module


def built(width: int, batch: int) -> Case:
    """An encoder of two layers and four heads in an ImpartialityBlock, SGD."""
    step = Step(width, batch, "built")
    assert step.block is not None
    return Case(HEADS, width * batch, step, step.block)


def linear(k: int, width: int, batch: int) -> Case:
    """The same with LinearHeads, whose backward pass is cheapest."""
    step = Step(width, batch, "none")
    step.block = mf.LinearHeads(width, [10] * k, mf.UPGrad())  # type: ignore[assignment]
    step.optimizer.param_groups[0]["lr"] = 1e-6  # the sum of so many losses is steep
    return Case(k, width * batch, step, step.block)  # type: ignore[arg-type]


CASES: list[Callable[[], Case]] = [
    lambda: built(512, 256),
    lambda: built(64, 256),
    lambda: built(16, 32),
    lambda: linear(50, 512, 256),
    lambda: linear(50, 64, 128),
]


def times(case: Case, seconds: float) -> tuple[dict[str, Timing], float, bool]:
    """(the step's time and the monitor's, of which the median is the mean: one call in many has the work; error of the last row; whether it is right)."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.csv"
        monitor = mf.Monitor(case.block, to=path, every=EVERY)
        steps, ours = [], []
        for _ in range(EVERY):  # with a first fetch
            case.step()
            monitor.step()
        end, last = perf_counter() + seconds, []
        while perf_counter() < end or len(steps) % EVERY:
            begin = thread_time()
            case.step()
            middle = thread_time()
            monitor.step()
            ours.append(thread_time() - middle)
            steps.append(middle - begin)
            last = [*last[1 - EVERY :], case.block._info]
        begin = thread_time()
        monitor.remove()
        ours[-1] += thread_time() - begin
        row = torch.tensor(read(path).blocks[0].weights[-1], dtype=torch.float64)
        weights = torch.stack([info[: case.k] for info in last]).mean(0)  # type: ignore[index, union-attr]
        error = float(((row - weights) / weights.abs().max()).abs().max())
    spread = summary(ours)
    timings = {"none": summary(steps), "monitor": Timing(statistics.fmean(ours) * 1e6, spread.p20, spread.p80, len(ours))}
    return timings, error, error < 1e-5
