"""What the runs of Tables 5 and 9 came to, beside the numbers of the paper: differences with their intervals, and which of them are none."""

import itertools
import math
import random
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from mmfast.experiments.multimodal.grid import score
from mmfast.experiments.multimodal.metrics import SUBSETS
from mmfast.experiments.multimodal.results import Result, Scores
from mmfast.experiments.multimodal.settings import MODELS, OBJECTIVES
from mmfast.experiments.prose import row
from mmfast.experiments.published import TABLE5, TABLE9
from mmfast.experiments.settings import NONE

LEVEL = 0.9  # of the intervals
RESAMPLES = 5000  # of the bootstrap, where not all of them are taken
# In the paper's table two columns of MVAE are one estimator; they are up to 0.8 points apart without blocks, 3.5 with them. What is below is no effect.
MARGIN_PLAIN, MARGIN = 1.0, 3.5

Measure = Callable[[Scores], float]
LATENT: dict[str, Measure] = {"self": lambda s: s.self_accuracy, "cross": lambda s: s.cross_accuracy}  # of Table 5
RECONSTRUCTION: dict[str, Measure] = {d: lambda s, d=d: s.coherence[d]["MST"] for d in "MST"}  # type: ignore[misc] # of Table 9


@dataclass(frozen=True)
class Difference:
    """Of a measure in points of per cent, b minus a, over the seeds that both have."""

    a: float  # means
    b: float
    low: float  # of the interval of their difference; NaN for one seed
    high: float
    margin: float  # below which it is none

    @property
    def points(self) -> float:
        return self.b - self.a

    @property
    def verdict(self) -> str:
        """better or worse; none where it is within the margin or the interval holds zero; one seed, which has no interval, says nothing."""
        if math.isnan(self.low):
            return "one seed"
        if abs(self.points) < self.margin or not (self.low > 0 or self.high < 0):
            return "none"
        return "better" if self.points > 0 else "worse"

    def __str__(self) -> str:
        span = "" if math.isnan(self.low) else f" [{self.low:+.1f}, {self.high:+.1f}]"
        return f"{self.points:+.1f}{span}"


@dataclass(frozen=True)
class Cell:
    """One model with one objective: its runs by rule and blocks, on the seeds that the run without blocks shares with them."""

    model: str
    objective: str
    data: str
    size: str
    epochs: int
    variants: dict[tuple[str, str], dict[int, Result]]  # (rule, blocks) -> seed -> run
    chosen: tuple[str, str] | None  # on validation; None where only runs without blocks are there

    @property
    def part(self) -> tuple[str, str, int]:
        """What cells of one table have in common."""
        return self.data, self.size, self.epochs

    @property
    def plain(self) -> dict[int, Result]:
        return self.variants[NONE, ""]

    def difference(self, measure: Measure, variant: tuple[str, str]) -> Difference | None:
        """Of a variant from no blocks."""
        return difference(self.plain, self.variants[variant], measure, MARGIN)


def difference(a: dict[int, Result], b: dict[int, Result], measure: Measure, margin: float) -> Difference | None:
    """Of two columns of runs; None where they have no seed in common, or a run has no scores."""
    seeds = sorted(a.keys() & b.keys())
    pairs = [(a[s].test, b[s].test) for s in seeds]
    values = [(100 * measure(x), 100 * measure(y)) for x, y in pairs if x is not None and y is not None]
    if not values or len(values) < len(pairs):
        return None
    low, high = interval([y - x for x, y in values])
    return Difference(statistics.mean(x for x, _ in values), statistics.mean(y for _, y in values), low, high, margin)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Bootstrap interval of the mean at 90 %, by percentiles; NaN for one value.

    All resamples of up to five values are taken, of more 5000 that are drawn with a fixed seed: the same values give the same interval.
    """
    n = len(values)
    if n < 2:
        return float("nan"), float("nan")
    generator = random.Random(0)
    drawn = ([generator.randrange(n) for _ in range(n)] for _ in range(RESAMPLES))
    resamples: Iterable[Sequence[int]] = itertools.product(range(n), repeat=n) if n <= 5 else drawn
    means = sorted(statistics.mean(values[i] for i in resample) for resample in resamples)
    outside = int((1 - LEVEL) / 2 * len(means))
    return means[outside], means[-1 - outside]


def cells(found: Sequence[Result]) -> list[Cell]:
    """All cells that have a run without blocks, in the order of the paper's tables."""
    groups: dict[tuple[str, str, str, str, int], dict[tuple[str, str], dict[int, Result]]] = {}
    for result in found:
        run = result.settings
        key = (run.model, run.objective, run.data, run.size, run.epochs)
        groups.setdefault(key, {}).setdefault((run.rule, run.blocks), {})[run.seed] = result
    order = sorted(groups, key=lambda key: (*key[2:], list(MODELS).index(key[0]), OBJECTIVES.index(key[1])))
    return [Cell(*key, groups[key], _chosen(groups[key])) for key in order if (NONE, "") in groups[key]]


