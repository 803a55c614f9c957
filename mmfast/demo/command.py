"""The command mmfast demo."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmfast.console import INTERRUPTED, Progress, fail, need

if TYPE_CHECKING:
    from mmfast.data.table import Table

BUILTIN = ("diabetes", "wine")
EXTRAS = {"rich": "rich", "sklearn": "scikit-learn", "matplotlib": "matplotlib"}


def _types(text: str) -> dict[str, str]:
    """From "age=count,sex=binary" to a dict."""
    pairs = [pair.split("=") for pair in text.split(",") if pair.strip()]
    for pair in pairs:
        if len(pair) != 2:
            fail(f"--types is {text!r}, expected column=kind pairs with commas between, such as age=count,sex=binary")
    return {name.strip(): kind.strip() for name, kind in pairs}


def _table(data: str, types: str, encoding: str, header: bool | None) -> "Table":
    from mmfast.demo import data as tables

    if data in BUILTIN:
        options = {"--types": types, "--encoding": encoding, "--header": header is not None}
        if given := [name for name, value in options.items() if value]:
            fail(f"{given[0]} is for a CSV file; the built-in data are known")
        return tables.builtin(data)
    if not Path(data).is_file():
        fail(f"--data is {data!r}, which is neither a file nor one of {', '.join(BUILTIN)}")
    try:
        return tables.read_csv(Path(data), _types(types), encoding or "utf-8", header)
    except tables.DataError as error:
        fail(str(error))


def demo(
    data: Annotated[
        str, typer.Option(help="diabetes, wine, or a CSV file (.csv, .csv.gz; comma, semicolon, tab or | between the cells).")
    ] = "diabetes",
    types: Annotated[str, typer.Option(help="Kinds that a CSV's columns have: col=real|positive|count|binary|categorical,...")] = "",
    encoding: Annotated[str, typer.Option(help="Of a CSV file, such as latin-1 or utf-16; UTF-8 by default.")] = "",
    header: Annotated[
        bool | None, typer.Option("--header/--no-header", help="Whether a CSV's first line names the columns; found out by default.")
    ] = None,
    rule: Annotated[str, typer.Option(help="The rule of the block, such as gradnorm, pcgrad, upgrad, imtlg.")] = "gradnorm",
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the training rows; by default about 8,000 steps' worth.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How often both trainings are repeated.")] = 3,
    out: Annotated[Path, typer.Option(help="Folder for the figure and the CSV files.")] = Path("mmfast-demo"),
    quick: Annotated[bool, typer.Option("--quick", help="A few steps only, to see that it works.")] = False,
) -> None:
    """Trains a small VAE on heterogeneous data without the block and with it, and shows what that changes."""
    need("the demo", "demo", EXTRAS)
    from rich.console import Console

    from mmfast.demo import figure, report, run
    from mmfast.experiments.memory import keep_memory
    from mmfast.resolvers import resolver

    keep_memory()
    console = Console()
    started = time.perf_counter()
    try:
        rule = type(resolver(rule)).__name__
    except (ValueError, TypeError) as error:
        fail(f"--rule {rule}: {error}")
    table = _table(data, types, encoding, header)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--out {out} cannot be made: {error.strerror}")
    report.show_columns(console, table)
    settings = run.Settings(rule=rule, seeds=seeds, epochs=epochs)
    if quick:
        settings.steps, settings.timing_rounds, settings.timing_steps, settings.quick = 40, 2, 2, True
    try:
        with Progress() as progress:
            result = run.run(table, settings, progress)
    except KeyboardInterrupt:
        fail("stopped; nothing was written", INTERRUPTED)
    if quick:
        console.print(
            f"\n[yellow]note:[/] --quick trains {settings.steps} steps in place of {run.Settings.steps:,}, and times far too briefly: "
            "no number below means anything, huge errors among them"
        )
    report.show(console, result)
    written = [figure.draw(result, out / "demo.png"), *report.write_csv(result, out)]
    console.print(
        f"\nWritten to {out}: {', '.join(path.name for path in written)}  ({time.perf_counter() - started:.0f} s in all)",
        highlight=False,
        markup=False,
    )
