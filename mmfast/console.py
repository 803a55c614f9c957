"""What the commands share: how they fail, and what they need."""

import importlib.util
import sys
from typing import NoReturn

import typer


def fail(message: str) -> NoReturn:
    """Ends the command with an error."""
    print(f"mmfast: {message}", file=sys.stderr)
    raise typer.Exit(2)


def need(command: str, extra: str, packages: dict[str, str]) -> None:
    """Fails where one of these modules (name on import -> name on install) is missing."""
    missing = [package for module, package in packages.items() if importlib.util.find_spec(module) is None]
    if missing:
        fail(f"{command} needs {', '.join(missing)}: pip install 'mmfast[{extra}]'")
