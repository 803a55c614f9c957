"""The commands mmfast train collapse and mmfast report collapse."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from mmfast.console import fail, need
from mmfast.experiments.commands import EXTRAS, OUT, Out, failed_at_the_end, report, train, train_grid

NEEDS = {**EXTRAS, "sklearn": "scikit-learn"}
FIGURES = {"matplotlib": "matplotlib"}


@train.command("collapse")
def train_collapse(
    context: typer.Context,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="planted, Credit, Bank, avMNIST, MIMIC-IV, MIMIC-IV-readmission; repeatable, of the first four all that are here by default."
        ),
    ] = None,
    system: Annotated[
        list[str] | None,
        typer.Option(help="late, early, cmae, smil, mt, grape, m3care, shaspec, muse; repeatable, all by default."),
    ] = None,
    cure: Annotated[list[str] | None, typer.Option(help="none, kd, ebr; repeatable, all by default.")] = None,
    rule: Annotated[
        list[str] | None, typer.Option(help="Of the block of cmae, mt, shaspec, muse and EBR; repeatable, none alone by default.")
    ] = None,
    noise: Annotated[
        list[float] | None,
        typer.Option(
            help="Of the sweep with early fusion on planted and Credit, standard deviations; repeatable, 0.5, 1, 2 by default; 0: no sweep."
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many, from 0 on.")] = 3,
    epochs: Annotated[int | None, typer.Option(help="Of the last stage; the data set's number by default.")] = None,
    weight: Annotated[
        float | None, typer.Option(min=0, help="Of KD's distance and EBR's reversed gradient; the cure's by default.")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="All rows in place of 8,000, 2,000 and 4,000 at most.")] = False,
    processes: Annotated[int | None, typer.Option(min=1, help="Runs at once; one per processor by default.")] = None,
    out: Out = OUT,
) -> None:
    """Trains systems for missing modalities alone, with distillation and with basis reallocation (Chaudhuri et al., ICML 2025); killed and called again, it goes
    on where it was."""
    need("training", "demo,train", NEEDS)
    from mmfast.data import DataError
    from mmfast.experiments.collapse import grid
    from mmfast.experiments.collapse.run import EXPERIMENT
    from mmfast.experiments.collapse.settings import CURES, SYSTEMS
    from mmfast.experiments.settings import NONE, SettingsError

    try:
        systems, cures = system or list(SYSTEMS), cure or list(CURES)
        options = systems, cures, rule or [NONE], noise or grid.NOISES, seeds, epochs, weight, full
        grid.runs(data or _FREE, *options)  # says what is wrong with them before anything is downloaded
        runs = grid.runs(_here(data), *options)
    except (SettingsError, DataError) as error:
        fail(str(error))
    found, wrong = train_grid(context, "mmfast train collapse", runs, out, processes, EXPERIMENT)
    again = shlex.join(["mmfast", "report", "collapse", "--out", str(out)])
    print(f"{len(found)} of {len(runs)} runs are recorded in {out / EXPERIMENT.record}; {again} shows them")
    failed_at_the_end(wrong)


_FREE = ["planted", "Credit", "Bank", "avMNIST"]  # what anybody can have


def _here(asked: Sequence[str] | None) -> list[str]:
    """The data sets that were asked for, each of which must be here; else those that are."""
    from mmfast.data import DataError, modalities

    found = []
    for name in asked or _FREE:
        try:
            modalities.load(name, 0)
        except DataError as error:
            if asked:
                raise
            print(f"left out: {error}")
            continue
        found.append(name)
    return found


@report.command("collapse")
def report_collapse(
    out: Out = OUT,
    page: Annotated[
        Path | None,
        typer.Option(
            help="A file to write in: what stands between <!-- mmfast report collapse: page --> and <!-- end of mmfast report collapse -->."
        ),
    ] = None,
    figures: Annotated[
        Path | None, typer.Option(help="Also draws the noise sweep and the ranks over the trainings, into this folder.")
    ] = None,
) -> None:
    """Prints what the runs on representation collapse came to beside the tables of the paper, as markdown, or writes it into a file."""
    need("the report", "train", EXTRAS)
    from mmfast.experiments.collapse.page import markdown, write
    from mmfast.experiments.collapse.report import sheets
    from mmfast.experiments.collapse.results import RECORD, read
    from mmfast.experiments.settings import SettingsError

    try:
        found = read(out)
        if not found:
            again = shlex.join(["mmfast", "train", "collapse", "--out", str(out)])
            fail(f"there are no results in {out}: {out / RECORD} has none; {again} makes them")
        if page is None:
            print(markdown(found))
        else:
            write(page, found)
            print(f"written into {page}")
    except SettingsError as error:
        fail(str(error))
    if figures is not None:
        need("the figures", "demo", FIGURES)
        from mmfast.experiments.collapse.figures import draw

        for path in draw(sheets(found), figures):
            print(f"drawn into {path}")
