"""The commands mmfast train and mmfast report."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from mmfast.console import fail, need

EXTRAS = {"rich": "rich", "scipy": "scipy"}
RULES = ["none", "GradNorm", "PCGrad", "MGDA", "IMTLG", "GradNorm(alpha=1.0)", "GradNorm+PCGrad", "GradNorm(alpha=1.0)+PCGrad"]

train = typer.Typer(help="Trains a reference model; `mmfast train table1` trains the grid of a table.", invoke_without_command=True)
report = typer.Typer(help="Shows what the runs of a grid came to.", no_args_is_help=True)

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
        given = [name for name in context.params if context.get_parameter_source(name).name == "COMMANDLINE"]  # type: ignore[union-attr]
        if given:
            fail(f"--{given[0]} stands before {context.invoked_subcommand}; put the options of {context.invoked_subcommand} behind it")
        return
    need("training", "train", EXTRAS)
    from mmfast.data import DataError
    from mmfast.experiments import grid
    from mmfast.experiments.settings import SettingsError, settings

    try:
        run = settings(model, data, rule, seed, epochs, batch, samples)
        with _bars() as bars:
            task = bars.add_task(f"{model} {data} {run.rule}", total=run.epochs, remark="")
            result = grid.one(run, out, lambda done, remark: bars.update(task, completed=done, remark=remark))
    except (SettingsError, DataError) as error:
        fail(str(error))
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
    from mmfast.experiments import grid, results
    from mmfast.experiments.settings import MODELS, Settings, SettingsError

    try:
        runs = grid.table1(model or list(MODELS), data or _here(), rule or RULES, seeds, epochs)
        finished = {found.settings for found in results.read(out / grid.RECORD)}.intersection(runs)
        for name in dict.fromkeys(run.data for run in runs if run not in finished):
            check(name)
    except (SettingsError, DataError) as error:
        fail(str(error))
    wrong: list[tuple[Settings, str]] = []
    with _bars() as bars:
        everything = bars.add_task(f"{len(runs)} runs", total=len(runs), completed=len(finished), remark="")
        share = {run: float(run in finished) for run in runs}
        lines: dict[Settings, object] = {}

        def progress(run: Settings, done: int, remark: str) -> None:
            share[run] = done / run.epochs
            bars.update(everything, completed=sum(share.values()))
            if done < run.epochs and run not in lines:
                lines[run] = bars.add_task(f"{run.model} {run.data} {run.rule} {run.seed}", total=run.epochs, remark="")
            if run in lines:
                bars.update(lines[run], completed=done, remark=remark, visible=done < run.epochs)  # type: ignore[arg-type]

        def failed(run: Settings, reason: str) -> None:
            wrong.append((run, reason))
            progress(run, run.epochs, "")
            bars.console.print(f"{run.name} failed: {reason.strip().splitlines()[-1]}", style="red", markup=False)

        try:
            found = grid.many(runs, out, processes or os.cpu_count() or 1, progress, failed)
        except SettingsError as error:
            fail(str(error))
    print(f"{len(found)} of {len(runs)} runs are recorded in {out / grid.RECORD}; mmfast report table1 --out {out} shows them")
    if wrong:
        print(f"\n{wrong[0][0].name}:\n{wrong[0][1]}")
        raise typer.Exit(1)


@report.command("table1")
def report_table1(out: Out = OUT) -> None:
    """Prints Table 1 of the paper with the recorded runs beside it, as markdown."""
    need("the report", "train", EXTRAS)
    from mmfast.experiments import grid, results
    from mmfast.experiments.report import cells, markdown
    from mmfast.experiments.settings import SettingsError

    record = out / grid.RECORD
    if not record.is_file():
        fail(f"there is no {record}; mmfast train table1 --out {out} makes it")
    try:
        table = cells(results.read(record))
    except SettingsError as error:
        fail(str(error))
    if not table:
        fail(f"{record} has no model and data set with a run without a block and one with a rule")
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


def _bars():  # type: ignore[no-untyped-def]
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description:<28}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(elapsed_when_finished=False),
        TextColumn("{task.fields[remark]}"),
    )
