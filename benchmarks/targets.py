"""How fast it must be: the design's targets, one line each, and where a run stands."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.rows import Row


@dataclass(frozen=True)
class Target:
    """One promise; `measure` finds its value in a run's rows, or None, and says where the worst case is."""

    name: str
    section: str
    must: float
    aim: float
    unit: str
    measure: Callable[[list[Any]], tuple[float, str] | None]
    lower_is_better: bool = False

    def verdict(self, value: float) -> str:
        def reached(goal: float) -> bool:
            return value <= goal if self.lower_is_better else value >= goal

        return "aim" if reached(self.aim) else "must" if reached(self.must) else "below"


def geometric_mean(values: list[float]) -> float:
    return math.exp(math.fsum(map(math.log, values)) / len(values))


def ratios(rows: list[Row]) -> list[Row]:
    """TorchJD's rows of the grid that count: the twelve rules, both sides timed."""
    return [r for r in rows if r.section == "grid" and r.provider == "torchjd" and r.ratio_to_ours and r.rule != "Mean"]


def _place(row: Row) -> str:
    return f"{row.rule} K={row.k} N={row.n}"


def _grid_mean(rows: list[Row]) -> tuple[float, str] | None:
    found = ratios(rows)
    return (geometric_mean([r.ratio_to_ours or 0 for r in found]), f"{len(found)} cases") if found else None


def _grid_worst(rows: list[Row]) -> tuple[float, str] | None:
    worst = min(ratios(rows), key=lambda r: r.ratio_to_ours or 0, default=None)
    return None if worst is None else (worst.ratio_to_ours or 0, _place(worst))


def _gram(few: bool) -> Callable[[list[Row]], tuple[float, str] | None]:
    def measure(rows: list[Row]) -> tuple[float, str] | None:
        found = [
            r
            for r in rows
            if r.section == "gram" and r.provider == "ours" and r.dtype == "float32" and r.percent_of_roofline and (r.k <= 4) == few
        ]
        worst = min(found, key=lambda r: r.percent_of_roofline or 0, default=None)
        return None if worst is None else (worst.percent_of_roofline or 0, f"K={worst.k} N={worst.n}")

    return measure


def _latency(rows: list[Row]) -> tuple[float, str] | None:
    found = [
        r for r in rows if r.section == "latency" and r.provider == "ours" and r.k == 3 and r.n == 4096 and r.rule != "Mean" and r.median_us
    ]
    worst = max(found, key=lambda r: r.median_us or 0, default=None)
    return None if worst is None else (worst.median_us or 0, f"slowest of {len(found)} rules: {worst.rule}")


def _heads(provider: str, times: Callable[[float], float]) -> Callable[[list[Row]], tuple[float, str] | None]:
    """The geometric mean of times(a provider's time / ours) over rules, K and S, and the cell whose value is furthest from it on the wrong side."""

    def measure(rows: list[Row]) -> tuple[float, str] | None:
        found = [r for r in rows if r.section == "heads" and r.provider == provider and r.ratio_to_ours and r.rule not in ("Mean", "Sum")]
        if not found:
            return None
        worst = min(found, key=lambda r: r.ratio_to_ours or 0)
        value = times(worst.ratio_to_ours or 1)
        return geometric_mean([times(r.ratio_to_ours or 1) for r in found]), f"worst {value:.2f}: {worst.rule} K={worst.k} S={worst.n}"

    return measure


def _parts(rows: list[Row]) -> tuple[float, str] | None:
    """Both take their outputs apart: the geometric mean over rules, K and S, and the worst cell."""
    times = {
        (r.provider, r.rule, r.k, r.n): r.median_us for r in rows if r.section == "heads" and r.median_us and r.rule not in ("Mean", "Sum")
    }
    found = {(rule, k, s): parts / times["split", rule, k, s] for (p, rule, k, s), parts in times.items() if p == "parts"}
    if not found:
        return None
    (rule, k, samples), value = max(found.items(), key=lambda cell: cell[1])
    return geometric_mean(list(found.values())), f"worst {value:.2f}: {rule} K={k} S={samples}"


def _parameters(rows: list[Row]) -> tuple[float, str] | None:
    """The rule that gains least against the faster of TorchJD's two ways."""
    found = [r for r in rows if r.section == "parameters" and r.provider != "ours" and r.ratio_to_ours and r.rule != "Mean"]
    worst = min(found, key=lambda r: r.ratio_to_ours or 0, default=None)
    return None if worst is None else (worst.ratio_to_ours or 0, f"{worst.rule}, {worst.provider}")


def _attach(rows: list[Row]) -> tuple[float, str] | None:
    """Of a step of a usual size, the widest."""
    found = [r for r in rows if r.section == "attach" and r.provider == "built" and r.ratio_to_ours]
    usual = max(found, key=lambda r: r.n, default=None)
    return None if usual is None else (1 / (usual.ratio_to_ours or 1), f"K={usual.k} N={usual.n}")


def _monitor(rows: list[Row]) -> tuple[float, str] | None:
    """Of steps of a usual size, the one of which it takes the largest share."""
    found = {(r.k, r.n, r.provider): r.median_us for r in rows if r.section == "monitor" and r.median_us and r.n > 100_000}
    shares = [
        (100 * time / step, f"K={k} N={n}") for (k, n, p), time in found.items() if p == "monitor" and (step := found.get((k, n, "none")))
    ]
    return max(shares, default=None)