def _chosen(variants: dict[tuple[str, str], dict[int, Result]]) -> tuple[str, str] | None:
    """The best on validation among those that have as many seeds in common with the run without blocks as any, or one fewer: a grid that was stopped lacks the
    last seed of its last runs. Only seeds that all of them have count."""
    plain = variants[NONE, ""].keys()
    shared = {variant: plain & runs.keys() for variant, runs in variants.items() if variant != (NONE, "")}
    most = max(map(len, shared.values()), default=0)
    candidates = [variant for variant, seeds in shared.items() if len(seeds) >= max(1, most - 1)]
    seeds = set.intersection(*(set(shared[variant]) for variant in candidates)) if candidates else set()
    if not seeds:
        return None
    return max(candidates, key=lambda variant: score(variants[variant][s] for s in seeds))


def table5(table: Sequence[Cell]) -> str:
    """Table 5, latent accuracy, as markdown: each cell, the objectives against each other, every rule, and what the numbers rest on."""
    parts = [_against_plain(table, LATENT, TABLE5), _between_objectives(table, LATENT), _variants(table, LATENT), _conflict(table)]
    return _joined([_heading(table, "Table 5: latent accuracy in %"), *parts])


def table9(table: Sequence[Cell]) -> str:
    """Table 9, reconstruction coherence given all modalities, as markdown; then given each modality alone and given the others, joint coherence, log-likelihood."""
    parts = [_against_plain(table, RECONSTRUCTION, TABLE9), _between_objectives(table, RECONSTRUCTION), _coherence(table), _judges(table)]
    return _joined([_heading(table, "Table 9: reconstruction coherence given M, S and T, in %"), *parts])


def _joined(parts: Iterable[Sequence[str]]) -> str:
    return "\n\n".join("\n".join(lines) for lines in parts if lines)


def _heading(table: Sequence[Cell], title: str) -> list[str]:
    first = next(iter(table[0].plain.values()))
    size = first.size
    triplets = f"{10 * size['most'] * size['repeats']:,} training and validation and {10 * size['test_most'] * size['test_repeats']:,} test triplets at most"
    warm_up = f" after {size['warm_up']} steps of warm-up" if size["warm_up"] else ""
    stand_in = " SVHN\\* is a stand-in made from MNIST: compare differences with the paper, not values." if "*" in table[0].data else ""
    name, escaped = table[0].data, r"\*"
    return [
        f"**{title}.** {name.replace('*', escaped)}, size {table[0].size}: {triplets}, {table[0].epochs} epochs, batches of {size['batch']}, "
        + f"learning rate {size['learning_rate']:g}{warm_up}, "
        + f"{size['samples']} samples of each component, width {size['width']:g}, latent classifiers fitted on {size['latents']:,} latents of each subset at most."
        + stand_in,
        "",
        "Rule and blocks are those with the best self plus cross latent accuracy on validation triplets. Differences are means over seeds with "
        + f"{LEVEL:.0%} bootstrap intervals; one of less than {MARGIN:g} points, or whose interval holds zero, is none.",
    ]


def _against_plain(
    table: Sequence[Cell], measures: dict[str, Measure], paper: dict[tuple[str, str, str], tuple[float, float]]
) -> list[str]:
    lines = [
        row(
            "model",
            "loss",
            "seeds",
            "rule",
            "blocks",
            "",
            "paper: plain",
            "paper: impartial",
            "ours: plain",
            "ours: impartial",
            "difference",
            "",
        ),
        "|---|---|--:|---|---|---|--:|--:|--:|--:|--:|---|",
    ]
    for cell in table:
        for name, measure in measures.items():
            published = [f"{x:.1f}" for x in paper[cell.model, cell.objective, name]]
            start = [MODELS[cell.model], cell.objective.upper()]
            if cell.chosen is None:
                lines.append(row(*start, len(cell.plain), "", "", name, *published, _percent(_mean(cell.plain, measure)), "", "", ""))
                continue
            d = cell.difference(measure, cell.chosen)
            seeds = len(cell.plain.keys() & cell.variants[cell.chosen].keys())
            ours = ["", "", "diverged", ""] if d is None else [f"{d.a:.1f}", f"{d.b:.1f}", str(d), d.verdict]
            lines.append(row(*start, seeds, *cell.chosen, name, *published, *ours))
    return lines


def _between_objectives(table: Sequence[Cell], measures: dict[str, Measure]) -> list[str]:
    """IWAE and SIWAE against ELBO, and against each other: without blocks, and with each one's own."""
    rows = []
    by_name = {(cell.model, cell.objective): cell for cell in table}
    for (model, objective), cell in by_name.items():
        for other in OBJECTIVES[OBJECTIVES.index(objective) + 1 :]:
            second = by_name.get((model, other))
            if second is None:
                continue
            one = (model, objective, other) == ("mvae", "iwae", "siwae")
            for name, measure in measures.items():
                columns = [(cell.plain, second.plain, MARGIN_PLAIN)]
                if cell.chosen and second.chosen:
                    columns.append((cell.variants[cell.chosen], second.variants[second.chosen], MARGIN))
                shown: list[object] = []
                for a, b, margin in columns:
                    d = difference(a, b, measure, margin)
                    if d is None:
                        shown += ["", "diverged" if a.keys() & b.keys() else "no seed in common"]
                    else:
                        shown += [d, "none, one estimator" if one else d.verdict]
                rows.append(row(MODELS[model], f"{objective.upper()} to {other.upper()}", name, *shown))
    lines = [
        f"Between the losses, without blocks (less than {MARGIN_PLAIN:g} point is none) and with those of the table (less than {MARGIN:g} points). "
        + "MVAE's IWAE and SIWAE are one estimator with other random numbers: their difference is noise whatever it is.",
        "",
        row("model", "losses", "", "plain", "", "impartial", ""),
        "|---|---|---|--:|---|--:|---|",
    ]
    return [*lines, *rows] if rows else []


