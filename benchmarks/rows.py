"""The one schema of every benchmark row, and the CSV files of a run."""

import csv
import dataclasses
from dataclasses import dataclass
from pathlib import Path

from benchmarks.timing import Timing

RESULTS = Path(__file__).parent / "results"


@dataclass
class Row:
    """One timed call, or the reason why there is no number; empty fields do not apply."""

    section: str  # machine, grid, gram, latency, block, heads, parameters, attach, likelihoods, together, multimodal, compile
    rule: str
    k: int
    n: int
    provider: str
    dtype: str = "float32"
    data_in: str = ""  # the cache that holds the K x N data between calls, or memory
    median_us: float | None = None
    p20_us: float | None = None
    p80_us: float | None = None
    runs: int = 0
    ratio_to_ours: float | None = None  # this provider's time / ours, timed side by side
    gbps: float | None = None  # of the bytes that the operator must move
    gflops: float | None = None
    percent_of_roofline: float | None = None
    peak_mb: float | None = None  # of what a call has alive at once
    error: float | None = None  # relative to the float64 reference
    verdict: str = ""  # aim, must, below (against the design's targets); wrong (red gate, no times); or why there is no number

    def timed(self, timing: Timing) -> "Row":
        self.median_us, self.p20_us, self.p80_us, self.runs = timing.median, timing.p20, timing.p80, timing.runs
        return self


FIELDS = [f.name for f in dataclasses.fields(Row)]


def write(rows: list[Row], env: dict[str, str], path: Path) -> None:
    def cell(value: object) -> object:
        return "" if value is None else f"{value:.4g}" if isinstance(value, float) else value

    with path.open("w", newline="") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow([*FIELDS, *env])
        out.writerows([*(cell(getattr(row, name)) for name in FIELDS), *env.values()] for row in rows)


def read(path: Path) -> tuple[list[Row], dict[str, str]]:
    rows, env = [], {}
    with path.open(newline="") as file:
        for line in csv.DictReader(file):
            values: dict[str, object] = {}
            for f in dataclasses.fields(Row):
                text = line.pop(f.name, "")  # a column may be younger than the file
                values[f.name] = int(text) if f.type is int else text if f.type is str else float(text) if text else None
            rows.append(Row(**values))  # type: ignore[arg-type]
            env = line
    return rows, env


def newest() -> Path | None:
    """The CSV of the latest full run."""
    return max(RESULTS.glob("*.csv"), key=lambda path: path.stat().st_mtime, default=None)
