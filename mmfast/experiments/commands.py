"""The commands mmfast train and mmfast report."""

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from mmfast.console import INTERRUPTED, Progress, fail, need

if TYPE_CHECKING:
    from mmfast.experiments.grid import Experiment

EXTRAS = {"rich": "rich", "scipy": "scipy"}
RULES = ["none", "GradNorm", "GradNorm(alpha=1.0)", "PCGrad", "IMTLG", "MGDA(cap=0.001)", "GradNorm+PCGrad"]

train = typer.Typer(help="Trains a reference model; `mmfast train table1` trains the grid of a table.", invoke_without_command=True)
report = typer.Typer(help="Shows what the runs of a grid came to.", invoke_without_command=True)

Out = Annotated[Path, typer.Option(help="Folder of the record of finished runs (runs.jsonl) and of the checkpoints.")]
OUT = Path("mmfast-runs")


@train.callback()
def train_one(
    context: typer.Context,
    model: Annotated[str, typer.Option(help="elbo, iwae, dreg (the VAE with that objective) or hivae.")] = "elbo",
    data: Annotated[
        str, typer.Option(help="Adult, Credit, Wine, Diamonds, Bank, IMDB, HI, rwm5yr, labour, ElNino, Magic, BooNE.")
    ] = "Wine",
    rule: Annotated[str, typer.Option(help="none, or a rule such as PCGrad, 'GradNorm(alpha=1.0)', GradNorm+PCGrad.")] = "GradNorm",
    seed: Annotated[int, typer.Option(min=0, help="Of the split, the first weights, the batches and the noise.")] = 0,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training rows; the paper's number by default.")] = None,
    batch: Annotated[int | None, typer.Option(help="Rows of a step; 128, or 1000 for HI-VAE, by default.")] = None,
    samples: Annotated[int | None, typer.Option(help="Of z per row, for iwae and dreg; 20 by default.")] = None,
    out: Out = OUT,
) -> None:
    """Trains one model on one data set with one rule and records its errors (not its weights); killed and called again, it goes on where it was."""
    if context.invoked_subcommand is not None:
        _refuse_options_before(context)
        return
    need("training", "train", EXTRAS)
    from mmfast.data import DataError
    from mmfast.experiments import grid, results
    from mmfast.experiments.memory import keep_memory
    from mmfast.experiments.settings import SettingsError, settings

    keep_memory()
    try:
        run = settings(model, data, rule, seed, epochs, batch, samples)
        if any(found.settings == run for found in results.read(out / grid.RECORD)):
            print(f"this run is finished already, nothing was trained; another --seed or --out makes a new one. {out / grid.RECORD} says:")
        with Progress() as progress:
            result = grid.one(run, out, lambda done, remark: progress(f"{model} {data} {run.rule}", done, run.epochs, remark))
    except (SettingsError, DataError) as error:
        fail(str(error))
    except KeyboardInterrupt:
        kept = grid.checkpoint_of(out, run).exists()
        _stopped("goes on from its last checkpoint" if kept else "starts over, for nothing was saved yet", _again(context, "mmfast train"))
    width = max(map(len, ["mean", *result.test_errors]))
    for feature, value in {**result.test_errors, "mean": result.test_error}.items():
        print(f"{feature:<{width}}  {'none' if value is None else f'{value:.4f}'}")
    print(
        f"test errors at epoch {result.best_epoch}, {result.step_us / 1e3:.2f} ms per step, {result.plain_step_us / 1e3:.2f} without a block"
    )
    if result.epochs_done < run.epochs:
        print(f"the parameters became NaN in epoch {result.epochs_done} of {run.epochs}")
    print(f"recorded in {out / grid.RECORD}")


@train.command("table1")
def train_table1(
    context: typer.Context,
    model: Annotated[list[str] | None, typer.Option(help="elbo, iwae, dreg, hivae; repeatable, all by default.")] = None,
    data: Annotated[list[str] | None, typer.Option(help="A data set; repeatable, all that are here by default.")] = None,
    rule: Annotated[list[str] | None, typer.Option(help=f"A rule; repeatable, {', '.join(RULES)} by default.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many, from 0 on.")] = 5,
    epochs: Annotated[int | None, typer.Option(help="The paper's number by default.")] = None,
    processes: Annotated[int | None, typer.Option(min=1, help="Runs at once; one per processor by default.")] = None,
    out: Out = OUT,
) -> None:
    """Trains the grid of Table 1 (Javaloy et al., ICML 2022); killed and called again, it goes on where it was."""
    need("training", "train", EXTRAS)
    from mmfast.data import DataError, check
    from mmfast.experiments import grid
    from mmfast.experiments.settings import MODELS, SettingsError

    try:
        runs = grid.table1(model or list(MODELS), data or _here(), rule or RULES, seeds, epochs)
        finished = grid.recorded(out)
        for name in dict.fromkeys(run.data for run in runs if run not in finished):
            check(name)
    except (SettingsError, DataError) as error:
        fail(str(error))
    found, wrong = train_grid(context, "mmfast train table1", runs, out, processes, grid.TABLE1)
    print(f"{len(found)} of {len(runs)} runs are recorded in {out / grid.RECORD}; mmfast report table1 --out {out} shows them")
    failed_at_the_end(wrong)


