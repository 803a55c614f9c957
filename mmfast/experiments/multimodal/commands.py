"""The commands mmfast train table5, mmfast report table5 and mmfast report table9."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmfast.console import Progress, fail, missing, need
from mmfast.experiments.commands import EXTRAS, OUT, Out, failed_at_the_end, report, train, train_grid

if TYPE_CHECKING:
    from mmfast.experiments.multimodal.report import Cell
    from mmfast.experiments.multimodal.results import Result

FIGURES = {"matplotlib": "matplotlib"}


@train.command("table5")
def train_table5(
    context: typer.Context,
    model: Annotated[list[str] | None, typer.Option(help="mvae, mmvae, mopoe; repeatable, all by default.")] = None,
    loss: Annotated[list[str] | None, typer.Option(help="elbo, iwae, siwae; repeatable, all by default.")] = None,
    rule: Annotated[list[str] | None, typer.Option(help="A rule; repeatable, none, PCGrad, CAGrad, IMTLG, GradNorm by default.")] = None,
    blocks: Annotated[
        list[str] | None, typer.Option(help="pq, pqs: trained with the rule that is best on p; repeatable, both by default; p: neither.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many, from 0 on.")] = 3,
    size: Annotated[str, typer.Option(help="small, for laptops, full, as published, or tiny, to see in a minute that it works.")] = "small",
    data: Annotated[
        str | None,
        typer.Option(help="MNIST-SVHN-Text, or MNIST-SVHN*-Text with a stand-in for SVHN; by default the real one if it is here."),
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="The size's number by default.")] = None,
    processes: Annotated[int | None, typer.Option(min=1, help="Runs at once; one per processor by default.")] = None,
    out: Out = OUT,
) -> None:
    """Trains the grid of Tables 5 and 9 (Javaloy et al., ICML 2022) on MNIST-SVHN-Text; killed and called again, it goes on where it was."""
    need("training", "train", EXTRAS)
    from mmfast.data import DataError
    from mmfast.experiments.multimodal import grid, judges
    from mmfast.experiments.multimodal.run import EXPERIMENT, device_of
    from mmfast.experiments.multimodal.settings import BLOCKS, MODELS, OBJECTIVES, RULES
    from mmfast.experiments.settings import SettingsError

    more = blocks or list(BLOCKS)
    if unknown := [b for b in more if b not in BLOCKS]:
        fail(f"blocks is {unknown[0]!r}, expected one of {', '.join(BLOCKS)}")
    if missing(FIGURES):
        print("no pictures are drawn: they need matplotlib; pip install 'mmfast[demo]'")
    command = "mmfast train table5"
    try:
        first = grid.first_stage(list(model or MODELS), list(loss or OBJECTIVES), list(rule or RULES), seeds, data, size, epochs)
        with Progress() as progress:
            sizes = first[0].sizes
            judges.ready(out, first[0].data, sizes, device_of(), lambda done, remark: progress("judges", done, sizes.judge_epochs, remark))
    except (SettingsError, DataError) as error:
        fail(str(error))
    found, wrong = train_grid(context, command, first, out, processes, EXPERIMENT)
    second = grid.second_stage(first, found, more)
    if second:
        others, also_wrong = train_grid(context, command, second, out, processes, EXPERIMENT)
        found, wrong = found + others, wrong + also_wrong
    print(
        f"{len(found)} of {len(first) + len(second)} runs are recorded in {out / EXPERIMENT.record}; {_report_of('table5', out)} shows them"
    )
    failed_at_the_end(wrong)


@report.command("table5")
def report_table5(
    out: Out = OUT,
    figure: Annotated[Path | None, typer.Option(help="Also draws the conflict over the trainings, into this PNG.")] = None,
    page: Annotated[
        list[Path] | None,
        typer.Option(
            help="A file to write in: both tables and what they say, between <!-- mmfast report table5: page --> and <!-- end of mmfast report table5 -->. Repeatable."
        ),
    ] = None,
) -> None:
    """Prints Table 5 of the paper, latent accuracy, with the recorded runs beside it, as markdown, or writes it into files with Table 9 and what both say."""
    from mmfast.experiments.multimodal import page as pages
    from mmfast.experiments.multimodal import report as reports
    from mmfast.experiments.settings import SettingsError

    found, table = _recorded(out)
    try:
        for path in page or []:
            pages.write(path, found)
            print(f"written into {path}")
    except SettingsError as error:
        fail(str(error))
    if not page:
        print("\n\n".join(map(reports.table5, pages.parts(table))))
    if figure is not None:
        need("the figure", "demo", FIGURES)
        from mmfast.experiments.multimodal import pictures

        pictures.conflict(table, figure)


@report.command("table9")
def report_table9(out: Out = OUT) -> None:
    """Prints Table 9 of the paper, reconstruction coherence, with the recorded runs beside it, as markdown."""
    from mmfast.experiments.multimodal import page as pages
    from mmfast.experiments.multimodal import report as reports

    _, table = _recorded(out)
    print("\n\n".join(map(reports.table9, pages.parts(table))))


def _report_of(name: str, out: Path) -> str:
    return shlex.join(["mmfast", "report", name, "--out", str(out)])


def _recorded(out: Path) -> tuple[list["Result"], list["Cell"]]:
    """The runs of a folder and their cells; ends the command where there are none."""
    from mmfast.experiments.multimodal import report as reports
    from mmfast.experiments.multimodal.results import RECORD, read
    from mmfast.experiments.settings import SettingsError

    again = shlex.join(["mmfast", "train", "table5", "--out", str(out)])
    if not (out / RECORD).is_file():
        fail(f"there are no results in {out}: there is no {out / RECORD}; {again} makes it")
    try:
        found = read(out)
    except SettingsError as error:
        fail(str(error))
    table = reports.cells(found)
    if not table:
        fail(f"{out / RECORD} has no run without blocks; {again} adds what is missing")
    return found, table
