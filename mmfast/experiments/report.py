"""What a grid of runs came to: every rule against no block, on the same seeds, and the rule that validation chooses."""

import itertools
import math
import random
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from scipy import stats

from mmfast.experiments.published import DATA_SETS, TABLE1
from mmfast.experiments.results import Result
from mmfast.experiments.settings import MODELS, NONE, Settings, settings

TEST_OVER_TRAIN = 2 / 7  # rows of the two parts
ALPHA = 0.1
LEVEL = 0.9  # of the intervals
RESAMPLES = 5000  # of the bootstrap, where not all of them are taken
RANGE = 1.0  # the error of a numeric feature that no prediction inside its column's range exceeds; a share of wrong classes doesn't either


@dataclass(frozen=True)
class Outcome:
    """A rule against no block, in one cell, run by run on the seeds that both have."""

    plain_runs: tuple[Result, ...]
    runs: tuple[Result, ...]

    @property
    def rule(self) -> str:
        return self.runs[0].settings.rule

    @property
    def seeds(self) -> int:
        return len(self.runs)

    @property
    def before(self) -> list[float]:
        """Test errors without a block; infinite for a run that diverged."""
        return [_finite(r.test_error) for r in self.plain_runs]

    @property
    def after(self) -> list[float]:
        """Test errors with the rule."""
        return [_finite(r.test_error) for r in self.runs]

    @property
    def plain(self) -> float:
        """Median test error without a block; infinite where most runs diverged."""
        return statistics.median(self.before)

    @property
    def ours(self) -> float:
        """Median test error with the rule."""
        return statistics.median(self.after)

    @property
    def change(self) -> float:
        """Of the median, as a share of the one without a block; NaN where that diverged."""
        return self.ours / self.plain - 1

    @property
    def gain(self) -> float:
        """Mean over seeds of what the rule takes off the test error; NaN where a run diverged."""
        return statistics.mean(self.before) - statistics.mean(self.after) if self._all_finite else math.nan

    @cached_property
    def p(self) -> float | None:
        """Of there being no gain, by the corrected paired t-test; None for fewer than two seeds, or where a run diverged."""
        return corrected_t_test(self.after, self.before) if self._all_finite else None

    @property
    def verdict(self) -> str:
        """better, worse, diverged where that befell more runs than without a block, or nothing where the test sees no difference."""
        if self.after.count(math.inf) > self.before.count(math.inf):
            return "diverged"
        if self.p is None or not self.p < ALPHA:
            return ""
        return "better" if self.gain > 0 else "worse"

    @property
    def lost(self) -> bool:
        """Whether it did harm."""
        return self.verdict in ("worse", "diverged")

    @cached_property
    def features(self) -> dict[str, tuple[float, float]]:
        """Median test error of each feature without a block and with the rule."""
        names = [name for name, error in self.plain_runs[0].test_errors.items() if error is not None]
        pairs = {name: [_median(r.test_errors.get(name) for r in runs) for runs in (self.plain_runs, self.runs)] for name in names}
        return {name: (before, after) for name, (before, after) in pairs.items()}

    @property
    def features_worse(self) -> int:
        """Features whose median test error is larger with the rule."""
        return sum(after > before for before, after in self.features.values())

    @property
    def plain_us(self) -> float:
        """A training step without a block, median of microseconds."""
        return statistics.median(r.plain_step_us for r in timed(self.runs))

    @property
    def step_ratio(self) -> float:
        """Of a step with the rule to one without, timed in turn; median."""
        return statistics.median(r.step_us / r.plain_step_us for r in timed(self.runs))

    @property
    def wall(self) -> bool:
        """Whether its times are those of the wall clock."""
        return timed(self.runs)[0].revision < 2

    @property
    def outlying(self) -> bool:
        """Whether a feature of one of its runs, or of those without a block, has an error above its column's range."""
        return any(outliers(self.plain_runs)) or any(outliers(self.runs))

    def capped(self) -> "Outcome":
        """The same with every feature's error cut at its column's range, and the test errors made from those."""
        return Outcome(tuple(map(_capped, self.plain_runs)), tuple(map(_capped, self.runs)))

    @property
    def _all_finite(self) -> bool:
        return all(map(math.isfinite, self.before + self.after))


