"""The file where runs keep their state: written in one move, and taken up by those very runs alone."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from mmfast.experiments.settings import SettingsError


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Replaces a checkpoint in one move: a kill leaves the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = part_of(path)
    try:
        with part.open("wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)  # what Ctrl-C or a full disk left


def part_of(checkpoint: Path) -> Path:
    """Where a checkpoint is written before it takes its place."""
    return checkpoint.with_suffix(".part")


@contextlib.contextmanager
def taken_up(path: Path, settings: object, whose: str = "this run") -> Iterator[dict[str, Any] | None]:
    """What was written, for the time in which it is taken up; None where there is nothing, or it has other `"settings"`.

    Raises:
        SettingsError: it cannot be read, or what is done with it fails, for the model has changed since.
    """
    if not path.exists():
        yield None
        return
    try:
        saved = torch.load(path)
        yield saved if saved["settings"] == settings else None
    except Exception as error:  # a file that is not a checkpoint fails in many ways
        reason = str(error).partition("\n")[0]
        raise SettingsError(f"{path} cannot be taken up ({reason}); delete it to start {whose} over") from error
