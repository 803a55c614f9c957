"""The report's tables, as markdown."""

import math
import statistics
from collections.abc import Sequence

from mmfast.experiments.published import DATA_SETS, DOUBTFUL, TABLE1
from mmfast.experiments.report import Cell, Outcome, interval, outliers
from mmfast.experiments.settings import MODELS, NONE

NO_RUNS = "no runs"

LEGEND = f"""Mean test error over features: the paper's, and ours as the median over seeds. The rule is the one with the least median validation error (the test error
is never looked at for it). **Bold**: better than without a block by the corrected paired t-test, p below .1; "worse", "diverged": a loss; neither: no
difference shown. "?": ten times below plain, perhaps for a digit lost where it was read. "{NO_RUNS}": no seed was run both with and without a block for the paper's number of epochs."""


def paper(table: Sequence[Cell]) -> str:
    """The table of the paper, all rows and columns, with ours below each model's; runs of other sizes than the paper's are left out."""
    of_paper = {(cell.run.model, cell.run.data): cell for cell in table if cell.of_paper}
    lines = [f"| model | what | {' | '.join(DATA_SETS)} |", f"|---|---|{'--:|' * len(DATA_SETS)}"]
    for model, title in MODELS.items():
        found = [of_paper.get((model, name)) for name in DATA_SETS]
        rows = {
            "paper: plain": [error(TABLE1[model, name][0]) for name in DATA_SETS],
            "paper: impartial": [impartial(model, name) for name in DATA_SETS],
            "ours: plain": [error(c.chosen.plain) if c else NO_RUNS for c in found],
            "ours: impartial": [judged(c.chosen) if c else NO_RUNS for c in found],
            "rule": [c.rule if c else "" for c in found],
        }
        lines += [f"| {title} | {name} | {' | '.join(values)} |" for name, values in rows.items()]
    return "\n".join(lines)


def details(table: Sequence[Cell]) -> str:
    """A line per cell: medians with their intervals, the chosen rule, the test, how many features it made worse, and its price."""
    lines = [
        "| model | data | epochs, batch, S | seeds | paper: plain | paper: impartial | ours: plain | ours: impartial | rule | p | | features worse | step, plain | step |",
        "|---|---|--:|--:|--:|--:|--:|--:|---|--:|---|--:|--:|--:|",
    ]
    for c in table:
        o = c.chosen
        values = [MODELS[c.run.model], c.run.data, f"{c.run.epochs}, {c.run.batch}, {c.run.samples}", str(o.seeds)]
        values += [error(c.paper_plain), impartial(c.run.model, c.run.data), between(o.before), between(o.after), c.rule, p(o.p), o.verdict]
        values += [f"{o.features_worse} of {len(o.features)}", f"{o.plain_us / 1e3:.2f} ms", price(o)]
        lines.append(f"| {' | '.join(values)} |")
    return "\n".join(lines)


def rules(table: Sequence[Cell]) -> str:
    """Every rule's median test error in every cell, on the seeds that it shares with the runs without a block."""
    names = sorted({rule for c in table for rule in c.outcomes})
    lines = [f"| model | data | {NONE} | {' | '.join(names)} |", f"|---|---|--:|{'--:|' * len(names)}"]
    for c in table:
        values = [_rule(c, c.outcomes[name]) if name in c.outcomes else NO_RUNS for name in names]
        lines.append(f"| {MODELS[c.run.model]} | {c.run.data} | {error(c.chosen.plain)} | {' | '.join(values)} |")
    return "\n".join(lines)


def markdown(table: Sequence[Cell]) -> str:
    """What the report prints."""
    return "\n\n".join([paper(table), LEGEND, details(table), rules(table), *outlying(table)])


def outlying(table: Sequence[Cell]) -> list[str]:
    """Two tables if there are errors above a column's range, else none: those errors, and the rules beside them with every error cut at the range."""
    outcomes = [(c, o) for c in table for o in c.outcomes.values() if o.outlying]
    if not outcomes:
        return []
    found = {(r.settings, name): e for _, o in outcomes for r, name, e in outliers([*o.plain_runs, *o.runs])}
    errors = ["| model | data | rule | seed | feature | error, in ranges of its column |", "|---|---|---|--:|---|--:|"]
    for (run, name), e in sorted(found.items(), key=lambda item: -item[1]):
        errors.append(f"| {MODELS[run.model]} | {run.data} | {run.rule} | {run.seed} | {name} | {e:.3g} |")
    both = [
        "| model | data | rule | plain | impartial | p | | cut: plain | cut: impartial | cut: p | |",
        "|---|---|---|--:|--:|--:|---|--:|--:|--:|---|",
    ]
    for c, o in outcomes:
        cut = o.capped()
        values = [MODELS[c.run.model], c.run.data, o.rule]
        values += [text for x in (o, cut) for text in (error(x.plain), error(x.ours), p(x.p), x.verdict)]
        both.append(f"| {' | '.join(values)} |")
    return ["\n".join(errors), "\n".join(both)]


def _rule(cell: Cell, outcome: Outcome) -> str:
    return judged(outcome) + (f" ({outcome.seeds} of {cell.chosen.seeds} seeds)" if outcome.seeds != cell.chosen.seeds else "")


def judged(outcome: Outcome) -> str:
    """Its median error, marked with the verdict."""
    text = error(outcome.ours)
    if outcome.verdict == "better":
        return f"**{text}**"
    return f"{text} {outcome.verdict}" if outcome.verdict and outcome.verdict != text else text


def impartial(model: str, data: str) -> str:
    """The paper's error with a block, with a mark where it may have lost a digit."""
    return error(TABLE1[model, data][1]) + ("?" if (model, data) in DOUBTFUL else "")


def price(outcome: Outcome) -> str:
    """A step's time over that of one without a block."""
    return f"{outcome.step_ratio:.2f}x{' (wall)' if outcome.wall else ''}"


def p(value: float | None) -> str:
    """With two digits and without the zero before the point; what would round to .00 is said to be below .01."""
    return "" if value is None else "< .01" if value < 0.01 else f"{value:.2f}".removeprefix("0")


def error(value: float) -> str:
    """With three digits."""
    return f"{value:.3f}" if math.isfinite(value) else "diverged"


def between(values: Sequence[float]) -> str:
    """The median and its interval."""
    found = interval(values)
    return (
        error(statistics.median(values)) if found is None else f"{error(statistics.median(values))} [{error(found[0])}, {error(found[1])}]"
    )


def percent(share: float) -> str:
    """With its sign."""
    return f"{'+' if share > 0 else '−' if share < 0 else ''}{abs(share):.0%}".replace("%", " %") if math.isfinite(share) else "diverged"
