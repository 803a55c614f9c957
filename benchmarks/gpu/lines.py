"""A line of gpu.csv: one timed call, or why there is no number."""

import csv
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from benchmarks.timing import Timing


@dataclass(frozen=True)
class Line:
    """Empty fields do not apply; times are microseconds."""

    section: str  # what it is measured for: a row of the design (beyond, on chip, small, step), rivals, grid, plain
    what: str
    k: int = 0
    n: int = 0
    dtype: str = ""
    way: str = ""  # cold, eager or graph: device.py
    path: str = ""
    median_us: float | None = None
    p20_us: float | None = None
    p80_us: float | None = None
    predicted_us: float | None = None
    kernels: int | None = None  # of one call, counted in the captured graph
    planned_kernels: int | None = None
    floor_bytes: int = 0  # each gradient read once, one result written
    path_bytes: int = 0  # that the path moves
    error: float | None = None  # of the Gramian, relative to the lengths of its rows
    note: str = ""

    def timed(self, timing: Timing) -> "Line":
        return dataclasses.replace(self, median_us=timing.median, p20_us=timing.p20, p80_us=timing.p80)

    def predicted(self) -> "Line":
        """What this line would say if the prediction were right."""
        return dataclasses.replace(self, median_us=self.predicted_us, kernels=self.planned_kernels)


FIELDS = dataclasses.fields(Line)


class Writer:
    """Writes each line at once, so that a run that is cut off leaves what it had."""

    def __init__(self, file: IO[str], env: dict[str, str]) -> None:
        self.file, self.env, self.out = file, env, csv.writer(file, lineterminator="\n")
        self._write([f.name for f in FIELDS] + list(env))

    def _write(self, cells: Sequence[object]) -> None:
        self.out.writerow(cells)
        self.file.flush()

    def add(self, line: Line) -> None:
        values = (getattr(line, f.name) for f in FIELDS)
        self._write(["" if v is None else f"{v:.4g}" if isinstance(v, float) else v for v in values] + list(self.env.values()))
        if line.median_us is not None or line.note:
            where = f" K={line.k} N={line.n} {line.dtype}" if line.k else ""
            result = line.note or f"{line.median_us:.4g} us"
            print(f"{line.section}: {line.what}{where} {line.way} {line.path}: {result}", flush=True)


def read(path: Path) -> tuple[list[Line], dict[str, str]]:
    """(lines, environment); a last line that was cut off is left out."""
    lines, env = [], {}
    with path.open(newline="") as file:
        for cells in csv.DictReader(file):
            if None in cells.values():
                continue
            values: dict[str, object] = {}
            for f in FIELDS:
                text = cells.pop(f.name)
                kind = str if f.type is str else int if "int" in str(f.type) else float
                values[f.name] = text if kind is str else None if text == "" else kind(text)
            lines.append(Line(**values))  # type: ignore[arg-type]
            env = cells
    return lines, env