@dataclass(frozen=True)
class Cell:
    """One model on one data set: the paper's two numbers, and every rule that has a seed in common with the runs without a block."""

    run: Settings  # rule and seed left open
    paper_plain: float
    paper_ours: float
    outcomes: dict[str, Outcome]
    rule: str  # chosen by the median validation error
    plain_validation: float  # median validation error without a block, and with the chosen rule, on the seeds that the choice looked at
    validation: float

    @property
    def name(self) -> str:
        return f"{MODELS[self.run.model]} on {self.run.data}"

    @property
    def of_paper(self) -> bool:
        """Whether its epochs, batches and samples are the paper's."""
        return self.run == replace(settings(self.run.model, self.run.data), rule="")

    @property
    def chosen(self) -> Outcome:
        return self.outcomes[self.rule]


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


def interval(values: Sequence[float], level: float = LEVEL) -> tuple[float, float] | None:
    """Bootstrap interval of the median, by percentiles; None for fewer than two values.

    All resamples of up to five values are taken, of more 5000 that are drawn with a fixed seed: the same values give the same interval.
    """
    n = len(values)
    if n < 2:
        return None
    generator = random.Random(0)
    drawn = ([int(generator.random() * n) for _ in range(n)] for _ in range(RESAMPLES))
    resamples: Iterable[Sequence[int]] = itertools.product(range(n), repeat=n) if n <= 5 else drawn
    medians = sorted(statistics.median(values[i] for i in resample) for resample in resamples)
    outside = math.floor((1 - level) / 2 * len(medians))
    return medians[outside], medians[-1 - outside]


def outliers(runs: Iterable[Result]) -> list[tuple[Result, str, float]]:
    """(run, feature, error) where an error is above its column's range."""
    return [(r, name, error) for r in runs for name, error in r.test_errors.items() if error is not None and error > RANGE]


def _capped(result: Result) -> Result:
    errors = {name: None if error is None else min(error, RANGE) for name, error in result.test_errors.items()}
    known = [error for error in errors.values() if error is not None]
    return replace(result, test_errors=errors, test_error=statistics.mean(known) if known else result.test_error)


def cells(found: Sequence[Result]) -> list[Cell]:
    """All cells that have a run without a block and one with on the same seed, in the order of the paper's table."""
    groups: dict[Settings, dict[str, dict[int, Result]]] = {}
    for result in found:
        run = result.settings
        groups.setdefault(replace(run, rule="", seed=0), {}).setdefault(run.rule, {})[run.seed] = result
    order = sorted(groups, key=lambda run: (list(MODELS).index(run.model), DATA_SETS.index(run.data), run.epochs, run.batch, run.samples))
    made = [_cell(run, groups[run]) for run in order]
    return [cell for cell in made if cell is not None]


def _cell(run: Settings, by_rule: dict[str, dict[int, Result]]) -> Cell | None:
    """The rule is chosen by its median validation error among those that ran on as many seeds as any, or on one fewer: a grid that was stopped lacks
    the last seed of its last rules. Only seeds that all of them and the run without a block share count in the choice.
    """
    plain = by_rule.get(NONE, {})
    shared = {rule: sorted(runs.keys() & plain.keys()) for rule, runs in by_rule.items() if rule != NONE}
    most = max(map(len, shared.values()), default=0)
    candidates = [rule for rule, seeds in shared.items() if len(seeds) >= max(1, most - 1)]
    seeds = set.intersection(*(set(shared[rule]) for rule in candidates)) if candidates else set()
    if not seeds:
        return None
    validation = {rule: _median(by_rule[rule][s].validation_error for s in seeds) for rule in (NONE, *candidates)}
    outcomes = {
        rule: Outcome(tuple(plain[s] for s in seeds), tuple(by_rule[rule][s] for s in seeds)) for rule, seeds in shared.items() if seeds
    }
    rule = min(candidates, key=validation.__getitem__)
    return Cell(run, *TABLE1[run.model, run.data], outcomes, rule, validation[NONE], validation[rule])


def timed(runs: Sequence[Result]) -> Sequence[Result]:
    """The runs whose times are of the processor, or all where none has them."""
    return [r for r in runs if r.revision >= 2] or runs


def _finite(error: float | None) -> float:
    """A run without an error diverged: worse than any."""
    return math.inf if error is None else error


def _median(errors: Iterable[float | None]) -> float:
    return statistics.median(map(_finite, errors))
