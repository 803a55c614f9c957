"""What the docs show of the runs of Tables 5 and 9: both tables, each rule over all cells, and what the numbers say of the paper's claims."""

import statistics
from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from mmfast.experiments.multimodal import grid, report
from mmfast.experiments.multimodal.report import LATENT, MARGIN, RECONSTRUCTION, Cell, Difference, Measure
from mmfast.experiments.multimodal.results import Result
from mmfast.experiments.multimodal.settings import BLOCKS, MODELS, OBJECTIVES, RULES
from mmfast.experiments.prose import fill, listed, row
from mmfast.experiments.published import TABLE5, TABLE9
from mmfast.experiments.settings import NONE

SEEDS = 3  # of the plan
VERDICTS = ("better", "none", "worse")
MEASURES: dict[str, Measure] = {**LATENT, "reconstruction": lambda s: statistics.mean(measure(s) for measure in RECONSTRUCTION.values())}


def parts(table: Sequence[Cell]) -> list[list[Cell]]:
    """The cells of each data set, size and number of epochs, which have tables of their own."""
    return [list(of) for _, of in groupby(table, lambda cell: cell.part)]


def write(path: Path, found: Sequence[Result]) -> None:
    """Puts the page between the lines of a file that ask for it, wherever there are any.

    Raises:
        SettingsError: the file has no such lines.
    """
    fill(path, "table5", {"page": lambda: markdown(found)})


def markdown(found: Sequence[Result]) -> str:
    """The whole page."""
    made = f"{len(found)} run{' is' if len(found) == 1 else 's are'} recorded."
    if text := lacking(found):
        made += f" {text}"
    if diverged := sum(r.test is None for r in found):
        made += f" {diverged} had no epoch with a finite validation nll."
    shown = [made]
    for table in parts(report.cells(found)):
        shown += ["### Latent accuracy", report.table5(table), "### Every rule", rules(table), "### Coherence", report.table9(table)]
        if said := says(table):
            shown += ["### Beside the paper", "\n".join(f"* {line}" for line in said)]
    return "\n\n".join(shown)


def lacking(found: Sequence[Result]) -> str:
    """Which runs of the plan (every model, loss, rule and block, three seeds) are missing, and what their training steps would take; "" of a whole plan.

    The plan is that of the data set, size and number of epochs of which there are most runs; the blocks pq and pqs are added, model by model and loss by loss, when a rule can be chosen.
    """
    (data, size, epochs), _ = Counter((r.settings.data, r.settings.size, r.settings.epochs) for r in found).most_common(1)[0]
    first = grid.first_stage(tuple(MODELS), OBJECTIVES, RULES, SEEDS, data, size, epochs)
    done = {r.settings for r in found}
    plan = [*first, *grid.second_stage(first, found, BLOCKS)]
    missing = [run for run in plan if run not in done]
    if not missing:
        return ""
    count = Counter(" ".join(filter(None, (MODELS[run.model], f"on {run.blocks}" if run.blocks else "without blocks"))) for run in missing)
    steps = epochs * (9 * missing[0].sizes.most * missing[0].sizes.repeats // missing[0].sizes.batch)
    times = {model: [r.step_us for r in found if r.settings.model == model] for model in MODELS}
    hours = sum(statistics.median(times[run.model]) * steps / 3.6e9 for run in missing if times[run.model])
    text = f"{len(missing)} of the plan are missing ({listed(f'{name} {n}' for name, n in count.items())}): their training steps take {hours:.1f} core-hours"
    return f"{text}, without those on pq and pqs where a rule is not chosen yet." if any(run not in done for run in first) else f"{text}."


def rules(table: Sequence[Cell]) -> str:
    """Every rule with its blocks against no block over all cells, as markdown: verdicts, the mean of the differences, the least and the largest, and the price of a step."""
    heads = ["rule", "blocks", "cells"]
    for name in MEASURES:
        heads += [f"{name}: better, none, worse", "difference (least, most)"]
    lines = [row(*heads, "step"), f"|---|---|--:|{'--:|' * (2 * len(MEASURES) + 1)}"]
    variants = dict.fromkeys(v for cell in table for v in cell.variants if v != (NONE, ""))
    for variant in sorted(variants, key=lambda v: (len(v[1]), v)):
        where = [cell for cell in table if variant in cell.variants]
        values: list[object] = [*variant, len(where)]
        for measure in MEASURES.values():
            values += _over([cell.difference(measure, variant) for cell in where])
        steps = [_step(cell, variant) / _step(cell, (NONE, "")) for cell in where]
        lines.append(row(*values, f"{statistics.median(steps):.2f}x"))
    return "\n".join(
        [
            (
                f"Every rule over all models and losses, in points on the test triplets; less than {MARGIN:g}, or an interval that holds zero, is none. "
                "Reconstruction: coherence given M, S and T, mean over the three. Step: its processor time over that without blocks, median over the cells."
            ),
            "",
            *lines,
        ]
    )


def _over(found: Sequence[Difference | None]) -> list[str]:
    """How many of each verdict, and the mean of the differences with their ends; of cells where no run diverged."""
    known = [d for d in found if d is not None]
    if not known:
        return ["diverged", ""]
    count = Counter(d.verdict for d in known)
    shown = ", ".join(str(count[v]) for v in VERDICTS)
    alone = f" ({count['one seed']} of one seed)" if count["one seed"] else ""
    points = [d.points for d in known]
    return [shown + alone, f"{statistics.mean(points):+.1f} ({min(points):+.1f}, {max(points):+.1f})"]


def _step(cell: Cell, variant: tuple[str, str]) -> float:
    return statistics.median(run.step_us for run in cell.variants[variant].values())


def says(table: Sequence[Cell]) -> list[str]:
    """What became of the paper's differences of more than the margin, with the rule and blocks that validation chose."""
    said = []
    for number, published, measures, called in ((5, TABLE5, LATENT, "{} accuracy"), (9, TABLE9, RECONSTRUCTION, "coherence of {}")):
        found: dict[str, list[tuple[str, Difference]]] = {"better": [], "none": [], "worse": [], "one seed": []}
        others: list[tuple[str, Difference]] = []
        for cell in table:
            for name, measure in measures.items():
                d = cell.difference(measure, cell.chosen) if cell.chosen else None
                if d is None:
                    continue
                plain, ours = published[cell.model, cell.objective, name]
                where = f"{MODELS[cell.model]} {cell.objective.upper()}, {called.format(name)}"
                (found[d.verdict] if ours - plain >= MARGIN else others).append((where, d))
        total = sum(map(len, found.values()))
        if total:
            shown = [f"{'no difference shown' if v == 'none' else v} in {len(of)} ({_named(of)})" for v, of in found.items() if of]
            said.append(f"Table {number}, where the paper gains {MARGIN:g} points or more ({total}): {'; '.join(shown)}.")
        for verdict in ("better", "worse"):
            if of := [(where, d) for where, d in others if d.verdict == verdict]:
                said.append(f"Table {number}, where it does not: {verdict} in {len(of)} of {len(others)} ({_named(of)}).")
    return said


def _named(found: Sequence[tuple[str, Difference]]) -> str:
    return listed(f"{where} {d.points:+.1f}" for where, d in found)