def _variants(table: Sequence[Cell], measures: dict[str, Measure]) -> list[str]:
    """Every rule and its blocks, test means over the seeds that it has."""
    known = sorted({v for cell in table for v in cell.variants}, key=lambda v: (v[0] != NONE, len(v[1]), v))
    names = [" on ".join(filter(None, variant)) for variant in known]
    lines = [
        f"Every rule, {' / '.join(measures)}, means over the seeds that each has:",
        "",
        row("model", "loss", *names),
        f"|---|---|{'--:|' * len(known)}",
    ]
    for cell in table:
        values = [
            " / ".join(_percent(_mean(cell.variants[v], measure)) for measure in measures.values()) if v in cell.variants else ""
            for v in known
        ]
        lines.append(row(MODELS[cell.model], cell.objective.upper(), *values))
    return lines


def _conflict(table: Sequence[Cell]) -> list[str]:
    """What the decoders' gradients at z did, and what a step took."""
    lines = [
        (
            "Conflict at z, mean over a training's looks and the seeds: pairs of decoders whose gradients have a negative cosine, and the largest norm over the smallest "
            "(median); and the processor time of a step."
        ),
        "",
        row("model", "loss", "pairs: plain", "pairs: impartial", "norms: plain", "norms: impartial", "step, plain", "step, impartial"),
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for cell in table:
        columns = [list(cell.plain.values()), list(cell.variants[cell.chosen].values()) if cell.chosen else []]
        looks = [[look for r in runs for look in r.conflict] for runs in columns]
        pairs = [f"{statistics.mean(x[1] for x in of):.0%}" if of else "" for of in looks]
        norms = [f"{statistics.median(x[2] for x in of):.0f}" if of else "" for of in looks]
        steps = [f"{statistics.median(r.step_us for r in runs) / 1e3:.1f} ms" if runs else "" for runs in columns]
        lines.append(row(MODELS[cell.model], cell.objective.upper(), *pairs, *norms, *steps))
    return lines


def _coherence(table: Sequence[Cell]) -> list[str]:
    """Given the modality alone, given others alone, joint coherence and log-likelihood; without blocks and with those of the table."""
    measures: dict[str, Measure] = {}
    for d in "MST":
        measures[f"{d} from {d}"] = lambda s, d=d: s.coherence[d][d]  # type: ignore[misc]
        measures[f"{d} from others"] = lambda s, d=d: statistics.mean(s.coherence[d][a] for a in SUBSETS if d not in a)  # type: ignore[misc]
    measures["joint"] = lambda s: s.joint_coherence  # type: ignore[assignment, return-value]
    size = next(iter(table[0].plain.values())).size
    lines = [
        (
            "Coherence in %, means over seeds: a modality generated from itself, from the others (mean over their subsets), and all three from one z of the prior; "
            f"log p(x) in nats, of {size['likelihood_rows']:,} triplets at most without the local step's factors, by importance sampling with {size['likelihood_samples']:,} draws."
        ),
        "",
        row("model", "loss", "", *measures, "log p(x)"),
        f"|---|---|---|{'--:|' * (len(measures) + 1)}",
    ]
    for cell in table:
        for name, runs in (("plain", cell.plain), ("impartial", cell.variants[cell.chosen] if cell.chosen else {})):
            if runs:
                values = [_percent(_mean(runs, measure)) for measure in measures.values()]
                likelihood = _mean(runs, lambda s: math.nan if s.log_likelihood is None else s.log_likelihood)
                shown = "diverged" if likelihood is None else "not finite" if math.isnan(likelihood) else f"{likelihood:.1f}"
                lines.append(row(MODELS[cell.model], cell.objective.upper(), name, *values, shown))
    return lines


def _judges(table: Sequence[Cell]) -> list[str]:
    accuracy = next(iter(table[0].plain.values())).judges
    said = ", ".join(f"{value:.1%} on {name.upper() if name != 'text' else 'text'}" for name, value in accuracy.items())
    return [f"The classifiers that judge what is generated are right on the test triplets themselves in {said}."]


def _mean(runs: dict[int, Result], measure: Measure) -> float | None:
    """Over the seeds; None where a run diverged."""
    found = [r.test for r in runs.values() if r.test is not None]
    return statistics.mean(map(measure, found)) if len(found) == len(runs) else None


def _percent(value: float | None) -> str:
    return "diverged" if value is None else f"{100 * value:.1f}"
