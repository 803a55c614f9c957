"""What the table says: prose that is filled from the cells. No sentence is here without the condition under which it is true."""

import math
import statistics
import textwrap
from collections.abc import Iterable, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path

from mmfast.experiments import missing, tables
from mmfast.experiments.prose import fill, listed
from mmfast.experiments.published import DOUBTFUL
from mmfast.experiments.report import ALPHA, Cell, Outcome, cells, outliers
from mmfast.experiments.results import Result
from mmfast.experiments.settings import MODELS, SettingsError

CLOSE = 0.1  # of the paper's error: what counts as near it
WIDTH = 150  # of README's lines


@dataclass(frozen=True)
class Rule:
    """A rule over all cells where it ran."""

    name: str
    where: tuple[tuple[Cell, Outcome], ...]

    @property
    def better(self) -> list[tuple[Cell, Outcome]]:
        return [(c, o) for c, o in self.where if o.verdict == "better"]

    @property
    def lost(self) -> list[tuple[Cell, Outcome]]:
        return [(c, o) for c, o in self.where if o.lost]

    @property
    def neither(self) -> list[tuple[Cell, Outcome]]:
        return [(c, o) for c, o in self.where if not o.verdict]

    @property
    def balance(self) -> float:
        """Share of its cells where it is better, less that where it is a loss."""
        return (len(self.better) - len(self.lost)) / len(self.where)

    @property
    def change(self) -> float:
        """Of the median error, median over cells."""
        return statistics.median(_known(o.change for _, o in self.where))

    @property
    def price(self) -> str:
        """A step's time over that of one without a block, median over cells."""
        wall = " (wall)" if any(o.wall for _, o in self.where) else ""
        return f"{statistics.median(o.step_ratio for _, o in self.where):.2f}x{wall}"

    @property
    def line(self) -> str:
        """Of a table: how many cells, the verdicts, the changes, the features that it makes worse, its price."""
        changes = _known(o.change for _, o in self.where)
        worse, features = sum(o.features_worse for _, o in self.where), sum(len(o.features) for _, o in self.where)
        values = [self.name, *(str(len(x)) for x in (self.where, self.better, self.neither, self.lost))]
        values += [f"{tables.percent(self.change)} ({tables.percent(min(changes))}, {tables.percent(max(changes))})"]
        return f"| {' | '.join([*values, f'{worse} of {features}', self.price])} |"


def of_rules(table: Sequence[Cell]) -> list[Rule]:
    """Every rule that ran, the one with the best balance first."""
    names = sorted({name for c in table for name in c.outcomes})
    found = [Rule(name, tuple((c, c.outcomes[name]) for c in table if name in c.outcomes)) for name in names]
    return sorted(found, key=lambda rule: (-rule.balance, rule.change))


def summary(table: Sequence[Cell]) -> str:
    """What the chosen rules came to, and which rules lose."""
    better = [c for c in table if c.chosen.verdict == "better"]
    lost = [c for c in table if c.chosen.lost]
    nothing = [c for c in table if not c.chosen.verdict]
    text = f"The rule that validation chooses is better than no block in {len(better)} of {_cells(table)}"
    text += f", a loss in {len(lost)} ({_names(lost)})" if lost else ", a loss in none"
    text += f", and shows no difference in {len(nothing)} ({_names(nothing)})." if nothing else "."
    losses = [rule for rule in of_rules(table) if rule.lost]
    if losses:
        text += f" Losses of single rules: {'; '.join(f'{rule.name} in {_changes(rule.lost)}' for rule in losses)}."
    return text


