"""What a grid of runs came to, beside the numbers of the paper."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from scipy import stats

from mmfast.train.published import DATA_SETS, TABLE1
from mmfast.train.results import Result
from mmfast.train.settings import MODELS, NONE, Settings

TEST_OVER_TRAIN = 2 / 7  # rows of the two parts
ALPHA = 0.1


@dataclass(frozen=True)
class Cell:
    """One model on one data set: the paper's two numbers and ours."""

    model: str
    data: str
    epochs: int
    seeds: int  # that the run without a block and the chosen rule share
    paper_plain: float | None
    paper_ours: float | None
    plain: float  # median test error without a block
    ours: float  # the same with the chosen rule
    rule: str  # chosen by the median validation error
    p: float | None  # of the two being the same, by the corrected paired t-test; None for fewer than two seeds
    plain_us: float  # a training step without a block, median
    step_ratio: float  # of a step with the chosen rule to one without, timed in turn; median
    by_rule: dict[str, float]  # median test error of every rule

    @property
    def verdict(self) -> str:
        """better, worse, or nothing where the test sees no difference."""
        if self.p is None or not self.p < ALPHA:
            return ""
        return "better" if self.ours < self.plain else "worse"


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
    complete = {key: by_rule for key, by_rule in groups.items() if NONE in by_rule and len(by_rule) > 1}
    order = sorted(complete, key=lambda key: (list(MODELS).index(key.model), DATA_SETS.index(key.data), key.epochs, key.batch, key.samples))
    return [_cell(key, complete[key]) for key in order]


def _cell(key: Settings, by_rule: dict[str, dict[int, Result]]) -> Cell:
    """The rule is chosen among those that ran on the most seeds, by its median error on the validation rows."""
    plain = by_rule[NONE]
    impartial = {rule: runs for rule, runs in by_rule.items() if rule != NONE}
    most = max(map(len, impartial.values()))
    candidates = {
        rule: statistics.median(r.validation_error for r in runs.values()) for rule, runs in impartial.items() if len(runs) == most
    }
    rule = min(candidates, key=lambda rule: math.inf if math.isnan(candidates[rule]) else candidates[rule])
    ours = by_rule[rule]
    shared = sorted(plain.keys() & ours.keys())
    paper = TABLE1.get((key.model, key.data), (None, None))
    return Cell(
        key.model,
        key.data,
        key.epochs,
        len(shared),
        paper[0],
        paper[1],
        statistics.median(r.test_error for r in plain.values()),
        statistics.median(r.test_error for r in ours.values()),
        rule,
        corrected_t_test([ours[s].test_error for s in shared], [plain[s].test_error for s in shared]),
        statistics.median(r.plain_step_us for r in ours.values()),
        statistics.median(r.step_us / r.plain_step_us for r in ours.values()),
        {rule: statistics.median(r.test_error for r in runs.values()) for rule, runs in by_rule.items()},
    )


def markdown(table: Sequence[Cell]) -> str:
    """The table, a line per cell, and every rule's error below it."""
    lines = [
        "| model | data | epochs | seeds | paper: plain | paper: impartial | ours: plain | ours: impartial | rule | p | | step, plain | step, impartial |",
        "|---|---|--:|--:|--:|--:|--:|--:|---|--:|---|--:|--:|",
    ]
    for c in table:
        values = [
            MODELS[c.model],
            c.data,
            str(c.epochs),
            str(c.seeds),
            *map(_error, (c.paper_plain, c.paper_ours, c.plain, c.ours)),
            c.rule,
        ]
        values += ["" if c.p is None else f"{c.p:.2f}", c.verdict, f"{c.plain_us / 1e3:.2f} ms", f"{c.step_ratio:.2f}x"]
        lines.append(f"| {' | '.join(values)} |")
    rules = sorted({rule for c in table for rule in c.by_rule}, key=lambda rule: (rule != NONE, rule))
    lines += ["", f"| model | data | {' | '.join(rules)} |", f"|---|---|{'--:|' * len(rules)}"]
    lines += [f"| {MODELS[c.model]} | {c.data} | {' | '.join(_error(c.by_rule.get(rule)) for rule in rules)} |" for c in table]
    return "\n".join(lines)


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
