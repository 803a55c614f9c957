"""What a grid of runs came to: each system by data set, compared seed by seed, and which modality was eliminated."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from mmfast.experiments.collapse.results import Result
from mmfast.experiments.collapse.settings import CURES, EPOCHS, SYSTEMS, Settings
from mmfast.experiments.multimodal.report import interval
from mmfast.experiments.report import ALPHA, corrected_t_test
from mmfast.experiments.settings import NONE

DRAWN = ("planted",)  # every seed has rows of its own

Measure = Callable[[Result], float | None]


@dataclass(frozen=True)
class Variant:
    """A system with its cure and rule, at a level of noise."""

    system: str
    cure: str = NONE
    rule: str = NONE
    noise: float = 0.0

    @property
    def order(self) -> tuple[int, int, str, float]:
        """As tables have them."""
        return list(SYSTEMS).index(self.system), list(CURES).index(self.cure), "" if self.rule == NONE else self.rule, self.noise

    @property
    def label(self) -> str:
        """For people."""
        return Settings("", self.system, self.cure, self.rule, 0, 0, 0, 0.0, 0.0, False).variant


@dataclass(frozen=True)
class Value:
    """A measure over the seeds of a variant."""

    mean: float
    low: float  # of the bootstrap interval of the mean, NaN for one seed
    high: float
    seeds: int


@dataclass(frozen=True)
class Difference:
    """Of a measure, b minus a, over the seeds that both have."""

    a: float  # means
    b: float
    low: float  # of the bootstrap interval of the mean difference, NaN for one seed
    high: float
    p: float | None  # of the corrected paired t-test; None for one seed
    seeds: int

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return self.b - self.a

    @property
    def verdict(self) -> str:
        """higher, lower, or nothing where the test sees no difference."""
        if self.p is None or not self.p < ALPHA:
            return ""
        return "higher" if self.mean > 0 else "lower"


@dataclass(frozen=True)
class Sheet:
    """The runs on one data set with the same epochs, rows of a step and rows."""

    data: str
    epochs: int
    batch: int
    full: bool
    runs: dict[Variant, dict[int, Result]]  # by seed; of several weights those that are best on validation

    @property
    def any(self) -> Result:
        """One of them."""
        return next(iter(next(iter(self.runs.values())).values()))

    @property
    def classes(self) -> int:
        return self.any.classes

    @property
    def plain(self) -> list[Variant]:
        """Without rule and noise, in the tables' order."""
        return sorted((v for v in self.runs if v.rule == NONE and not v.noise), key=lambda v: v.order)

    def value(self, variant: Variant, measure: Measure) -> Value | None:
        """None where there is no such run, or one of them has no such number."""
        found = [measure(r) for r in self.runs.get(variant, {}).values()]
        known = [x for x in found if x is not None]
        return Value(statistics.mean(known), *interval(known), len(known)) if known and len(known) == len(found) else None

    def difference(self, a: Variant, b: Variant, measure: Measure) -> Difference | None:
        """b minus a; None where they have no seed in common, or a run of those has no such number."""
        first, second = self.runs.get(a, {}), self.runs.get(b, {})
        seeds = sorted(first.keys() & second.keys())
        pairs = [(measure(first[s]), measure(second[s])) for s in seeds]
        known = [(x, y) for x, y in pairs if x is not None and y is not None]
        if not known or len(known) < len(pairs):
            return None
        xs, ys = zip(*known, strict=True)
        low, high = interval([y - x for x, y in known])
        # splits of one table share rows; where each seed has rows of its own nothing is to be corrected
        shared = 0.0 if self.data in DRAWN else self.any.rows["test"] / self.any.rows["train"]
        p = corrected_t_test(ys, xs, shared)
        return Difference(statistics.mean(xs), statistics.mean(ys), low, high, p, len(seeds))

    @property
    def ranked(self) -> list[str]:
        """The modalities by what early fusion without cure gets from them, the least first: loss of validation score without it, mean over the seeds; empty without
        such runs."""
        runs = self.runs.get(Variant("early"), {}).values()
        lost = {}
        for name in self.any.contribution if runs else ():
            found = [r.contribution_validation[name] for r in runs]
            lost[name] = statistics.mean(math.inf if x is None else x for x in found)
        return sorted(lost, key=lambda name: lost[name])

    @property
    def eliminated(self) -> str | None:
        """The first of those."""
        return next(iter(self.ranked), None)


def sheets(found: Sequence[Result]) -> list[Sheet]:
    """All runs, by data set; runs of several weights are as one, see `_chosen`."""
    groups: dict[tuple[str, int, int, bool], dict[Variant, dict[float, dict[int, Result]]]] = {}
    for result in found:
        run = result.settings
        variant = Variant(run.system, run.cure, run.rule, run.noise)
        by_weight = groups.setdefault((run.data, run.epochs, run.batch, run.full), {}).setdefault(variant, {})
        by_weight.setdefault(run.weight, {})[run.seed] = result
    order = sorted(groups, key=lambda key: (list(EPOCHS).index(key[0]), *key[1:]))
    return [Sheet(*key, {variant: _chosen(weights) for variant, weights in groups[key].items()}) for key in order]


def _chosen(weights: dict[float, dict[int, Result]]) -> dict[int, Result]:
    """The runs of the weight with the best validation score on the seeds that all weights with the most seeds share."""
    most = max(map(len, weights.values()))
    full = {weight: runs for weight, runs in weights.items() if len(runs) == most}
    seeds = set.intersection(*(set(runs) for runs in full.values())) or set(next(iter(full.values())))
    return full[max(full, key=lambda w: statistics.mean(_validation(full[w][s]) for s in seeds if s in full[w]))]


def _validation(result: Result) -> float:
    return -math.inf if result.best_validation is None else result.best_validation


def with_cure(variant: Variant, cure: str) -> Variant:
    """The same system with another cure."""
    return replace(variant, cure=cure)


def mean_of(what: str) -> Measure:
    """roc, prc or accuracy, mean over the missing rates."""
    return lambda r: r.mean(what)


def main(r: Result) -> float | None:
    """What runs are chosen by, on test rows, mean over the missing rates."""
    return r.mean("roc" if r.classes == 2 else "accuracy")


def main_at(rate: float) -> Measure:
    """What runs are chosen by, on test rows, at a missing rate."""
    return lambda r: None if (s := r.test[f"{rate:g}"]) is None else s.main(r.classes)


def looked(what: str, name: str | None = None) -> Measure:
    """A number of the look at the fusion; of a modality or of "fused" where it is a dict."""

    def measure(r: Result) -> float | None:
        if r.look is None:
            return None
        found = getattr(r.look, what)
        return found if name is None else found[name]

    return measure


def contribution(name: str) -> Measure:
    """Of a modality, on test rows."""
    return lambda r: r.contribution[name]


def alone(name: str) -> Measure:
    """What a modality comes to by itself, on test rows that have it."""
    return lambda r: None if (s := r.only[name]) is None else s.main(r.classes)
