"""The command line: mmfast demo, mmfast train, mmfast report, mmfast doctor.

Help, version and doctor need the standard library alone; the other commands import what they need once they are called.
"""

import functools
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

from mmfast import __version__
from mmfast.console import fail, missing

COMMANDS = {
    "demo": "Trains a small VAE without the block and with it, and shows what that changes.",
    "train": "Trains a reference model; mmfast train table1 trains the grid of a table.",
    "report": "Shows what the runs of a grid came to: mmfast report table1.",
    "doctor": "Prints what this installation can do, and why it cannot do the rest.",
}
EXTRAS = {
    "demo": {"typer": "typer", "rich": "rich", "sklearn": "scikit-learn", "matplotlib": "matplotlib"},
    "train": {"typer": "typer", "rich": "rich", "scipy": "scipy"},
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


def doctor() -> None:
    """Prints what this installation can do, and why it cannot do the rest."""
    facts = {"mmfast": __version__, "python": sys.version.split()[0]} | _torch_facts()
    for extra, packages in EXTRAS.items():
        lacking = ", ".join(missing(packages))
        facts[f"mmfast {extra}"] = f"not available: needs {lacking}; pip install 'mmfast[{extra}]'" if lacking else "available"
    facts |= {f"built {name}": value for name, value in _build_facts().items() if value}
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:<{width}}  {value}")


def _torch_facts() -> dict[str, Any]:
    """What torch and the backends say of themselves, or why torch cannot be asked."""
    cure = "mmfast computes nothing without it; pip install 'torch>=2.10'"
    if missing({"torch": "torch"}):
        return {"torch": f"not installed: {cure}"}
    try:
        import torch

        from mmfast.backends.choice import backends
    except Exception as error:  # noqa: BLE001 whatever a broken torch dies of, the person must be told
        return {"torch": f"does not load ({type(error).__name__}: {error}): {cure}"}
    facts: dict[str, Any] = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    for name, (available, reason) in backends().items():
        facts[f"backend {name}"] = reason if available else f"not available: {reason}"
    return facts | {"GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else "none that torch can use"}


def _build_facts() -> dict[str, Any]:
    """What the build wrote down; read here, for the module that knows the library loads torch."""
    library = os.environ.get("MMFAST_LIBRARY")
    folder = Path(library).parent if library else Path(__file__).parent
    try:
        return json.loads((folder / "_build.json").read_text())
    except (OSError, ValueError):
        return {}


@functools.cache
def make_app() -> Any:
    """The commands as a typer application."""
    import typer

    from mmfast.demo.command import demo
    from mmfast.experiments.commands import report, train

    app = typer.Typer(help="Impartial multimodal training, in one fused pass.", add_completion=False, pretty_exceptions_enable=False)
    app.command()(demo)
    app.add_typer(train, name="train")
    app.add_typer(report, name="report")
    app.command()(doctor)
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
        _doctor(sys.argv[2:])
    elif command not in COMMANDS:
        fail(f"there is no command {command!r}; there are {', '.join(COMMANDS)}")
    else:
        extra = "demo" if command == "demo" else "train"
        if lacking := missing({"torch": "torch"} | EXTRAS[extra]):
            fail(f"mmfast {command} needs {', '.join(lacking)}: pip install 'mmfast[{extra}]'")
        # several runs share the cores: threads that wait must not spin. OpenMP reads it once, when torch is loaded
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        make_app()()


def _doctor(arguments: list[str]) -> None:
    if arguments in (["--help"], ["-h"]):
        print(f"Usage: mmfast doctor\n\n{COMMANDS['doctor']}")
    elif arguments:
        fail(f"doctor takes no arguments, got {' '.join(arguments)}")
    else:
        doctor()


if __name__ == "__main__":
    main()