def _overall(table: Sequence[Cell]) -> str:
    lines = [
        "| rule | cells | better | no difference shown | loss | change of the median error: median (least, most) | features worse | step |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    lines += [rule.line for rule in of_rules(table)]
    comparisons = sum(len(c.outcomes) for c in table)
    tested = sum(o.p is not None for c in table for o in c.outcomes.values())
    note = (
        f"{tested} of {comparisons} comparisons have a test (two seeds, none diverged). Where no rule did anything, one in {round(2 / ALPHA)} of them "
        f"would be called better and one in {round(2 / ALPHA)} worse: some {tested * ALPHA / 2:.1f} each. A rule without any effect makes half of the "
        "features worse."
    )
    return "\n".join([*lines, "", note])


def _where(table: Sequence[Cell]) -> str:
    lines = []
    for rule in of_rules(table):
        parts = [f"**{rule.name}**, in {_cells(rule.where)}, a step {rule.price}"]
        for title, found in (("better", rule.better), ("no difference shown", rule.neither), ("loss", rule.lost)):
            parts += [f"{title}: {_changes(found)}"] if found else []
        lines.append(f"* {'; '.join(parts)}.")
    return "\n".join(lines)


def _nothing(table: Sequence[Cell]) -> str:
    found = [c for c in table if not any(o.verdict == "better" for o in c.outcomes.values())]
    if not found:
        return "In every cell some rule is better than no block by the test."
    best = [(c, min(c.outcomes.values(), key=lambda o: o.ours)) for c in found]
    lines = [f"In {len(found)} of {_cells(table)} no rule is better than no block by the test:", ""]
    for c, o in best:
        sentence = (
            f"* {c.name}: the lowest of {_count(len(c.outcomes), 'median')} is {o.rule}'s, {_step(o)}, p {tables.p(o.p) or 'not known'}"
        )
        lines.append(sentence + ("; with errors cut at their column's range it is better." if o.capped().verdict == "better" else "."))
    return "\n".join(lines)


def _against_paper(table: Sequence[Cell]) -> str:
    near = [c for c in table if abs(c.chosen.plain / c.paper_plain - 1) <= CLOSE]
    far = [f"{c.name} ({tables.error(c.chosen.plain)}, the paper {tables.error(c.paper_plain)})" for c in table if c not in near]
    text = f"Without a block our error is within {CLOSE:.0%} of the paper's in {len(near)} of {_cells(table)}".replace("%", " %")
    text += f", not in {listed(far)}." if far else "."
    sure = [c for c in table if (c.run.model, c.run.data) not in DOUBTFUL]
    lower = [c for c in sure if c.chosen.ours < c.paper_ours]
    text += f" With the chosen rule it is below the paper's impartial one in {len(lower)}" + (f" ({_names(lower)})." if lower else ".")
    kept = [c for c in sure if c.paper_ours < c.paper_plain]
    repeated = [c for c in kept if c.chosen.verdict == "better"]
    failed = [c for c in kept if c.chosen.verdict != "better"]
    text += f" The paper has a gain in {len(kept)} of these cells; ours is beyond chance in {len(repeated)} of them"
    return text + (f", not in {_names(failed)}." if failed else ".")


def _outlying(table: Sequence[Cell]) -> str:
    outcomes = [(c, o) for c in table for o in c.outcomes.values() if o.outlying]
    if not outcomes:
        return "No feature of a run has an error above its column's range."
    found = {(r.settings, name): (e, r) for _, o in outcomes for r, name, e in outliers([*o.plain_runs, *o.runs])}
    (_, name), (e, r) = max(found.items(), key=lambda item: item[1][0])
    largest = next(c for c, o in outcomes if r in o.plain_runs or r in o.runs)
    other = [(c, o, o.capped()) for c, o in outcomes if o.capped().verdict != o.verdict]
    changed = [f"{o.rule} in {c.name}, from {_verdict(o)} to {_verdict(cut)}" for c, o, cut in other]
    errors, tables_both = tables.outlying(table)
    text = (
        f"{_count(len(found), 'error')} of features {_are(found)} above the range of the column, which no prediction inside the range can be; the "
        f"largest is {e:.3g} ranges: {largest.name}, {r.settings.rule}, seed {r.settings.seed}, {name}. The tables above take them as the paper's code "
        "does: as they are (it cuts a log-normal's mode at 1e20), in a mean over features whose median over seeds hides a single one; the t-test sees it. "
        "The second table has both ways: as they are, and every feature's error cut at one range; validation errors are recorded as means alone, so the "
        "choice of the rule is not cut. "
    )
    text += f"Cutting changes the verdict of {listed(changed)}." if changed else "Cutting changes no verdict."
    return f"{text}\n\n{errors}\n\n{tables_both}"


def advice(table: Sequence[Cell]) -> str:
    """For a reader who must choose a rule."""
    found = of_rules(table)
    wide = [rule for rule in found if 2 * len(rule.where) >= len(table)]
    parts = []
    if wide and wide[0].balance > 0:
        best = wide[0]
        parts.append(
            f"**Begin with {best.name}**: of the {_count(len(wide), 'rule')} that ran in at least half of the cells it has the best balance, better in "
            f"{len(best.better)} and a loss in {len(best.lost)} of {len(best.where)}; the median error changes by {tables.percent(best.change)} (median "
            f"over cells), and a step's time is {best.price} that of one without."
        )
    else:
        parts.append(
            "**This record recommends no rule**: none that ran in at least half of the cells is better in more cells than it is a loss."
        )
    better, lost = [c for c in table if c.chosen.verdict == "better"], [c for c in table if c.chosen.lost]
    parts.append(
        f"**Then choose on validation**: the rule with the least validation error was better than no block in {len(better)} and a loss in {len(lost)} "
        f"of {_cells(table)}."
    )
    kept = [c for c in table if c.plain_validation <= c.validation]
    if kept:
        agreed = [c for c in kept if c.chosen.verdict != "better"]
        parts.append(
            f"Count no block among the candidates: in {_names(kept)} its validation error was not above that of any of the rules, and by the test the "
            f"chosen rule was not better in {len(agreed)} of {len(kept)}."
        )
    else:
        missed = [c for c in table if c.chosen.verdict != "better"]
        parts.append(
            "In every cell the chosen rule had a lower validation error than no block"
            + (f", also in {_names(missed)}, where the test shows no gain." if missed else ".")
        )
    shares = sorted(((c.chosen.features_worse, len(c.chosen.features), c) for c in table if c.chosen.features), key=lambda s: s[0] / s[1])
    if shares and sum(worse for worse, _, _ in shares):
        (low, of_low, at_low), (high, of_high, at_high) = shares[0], shares[-1]
        parts.append(
            f"**Look at the features that matter to you**: the chosen rules make {sum(w for w, _, _ in shares)} of {sum(n for _, n, _ in shares)} features "
            f"worse, from {low} of {of_low} ({at_low.name}) to {high} of {of_high} ({at_high.name})."
        )
    losses = sorted((rule for rule in found if rule.lost), key=lambda rule: -len(rule.lost) / len(rule.where))
    if losses:
        parts.append(
            f"**Beware of** {listed(f'{rule.name} (a loss in {len(rule.lost)} of {_cells(rule.where)}, up to {_worst(rule)})' for rule in losses)}."
        )
    return " ".join(parts)


def _worst(rule: Rule) -> str:
    return tables.percent(max(o.change for _, o in rule.lost))


def _made(found: Sequence[Result], table: Sequence[Cell], others: Sequence[Cell]) -> str:
    """How many runs there are, and what older code made."""
    text = f"{_count(len(found), 'run')} {_are(found)} recorded; {len(table)} of the 48 cells of the paper's table have a rule and no block on one seed."
    if others:
        text += f" {_cells(others)} of other epochs, batches or samples than the paper's {_are(others)} left out here."
    seeds = sorted({o.seeds for c in table for o in c.outcomes.values()})
    text += f" The rules of a cell ran on {listed(map(str, seeds), 'or')} {'seed' if seeds == [1] else 'seeds'}. Intervals are of the bootstrap over seeds, 90 %"
    text += " (of up to five seeds that is their range)" if seeds[-1] <= 5 else ""
    text += "; p is of the corrected paired t-test, two-sided."
    if cut_off := [r for r in found if r.epochs_done < r.settings.epochs]:
        text += f" In {_count(len(cut_off), 'run')} the parameters became NaN; what the epochs before had come to stands."
    if old := [c for c in table if any(r.outdated for r in _runs(c))]:
        count = sum(r.outdated for r in found)
        text += f" {_count(count, 'run')} of HI-VAE (on {listed(c.run.data for c in old)}) {'was' if count == 1 else 'were'} made with the biased divergence of s "
        text += "that experiments.md tells of; today's code would come to other errors"
        mixed = [c for c in old if not all(r.outdated for r in _runs(c))]
        text += f", and on {listed(c.run.data for c in mixed)} they stand beside later ones." if mixed else "."
    if any(o.wall for c in table for o in c.outcomes.values()):
        text += " Times of older runs are the wall clock's, on a machine that had other work; ratios of theirs are marked (wall)."
    return text


def _runs(cell: Cell) -> Iterable[Result]:
    return (r for o in cell.outcomes.values() for r in (*o.plain_runs, *o.runs))


def short(table: Sequence[Cell]) -> str:
    """What README shows: a line for each model, and the summary, in lines of a page's width."""
    table = _of_paper(table)
    lines = [
        "| model | data sets | better | no difference shown | loss | change of the median error: median (least, most) | features worse | step |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for model, title in MODELS.items():
        chosen = Rule(title, tuple((c, c.chosen) for c in table if c.run.model == model))
        if chosen.where:
            lines.append(chosen.line)
    wide = textwrap.TextWrapper(WIDTH, break_long_words=False, break_on_hyphens=False)
    return "\n".join([*lines, "", wide.fill(summary(table))])


def section(table: Sequence[Cell]) -> str:
    """The table of the paper with ours, its legend and the summary."""
    table = _of_paper(table)
    return "\n\n".join([tables.paper(table), tables.LEGEND, summary(table)])


def page(found: Sequence[Result]) -> str:
    """The whole page.

    Raises:
        SettingsError: no cell of the paper's can be compared.
    """
    every = cells(found)
    table = _of_paper(every)
    return "\n\n".join(
        [
            _made(found, table, [c for c in every if not c.of_paper]),
            tables.paper(table),
            tables.LEGEND,
            "## Which rule to choose",
            advice(table),
            "## The rules",
            _overall(table),
            _where(table),
            "## Where nothing helps",
            _nothing(table),
            "## Beside the paper",
            _against_paper(table),
            "## Cell by cell",
            tables.details(table),
            tables.rules(table),
            "## Errors out of range",
            _outlying(table),
            "## What is missing",
            missing.table(found),
        ]
    )


def _of_paper(table: Sequence[Cell]) -> list[Cell]:
    kept = [c for c in table if c.of_paper]
    if not kept:
        raise SettingsError(
            "the record has no model and data set with the paper's epochs, batches and samples, run with and without a block on one seed"
        )
    return kept


def write(path: Path, found: Sequence[Result]) -> None:
    """Puts the page, the section or its short form between the lines that ask for it, wherever there are any.

    Raises:
        SettingsError: the file has no such lines, or the record nothing to put there.
    """
    parts = {"page": lambda: page(found), "table": lambda: section(cells(found)), "summary": lambda: short(cells(found))}
    fill(path, "table1", parts)


def _known(changes: Iterable[float]) -> list[float]:
    return [change for change in changes if not math.isnan(change)] or [math.nan]


def _count(n: int, word: str) -> str:
    return f"{n} {word}{'' if n == 1 else 's'}"


def _are(found: Sized) -> str:
    return "is" if len(found) == 1 else "are"


def _cells(found: Sized) -> str:
    return _count(len(found), "cell")


def _names(found: Iterable[Cell]) -> str:
    return listed(c.name for c in found)


def _changes(found: Iterable[tuple[Cell, Outcome]]) -> str:
    return listed(f"{c.name} ({_step(o)})" for c, o in found)


def _step(outcome: Outcome) -> str:
    return f"{tables.error(outcome.plain)} to {tables.error(outcome.ours)}, {tables.percent(outcome.change)}"


def _verdict(outcome: Outcome) -> str:
    return f"{outcome.verdict or 'no difference'} (p {tables.p(outcome.p) or 'not known'})"
