"""The runs that the record of Table 1 is to hold, those that it lacks, and what they would cost."""

import functools
import statistics
from collections.abc import Sequence

from mmfast.data import SETS
from mmfast.experiments.published import DATA_SETS
from mmfast.experiments.report import timed
from mmfast.experiments.results import Result
from mmfast.experiments.settings import MODELS, NONE, Settings, settings

OBTAINABLE = tuple(name for name in DATA_SETS if name != "BooNE")
COMPLETE_ROWS = {"ElNino": 93_935}  # of the file's rows, where those with a missing cell are left out

# (models, data sets, rules, seeds)
PLAN = (
    (("elbo", "hivae"), OBTAINABLE, (NONE, "GradNorm", "GradNorm(alpha=1.0)", "PCGrad", "IMTLG", "MGDA(cap=0.001)", "GradNorm+PCGrad"), 5),
    (("iwae", "dreg"), ("Wine", "labour", "Magic", "rwm5yr", "HI", "Adult"), (NONE, "GradNorm", "GradNorm+PCGrad"), 3),
)


@functools.cache
def planned() -> tuple[Settings, ...]:
    """All runs of the plan."""
    return tuple(
        settings(model, name, rule, seed)
        for models, data_sets, rules, seeds in PLAN
        for model in models
        for name in data_sets
        for rule in rules
        for seed in range(seeds)
    )


def lacking(found: Sequence[Result]) -> list[Settings]:
    """The runs of the plan that are not recorded."""
    done = {result.settings for result in found}
    return [run for run in planned() if run not in done]


def core_hours(run: Settings, found: Sequence[Result]) -> float | None:
    """Of its training steps, by the step times of its cell, or else of its model on other data; None where the model has none. Validation isn't in it."""
    of_model = [r for r in found if r.settings.model == run.model]
    like = [r for r in of_model if r.settings.data == run.data] or of_model
    if not like:
        return None
    rows = round(0.7 * COMPLETE_ROWS.get(run.data, SETS[run.data].rows))
    steps = run.epochs * (rows // min(run.batch, rows))
    return steps * statistics.median(r.step_us for r in timed(like)) / 3.6e9


def table(found: Sequence[Result]) -> str:
    """Sentences, and a line of markdown for each cell that lacks runs."""
    runs, plan = lacking(found), planned()
    text = f"{len(runs)} of the {len(plan)} runs of the plan are missing."
    old = [r.settings for r in found if r.outdated and r.settings in set(plan)]
    if old:
        text += f" {len(old)} others were made by older code, whose errors are not today's; they are made anew (core-hours: {_hours(old, found)}) once their "
        text += "lines are taken out of the record."
    if not runs:
        return text
    text += f" Core-hours of the training steps of those that are missing, each run by itself, by the step times in the record: {_hours(runs, found)}. "
    text += "VAE and IWAE, up to 20 of a cell trained together, take a third of it or less; validation adds to it. The plan:"
    parts = [
        f"* {', '.join(MODELS[m] for m in models)} on {', '.join(data_sets)}; {', '.join(rules)}; {seeds} seeds"
        for models, data_sets, rules, seeds in PLAN
    ]
    lines = ["| model | data | missing | of | core-hours |", "|---|---|--:|--:|--:|"]
    for model, name in dict.fromkeys((run.model, run.data) for run in runs):
        of, here = ([run for run in some if (run.model, run.data) == (model, name)] for some in (plan, runs))
        lines.append(f"| {MODELS[model]} | {name} | {len(here)} | {len(of)} | {_hours(here, found)} |")
    return "\n\n".join([text, "\n".join(parts), "\n".join(lines)])


def _hours(runs: Sequence[Settings], found: Sequence[Result]) -> str:
    parts = [core_hours(run, found) for run in runs]
    known = [hours for hours in parts if hours is not None]
    unknown = len(parts) - len(known)
    if not known:
        return "not known"
    return f"{sum(known):.1f}" + (f", without {unknown} runs of models that have no recorded step" if unknown else "")
