"""What a grid of runs came to, beside the numbers of the paper."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from scipy import stats

from mmfast.experiments.published import DATA_SETS, TABLE1
from mmfast.experiments.results import Result
from mmfast.experiments.settings import MODELS, NONE, Settings

TEST_OVER_TRAIN = 2 / 7  # rows of the two parts
ALPHA = 0.1


@dataclass(frozen=True)
class Cell:
    """One model on one data set: the paper's two numbers and ours, all of ours over the same seeds."""

    run: Settings  # rule and seed left open
    seeds: int
    paper_plain: float | None
    paper_ours: float | None
    plain: float  # median test error without a block; infinite where most runs diverged
    ours: float  # the same with the chosen rule
    rule: str  # chosen by the median validation error
    gain: float  # mean over seeds of what the block takes off the test error
    p: float | None  # of there being no gain, by the corrected paired t-test; None for fewer than two seeds
    plain_us: float  # a training step without a block, median
    step_ratio: float  # of a step with the chosen rule to one without, timed in turn; median
    by_rule: dict[str, float]  # median test error of every rule that ran on these seeds

    @property
    def verdict(self) -> str:
        """better, worse, or nothing where the test sees no difference."""
        if self.p is None or not self.p < ALPHA:
            return ""
        return "better" if self.gain > 0 else "worse"


def corrected_t_test(a: Sequence[float], b: Sequence[float], test_over_train: float = TEST_OVER_TRAIN) -> float | None:
    """p-value of paired results over random splits having the same mean (Nadeau and Bengio, 2003); None for fewer than two pairs.

    The splits share training rows, so the variance of the mean difference is not 1/J of that of a difference but 1/J + n_test / n_train of it.
    """
    differences = [x - y for x, y in zip(a, b, strict=True)]
    if len(differences) < 2:
        return None
    mean, variance = statistics.mean(differences), statistics.variance(differences)
    if variance == 0:
        return 1.0 if mean == 0 else 0.0
    t = mean / math.sqrt((1 / len(differences) + test_over_train) * variance)
    return float(2 * stats.t.sf(abs(t), len(differences) - 1))


def cells(found: Sequence[Result]) -> list[Cell]:
    """All cells that have a run without a block and one with, in the order of the paper's table."""
    groups: dict[Settings, dict[str, dict[int, Result]]] = {}
    for result in found:
        run = result.settings
        groups.setdefault(replace(run, rule="", seed=0), {}).setdefault(run.rule, {})[run.seed] = result
    order = sorted(groups, key=lambda run: (list(MODELS).index(run.model), DATA_SETS.index(run.data), run.epochs, run.batch, run.samples))
    made = [_cell(run, groups[run]) for run in order]
    return [cell for cell in made if cell is not None]


def _cell(run: Settings, by_rule: dict[str, dict[int, Result]]) -> Cell | None:
    """The rule is chosen by its median validation error among those that ran on as many seeds as any, or on one fewer: a grid that was stopped lacks
    the last seed of its last rules. Only seeds that all of them and the run without a block share count.
    """
    plain = by_rule.get(NONE, {})
    counts = {rule: len(runs.keys() & plain.keys()) for rule, runs in by_rule.items() if rule != NONE}
    most = max(counts.values(), default=0)
    candidates = [rule for rule, count in counts.items() if count >= max(1, most - 1)]
    seeds = sorted(plain.keys() & set.intersection(*(set(by_rule[rule]) for rule in candidates))) if candidates else []
    if not seeds:
        return None
    whole = {rule: [runs[s] for s in seeds] for rule, runs in by_rule.items() if runs.keys() >= set(seeds)}
    rule = min(candidates, key=lambda rule: _median(r.validation_error for r in whole[rule]))
    before, after = ([_finite(r.test_error) for r in whole[name]] for name in (NONE, rule))
    finite = all(map(math.isfinite, before + after))
    paper = TABLE1.get((run.model, run.data), (None, None))
    return Cell(
        run,
        len(seeds),
        paper[0],
        paper[1],
        statistics.median(before),
        statistics.median(after),
        rule,
        statistics.mean(before) - statistics.mean(after) if finite else math.nan,
        corrected_t_test(after, before) if finite else None,
        statistics.median(r.plain_step_us for r in whole[rule]),
        statistics.median(r.step_us / r.plain_step_us for r in whole[rule]),
        {name: _median(r.test_error for r in runs) for name, runs in whole.items()},
    )


def _finite(error: float | None) -> float:
    """A run without an error diverged: worse than any."""
    return math.inf if error is None else error


def _median(errors: Iterable[float | None]) -> float:
    return statistics.median(map(_finite, errors))


def markdown(table: Sequence[Cell]) -> str:
    """The table, a line per cell, and every rule's error below it."""
    lines = [
        "| model | data | epochs, batch, S | seeds | paper: plain | paper: impartial | ours: plain | ours: impartial | rule | p | | step, plain | step, impartial |",
        "|---|---|--:|--:|--:|--:|--:|--:|---|--:|---|--:|--:|",
    ]
    for c in table:
        sizes = f"{c.run.epochs}, {c.run.batch}, {c.run.samples}"
        values = [
            MODELS[c.run.model],
            c.run.data,
            sizes,
            str(c.seeds),
            *map(_error, (c.paper_plain, c.paper_ours, c.plain, c.ours)),
            c.rule,
        ]
        values += [_p(c.p), c.verdict, f"{c.plain_us / 1e3:.2f} ms", f"{c.step_ratio:.2f}x"]
        lines.append(f"| {' | '.join(values)} |")
    rules = sorted({rule for c in table for rule in c.by_rule}, key=lambda rule: (rule != NONE, rule))
    lines += ["", f"| model | data | {' | '.join(rules)} |", f"|---|---|{'--:|' * len(rules)}"]
    lines += [f"| {MODELS[c.run.model]} | {c.run.data} | {' | '.join(_error(c.by_rule.get(rule)) for rule in rules)} |" for c in table]
    return "\n".join(lines)


def _p(p: float | None) -> str:
    """With two digits and without the zero before the point; what would round to .00 is said to be below .01."""
    return "" if p is None else "< .01" if p < 0.01 else f"{p:.2f}".removeprefix("0")


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}" if math.isfinite(value) else "diverged"
