"""The record of finished runs: a file with one JSON line each, which grows and is never rewritten."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmfast.data import SETS
from mmfast.experiments.settings import MODELS, Settings, SettingsError

REVISION = 2  # of what a run computes; runs that lack it are of 1: times of the wall clock, and HI-VAE with the biased divergence of s


@dataclass
class Result:
    """What one run came to, at the epoch with the best validation likelihood; None where no epoch had a finite one."""

    settings: Settings
    epochs_done: int  # fewer than asked for where the parameters became NaN
    best_epoch: int | None
    validation_log_likelihood: float | None  # mean over features, in the model's units
    validation_error: float | None  # mean over features
    test_error: float | None  # mean over features
    test_errors: dict[str, float | None]  # of each feature; None for one that has no error, see `prepare.errors`
    step_us: float  # one training step, of the thread's processor time
    plain_step_us: float  # one of the same model without a block, timed in turn with it
    versions: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, values: dict[str, Any]) -> "Result":
        """From what a line holds."""
        result = cls(**{**values, "settings": Settings(**values["settings"])})
        if result.settings.model not in MODELS or result.settings.data not in SETS:
            raise SettingsError(f"there is no model {result.settings.model!r} on {result.settings.data!r}")
        return result

    @property
    def revision(self) -> int:
        """Of the code that made it, see `REVISION`."""
        return int(self.versions.get("revision", 1))

    @property
    def outdated(self) -> bool:
        """Whether the code of today would come to other errors."""
        return self.revision < 2 and self.settings.model == "hivae"

    def line(self) -> str:
        """Its JSON line."""
        values = {**vars(self), "settings": vars(self.settings)}
        return json.dumps(values, allow_nan=False) + "\n"


def revision_of(checkpoint: dict[str, Any]) -> int:
    """Of the code that wrote a checkpoint: what another one began is not gone on with, for it would be recorded as today's; those that lack it are of 2."""
    return int(checkpoint.get("revision", 2))


def append(path: Path, *results: Any) -> None:
    """Adds runs to the record: in one write, on lines of their own even where an earlier writer was cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+", buffering=0) as f:
        f.seek(0, os.SEEK_END)
        if f.tell():
            f.seek(-1, os.SEEK_END)
        torn = bool(last := f.read(1)) and last != b"\n"
        lines = (b"\n" if torn else b"") + "".join(result.line() for result in results).encode()
        written = f.write(lines)
        if written != len(lines):
            raise OSError(f"{path}: only {written} of {len(lines)} bytes could be written; is the disk full?")
        os.fsync(f.fileno())


def read(path: Path, result_of: Callable[[dict[str, Any]], Any] = Result.of) -> list[Any]:
    """All runs of a record, the first of each kind; a line that was cut off is left out.

    Args:
        path: of the record.
        result_of: makes a result of what a line holds.

    Raises:
        SettingsError: a whole line that is not a run.
    """
    if not path.exists():
        return []
    found: dict[Any, Any] = {}
    try:
        lines = path.read_text().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} cannot be read: {error}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            values: dict[str, Any] = json.loads(line)
        except ValueError:
            continue  # cut off: the run was not finished then and has a line of its own by now, or will be run again
        try:
            result = result_of(values)
        except (KeyError, TypeError):
            raise SettingsError(f"{path}, line {number}: not the record of a run") from None
        except SettingsError as error:
            raise SettingsError(f"{path}, line {number}: {error}") from None
        found.setdefault(result.settings, result)
    return list(found.values())
