"""The command line: mmfast demo, mmfast train, mmfast report, mmfast plot, mmfast doctor.

Help, version and doctor need the standard library alone, plot matplotlib besides; the other commands import what they need once they are called.
"""

import functools
import os
import sys
import warnings
from typing import Any

from mmfast import __version__
from mmfast.console import fail, missing
from mmfast.doctor import EXTRAS, doctor
from mmfast.plots.command import plot

COMMANDS = {
    "demo": "Trains a small VAE without the block and with it, and shows what that changes.",
    "train": "Trains a reference model; mmfast train table1 (table5, collapse) trains the grid of a table.",
    "report": "Shows what the runs of a grid came to: mmfast report table1 (table5, table9, collapse).",
    "plot": "Draws what an mmfast.Monitor wrote: mmfast plot run.csv; with --html as one page for a browser.",
    "doctor": "Prints what this installation can do, and why it cannot do the rest; --check tests its kernels on this device.",
}
HELP = "\n".join(
    [
        "Usage: mmfast COMMAND [OPTIONS]",
        "",
        "Impartial multimodal training, in one fused pass.",
        "",
        *(f"  {name:<8} {text}" for name, text in COMMANDS.items()),
        "",
        "mmfast COMMAND --help shows a command's options, mmfast --version the version.",
    ]
)


@functools.cache
def make_app() -> Any:
    """The commands as a typer application."""
    import typer

    from mmfast.demo.command import demo
    from mmfast.experiments.collapse import commands as of_collapse  # noqa: F401 adds collapse to these
    from mmfast.experiments.commands import report, train
    from mmfast.experiments.multimodal import commands  # noqa: F401 adds table5 and table9 to these

    app = typer.Typer(help="Impartial multimodal training, in one fused pass.", add_completion=False, pretty_exceptions_enable=False)
    app.command()(demo)
    app.add_typer(train, name="train")
    app.add_typer(report, name="report")
    return app


def __getattr__(name: str) -> Any:
    if name == "app":
        return make_app()
    raise AttributeError(name)


def main() -> None:
    """The entry point."""
    # torch says so whenever numpy is missing, which no command minds that runs without it
    warnings.filterwarnings("ignore", "Failed to initialize NumPy")
    command = sys.argv[1] if len(sys.argv) > 1 else None
    if command in (None, "--help", "-h"):
        print(HELP)
        raise SystemExit(2 if command is None else 0)
    if command == "--version":
        print(f"mmfast {__version__}")
    elif command == "doctor":
        doctor(sys.argv[2:])
    elif command == "plot":
        plot(sys.argv[2:])
    elif command not in COMMANDS:
        fail(f"there is no command {command!r}; there are {', '.join(COMMANDS)}")
    else:
        extra = "demo" if command == "demo" else "train"
        if lacking := missing({"torch": "torch"} | EXTRAS[extra]):
            fail(f"mmfast {command} needs {', '.join(lacking)}: pip install 'mmfast[{extra}]'")
        # several runs share the cores: threads that wait must not spin. OpenMP reads it once, when torch is loaded
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        make_app()()


if __name__ == "__main__":
    main()
