"""Where rows go: a CSV file, TensorBoard, or a function."""

import csv
import io
import os
from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

import torch

Row = tuple[int, Sequence[float]]  # a step, and a value for each column
Sink = Callable[[list[Row]], object]
MOST_PAIRS = 28  # of a block, whose cosines TensorBoard shows one by one: those of eight branches; more are a histogram


class CsvFile:
    """Appends rows to a file; one that is there already goes on."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.path, self.columns = path, columns
        self.last: int | None = None  # step in the file
        self.first = (
            0  # step of this run: rows from there on are of a run that was killed behind the checkpoint from which this one goes on
        )
        self._begun = False
        self._size = 0  # of its whole lines
        header = _line(["step", *columns])
        if path.is_file() and path.stat().st_size:
            with path.open("rb") as file:
                first = file.readline()
                if first != header:
                    raise ValueError(
                        f"to is {str(path)!r}, a file with other columns than the blocks of this model have ({_difference(first, header)}); "
                        "delete or rename it, or give another path"
                    )
                self._size = len(first)
                for line in file:
                    if line.endswith(b"\n"):
                        self._size += len(line)
                        self.last = _step(line)
        self._header = header
        self._format = b"%d" + b",%.6g" * len(columns) + b"\n"  # in one go: fifty branches have 1,326 columns

    def __call__(self, rows: list[Row]) -> None:
        if not self._begun:
            self._begin()
        with self.path.open("ab", buffering=0) as file:
            file.write(b"".join(self._format % (step, *values) for step, values in rows))

    def _begin(self) -> None:
        """Makes the file, or takes out of it half a line at its end and rows that are to come again."""
        if not self._size:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_bytes(self._header)
        elif self.path.exists():
            size = self._size
            if self.last is not None and self.last >= self.first:
                with self.path.open("rb") as file:
                    size = len(file.readline())
                    for line in file:
                        if not line.endswith(b"\n") or _step(line) >= self.first:
                            break
                        size += len(line)
            os.truncate(self.path, size)
        self._begun = True


def _line(cells: Sequence[object]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue().encode()


def _step(line: bytes) -> int:
    return int(line.split(b",", 1)[0])


def _difference(first: bytes, header: bytes) -> str:
    """The first column that differs, in words."""
    theirs, ours = (next(csv.reader([line.decode(errors="replace")]), []) for line in (first, header))
    for n, (a, b) in enumerate(zip(theirs, ours, strict=False)):
        if a != b:
            return f"column {n + 1} is {a!r}, expected {b!r}"
    return f"{len(theirs)} columns, expected {len(ours)}"


def function(call: Callable[[int, dict[str, float]], object], columns: Sequence[str]) -> Sink:
    """A function of the step and of the values by name."""

    def write(rows: list[Row]) -> None:
        for step, values in rows:
            call(step, dict(zip(columns, values, strict=True)))

    return write


def tensorboard(writer: Any, columns: Sequence[str], groups: Mapping[str, Sequence[str]]) -> Sink:
    """Scalars by add_scalar; the columns of a group, which are too many for that, by add_histogram."""
    grouped = {column for group in groups.values() for column in group}

    def write(rows: list[Row]) -> None:
        for step, values in rows:
            named = dict(zip(columns, values, strict=True))
            for column, value in named.items():
                if column not in grouped:
                    writer.add_scalar(column, value, step)
            for name, group in groups.items():
                if finite := [named[column] for column in group if isfinite(named[column])]:
                    writer.add_histogram(name, torch.tensor(finite), step)

    return write
