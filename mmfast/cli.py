"""The command line: mmfast demo, mmfast train, mmfast report, mmfast doctor."""

import sys
import time
from pathlib import Path
from typing import Annotated

try:
    import typer
except ModuleNotFoundError:
    print("mmfast: the command line needs typer: pip install 'mmfast[demo,train]'", file=sys.stderr)
    raise SystemExit(2) from None

from mmfast.console import fail, need
from mmfast.experiments import commands

BUILTIN = ("diabetes", "wine")
EXTRAS = {"rich": "rich", "sklearn": "scikit-learn", "matplotlib": "matplotlib"}

app = typer.Typer(
    help="Impartial multimodal training, in one fused pass.", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)
app.add_typer(commands.train, name="train")
app.add_typer(commands.report, name="report")


def _types(text: str) -> dict[str, str]:
    """From "age=count,sex=binary" to a dict."""
    pairs = [pair.split("=") for pair in text.split(",") if pair.strip()]
    for pair in pairs:
        if len(pair) != 2:
            fail(f"--types is {text!r}, expected column=kind pairs with commas between, such as age=count,sex=binary")
    return {name.strip(): kind.strip() for name, kind in pairs}


@app.command()
def demo(
    data: Annotated[
        str, typer.Option(help="diabetes, wine, or a CSV file (.csv, .csv.gz) whose first line names the columns.")
    ] = "diabetes",
    types: Annotated[str, typer.Option(help="Kinds that a CSV's columns have: col=real|positive|count|binary|categorical,...")] = "",
    rule: Annotated[str, typer.Option(help="The rule of the block, such as gradnorm, pcgrad, upgrad, imtlg.")] = "gradnorm",
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the training rows; by default about 8,000 steps' worth.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How often both trainings are repeated.")] = 3,
    out: Annotated[Path, typer.Option(help="Folder for the figure and the CSV files.")] = Path("mmfast-demo"),
    quick: Annotated[bool, typer.Option("--quick", help="A few steps only, to see that it works.")] = False,
) -> None:
    """Trains a small VAE on heterogeneous data without the block and with it, and shows what that changes."""
    need("the demo", "demo", EXTRAS)
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from mmfast.demo import data as tables
    from mmfast.demo import figure, report, run
    from mmfast.resolvers import resolver

    console = Console()
    started = time.perf_counter()
    try:
        rule = type(resolver(rule)).__name__
    except (ValueError, TypeError) as error:
        fail(f"--rule {rule}: {error}")
    try:
        if data in BUILTIN and types:
            fail("--types is for a CSV file; the kinds of the built-in data are known")
        if data not in BUILTIN and not Path(data).is_file():
            fail(f"--data is {data!r}, which is neither a file nor one of {', '.join(BUILTIN)}")
        table = tables.builtin(data) if data in BUILTIN else tables.read_csv(Path(data), _types(types))
        out.mkdir(parents=True, exist_ok=True)
    except tables.DataError as error:
        fail(str(error))
    except OSError as error:
        fail(f"--out {out} cannot be made: {error.strerror}")
    report.show_columns(console, table)
    settings = run.Settings(rule=rule, seeds=seeds, epochs=epochs)
    if quick:
        settings.steps, settings.timing_rounds, settings.timing_steps = 40, 2, 2
    columns = (
        TextColumn("{task.description:<14}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[remark]}"),
    )
    with Progress(*columns, console=console) as bars:
        tasks: dict[str, object] = {}

        def progress(name: str, done: int, total: int, remark: str) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(name, total=total, remark=remark)
            bars.update(tasks[name], completed=done, remark=remark)  # type: ignore[arg-type]

        result = run.run(table, settings, progress)
    report.show(console, result)
    if quick:
        console.print("\n[yellow]note:[/] --quick trains and times far too briefly for these numbers to mean anything")
    written = [figure.draw(result, out / "demo.png"), *report.write_csv(result, out)]
    console.print(
        f"\nWritten to {out}: {', '.join(path.name for path in written)}  ({time.perf_counter() - started:.0f} s in all)", highlight=False
    )


@app.command()
def doctor() -> None:
    """Prints what this installation can do, and why it cannot do the rest."""
    import torch

    import mmfast
    from mmfast.backends import library

    facts: dict[str, object] = {
        "mmfast": mmfast.__version__,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    for name, (available, reason) in mmfast.backends().items():
        facts[f"backend {name}"] = reason if available else f"not available: {reason}"
    facts["GPU"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "none that torch can use"
    facts |= {f"built {name}": value for name, value in library.read_facts(library.PATH).items() if value}
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:<{width}}  {value}")


def main() -> None:
    """The entry point."""
    app()


if __name__ == "__main__":
    main()