def _likelihoods(rows: list[Row]) -> tuple[float, str] | None:
    """Of the three batches of one sample, the one whose likelihoods gain least: a backward pass without any is taken off both times."""
    found = {(r.rule, r.n, r.provider): r.median_us for r in rows if r.section == "likelihoods" and r.median_us and r.n <= 1000}
    gains = []
    for name, n in {(name, n) for name, n, _ in found}:
        ours, theirs, none = (found.get((name, n, provider)) for provider in ("ours", "torch", "none"))
        if ours and theirs and none:
            gains.append(((theirs - none) / (ours - none), f"{name}, {n} rows"))
    return min(gains, default=None)


def _together(objective: str, models: int) -> Callable[[list[Row]], tuple[float, str] | None]:
    """The time of one of several models that are trained together, by that of a single one."""

    def measure(rows: list[Row]) -> tuple[float, str] | None:
        found = [r for r in rows if r.section == "together" and r.provider == "single" and r.rule == objective and r.k == models]
        return (1 / (models * found[0].ratio_to_ours), "GradNorm, Wine") if found and found[0].ratio_to_ours else None

    return measure


def _agop(rows: list[Row]) -> tuple[float, str] | None:
    found = [r for r in rows if r.section == "collapse" and r.provider == "backward" and r.ratio_to_ours]
    worst = min(found, key=lambda r: r.ratio_to_ours or 0, default=None)
    return None if worst is None else (1 / (worst.ratio_to_ours or 1), f"{worst.rule}, {worst.k} outputs")


def _multimodal(of: Callable[[Row], float | None]) -> Callable[[list[Row]], tuple[float, str] | None]:
    """What a step takes with blocks, by what it takes without any; the mixture and the blocks where that is most."""

    def measure(rows: list[Row]) -> tuple[float, str] | None:
        found = {(r.rule, r.provider): of(r) for r in rows if r.section == "multimodal"}
        blocks = {"ours": "p", "pq": "pq", "pqs": "pqs"}
        steps = [
            (of_step, found.get((mixture, "none")), f"{mixture}, {blocks[p]}") for (mixture, p), of_step in found.items() if p in blocks
        ]
        return max(((ours / none, where) for ours, none, where in steps if ours and none), default=None)

    return measure


GRID_MEAN = Target("resolve against TorchJD, geometric mean", "grid", 10, 25, "x", _grid_mean)
GRID_WORST = Target("resolve against TorchJD, worst case", "grid", 1.3, 2, "x", _grid_worst)
GRAM_FEW = Target("gram, K <= 4, data in memory: share of the stream-read rate", "gram", 85, 95, "%", _gram(True))
GRAM_MANY = Target("gram, K = 50: share of peak multiply-adds", "gram", 50, 75, "%", _gram(False))
LATENCY = Target("resolve, K = 3, N = 4096, Python call included", "latency", 15, 8, "µs", _latency, lower_is_better=True)

HEADS_FUSED = Target(
    "tabular VAE step with LinearHeads / with one plain layer", "heads", 1.15, 1.05, "x", _heads("fused", lambda x: 1 / x), True
)
HEADS_PARTS = Target("tabular VAE step with LinearHeads' tuple / with one plain layer, split", "heads", 1.15, 1.05, "x", _parts, True)
HEADS_LOOP = Target(
    "tabular VAE step with LinearHeads / with a loop over heads", "heads", 0.6, 0.45, "x", _heads("loop", lambda x: 1 / x), True
)
HEADS_NAIVE = Target("tabular VAE step with the naive block / with LinearHeads", "heads", 10, 30, "x", _heads("naive", lambda x: x))
PARAMETERS = Target("resolve of a ResNet-18's 62 parameters, K = 4, against TorchJD's jac_to_grad", "parameters", 3, 5, "x", _parameters)

ATTACH = Target("training step with attach / with a block built in", "attach", 1.02, 1.01, "x", _attach, True)
MONITOR = Target("what a Monitor adds to a training step", "monitor", 1, 0.5, "%", _monitor, True)
LIKELIHOODS = Target("likelihoods and gradients of Wine, Credit and Adult against plain torch", "likelihoods", 6, 10, "x", _likelihoods)
AGOP = Target("gradient outer product of a layer / one backward pass", "collapse", 1.5, 1.0, "x", _agop, True)
TOGETHER = [
    Target(f"training step of {what}, per model / of one by itself", "together", must, aim, "x", _together(objective, models), True)
    for what, objective, models, must, aim in [
        ("5 VAEs", "elbo", 5, 0.4, 0.33),
        ("8 VAEs", "elbo", 8, 0.35, 0.25),
        ("5 VAEs with IWAE, S = 20", "iwae", 5, 0.6, 0.5),
    ]
]
MULTIMODAL = [
    Target(
        f'multimodal VAE step, 5 samples, batch of 64, with blocks "p", "pq" or "pqs" / without, {what}',
        "multimodal",
        1.1,
        aim,
        "x",
        _multimodal(of),
        True,
    )
    for what, aim, of in [("time", 1.03, lambda r: r.median_us), ("peak memory", 1.05, lambda r: r.peak_mb)]
]

TARGETS = [
    GRID_MEAN,
    GRID_WORST,
    GRAM_FEW,
    GRAM_MANY,
    LATENCY,
    HEADS_FUSED,
    HEADS_PARTS,
    HEADS_LOOP,
    HEADS_NAIVE,
    PARAMETERS,
    ATTACH,
    MONITOR,
    LIKELIHOODS,
    *TOGETHER,
    AGOP,
    *MULTIMODAL,
]