def train_grid(
    context: typer.Context, command: str, runs: Sequence[Any], out: Path, processes: int | None, experiment: "Experiment"
) -> tuple[list[Any], list[tuple[Any, str]]]:
    """Trains what the record lacks, with progress; returns the results, and the runs that failed with what they said."""
    from mmfast.experiments import grid
    from mmfast.experiments.settings import SettingsError

    try:
        finished = grid.recorded(out, experiment).keys() & set(runs)
    except SettingsError as error:
        fail(str(error))
    if len(finished) == len(runs):
        print("every run is finished already, nothing was trained")
    wrong: list[tuple[Any, str]] = []
    with Progress() as shown:
        share = {run: float(run in finished) for run in runs}

        def progress(run: Any, done: float, remark: str) -> None:
            share[run] = done / run.epochs
            shown(run.label, done, run.epochs, remark, keep=False)
            shown(f"{len(runs)} runs", sum(share.values()), len(runs))

        def failed(run: Any, reason: str) -> None:
            wrong.append((run, reason))
            progress(run, run.epochs, "failed")
            print(f"{run.name} failed: {reason.strip().splitlines()[-1]}")

        try:
            found = grid.many(runs, out, processes or os.cpu_count() or 1, progress, failed, experiment)
        except SettingsError as error:
            fail(str(error))
        except KeyboardInterrupt:
            recorded = len(grid.recorded(out, experiment).keys() & set(runs))
            _stopped(f"goes on from there: {recorded} of {len(runs)} runs are recorded", _again(context, command))
    return found, wrong


def failed_at_the_end(wrong: Sequence[tuple[Any, str]]) -> None:
    """Ends the command where runs failed, with what the first said."""
    if wrong:
        print(f"\n{wrong[0][0].name}:\n{wrong[0][1]}")
        raise typer.Exit(1)


def _again(context: typer.Context, command: str) -> str:
    """The command line that was given, to be given once more."""
    words = command.split()
    for name, value in context.params.items():
        if _given(context, name):
            words += [word for one in (value if isinstance(value, list) else [value]) for word in (f"--{name}", str(one))]
    return shlex.join(words)


def _given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _refuse_options_before(context: typer.Context) -> None:
    """Options that stand before a subcommand would be read as another command's."""
    if given := [name for name in context.params if _given(context, name)]:
        fail(f"--{given[0]} stands before {context.invoked_subcommand}; put the options of {context.invoked_subcommand} behind it")


def _stopped(what: str, command: str) -> NoReturn:
    fail(f"stopped; the same command {what}:\n  {command}", INTERRUPTED)


@report.callback()
def report_what(context: typer.Context, out: Out = OUT) -> None:
    """Shows what the runs of a grid came to."""
    if context.invoked_subcommand is None:
        fail(f"report needs the name of a table: {_again(context, 'mmfast report table1')}")
    _refuse_options_before(context)


@report.command("table1")
def report_table1(
    out: Out = OUT,
    page: Annotated[
        list[Path] | None,
        typer.Option(
            help="A file to write in: what stands between <!-- mmfast report table1: page --> (or: table, summary) and <!-- end of mmfast report table1 -->. Repeatable."
        ),
    ] = None,
    missing: Annotated[bool, typer.Option("--missing", help="Says instead which runs the record lacks, and what they would cost.")] = False,
) -> None:
    """Prints Table 1 of the paper with the recorded runs beside it, as markdown, or writes what it says into files."""
    need("the report", "train", EXTRAS)
    from mmfast.experiments import grid, results
    from mmfast.experiments.missing import table as lacking
    from mmfast.experiments.page import write
    from mmfast.experiments.report import cells
    from mmfast.experiments.settings import SettingsError
    from mmfast.experiments.tables import markdown

    record = out / grid.RECORD
    if not record.is_file():
        fail(
            f"there are no results in {out}: there is no {record}; {shlex.join(['mmfast', 'train', 'table1', '--out', str(out)])} makes it"
        )
    try:
        found = results.read(record)
        if missing:
            print(lacking(found))
            return
        table = cells(found)
        if not table:
            fail(
                f"{record} has no model and data set with a run without a block and one with a rule; "
                f"{shlex.join(['mmfast', 'train', '--rule', 'none', '--out', str(out)])} adds one without (and --model, --data, --seed, --epochs, --batch and --samples as in the others)"
            )
        for path in page or []:
            write(path, found)
            print(f"written into {path}")
    except SettingsError as error:
        fail(str(error))
    if not page:
        print(markdown(table))


def _here() -> Sequence[str]:
    """The data sets whose files are on this machine."""
    from mmfast import data
    from mmfast.data.files import find, folders

    found = [name for name, entry in data.SETS.items() if find(entry.file)]
    others = [name for name in data.names() if name not in found]
    if not found:
        fail(
            f"no data set is in {' or '.join(map(str, folders()))}; name a folder with them in MMFAST_DATA, or one to be downloaded: --data Wine"
        )
    if others:
        print(f"not here, and left out: {', '.join(others)}; --data NAME downloads one that can be")
    return found
