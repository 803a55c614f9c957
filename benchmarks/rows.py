"""The one schema of every benchmark row, and the CSV files of a run."""

import csv
import dataclasses
import datetime
import importlib.metadata
import os
import platform
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from benchmarks.timing import Timing

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"


@dataclass
class Row:
    """One timed call, or the reason why there is no number; empty fields do not apply."""

    section: str  # machine, grid, gram, latency, block
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
    error: float | None = None  # relative to the float64 reference
    verdict: str = ""  # aim, must, below (against the design's targets); wrong (red gate, no times); or why there is no number

    def timed(self, timing: Timing) -> "Row":
        self.median_us, self.p20_us, self.p80_us, self.runs = timing.median, timing.p20, timing.p80, timing.runs
        return self


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


@cache
def caches() -> list[tuple[str, int]]:
    """(name, bytes) of the data caches that all threads in use have together, smallest first."""
    found = []
    for index in range(5):
        folder = f"/sys/devices/system/cpu/cpu0/cache/index{index}"
        size, level = _read(f"{folder}/size"), _read(f"{folder}/level")
        if not size.endswith("K") or _read(f"{folder}/type") == "Instruction":
            continue
        shared = level == "3"
        found.append((f"L{level}", int(size[:-1]) * 1024 * (1 if shared else torch.get_num_threads())))
    return found


def data_in(size: int) -> str:
    """The smallest cache that holds `size` bytes with room for what else is touched between two calls."""
    return next((name for name, room in caches() if 2 * size <= room), "memory")


def _cpu() -> str:
    lines = _read("/proc/cpuinfo").splitlines()
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor() or platform.machine())
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def _git(*arguments: str) -> str:
    try:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def environment() -> dict[str, str]:
    """Where and with what a run was made: goes into every row."""
    commit = _git("rev-parse", "--short", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    return {
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "cpu": _cpu(),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchjd": version("torchjd"),
        "mmfast": version("mmfast") or "source",
        "commit": commit + ("+changes" if changed else ""),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }


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
                text = line.pop(f.name)
                values[f.name] = int(text) if f.type is int else text if f.type is str else float(text) if text else None
            rows.append(Row(**values))  # type: ignore[arg-type]
            env = line
    return rows, env


def newest() -> Path | None:
    """The CSV of the latest full run."""
    return max(RESULTS.glob("*.csv"), key=lambda path: path.stat().st_mtime, default=None)
