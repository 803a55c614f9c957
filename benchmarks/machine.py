"""The machine and the versions that a number belongs to, and whether the machine was quiet."""

import datetime
import importlib.metadata
import os
import platform
import subprocess
from functools import cache
from pathlib import Path

import torch

import mmfast as mf

ROOT = Path(__file__).parent.parent


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


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def environment(others: float | None = None) -> dict[str, str]:
    """Where and with what a run was made: goes into every row. `others` is the share of the processors that other programs used meanwhile."""
    commit = _git("rev-parse", "--short", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    return {
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "cpu": _cpu(),
        "threads": str(torch.get_num_threads()),
        "others_percent": "" if others is None else f"{100 * others:.0f}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchjd": _version("torchjd"),
        "mmfast": mf.__version__,
        "commit": commit + ("+changes" if changed else ""),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    }


class Quiet:
    """How much of the processors other programs have used since this was made: above a few percent, no number is worth quoting."""

    def __init__(self) -> None:
        self.total, self.others = self._now()

    @staticmethod
    def _now() -> tuple[float, float]:
        ticks = [int(x) for x in _read("/proc/stat").split("\n")[0].split()[1:9]] or [0] * 8
        own = sum(os.times()[:4]) * os.sysconf("SC_CLK_TCK")
        return sum(ticks), sum(ticks) - ticks[3] - ticks[4] - own  # all but idle and waiting for a disk

    def share(self) -> float:
        total, others = self._now()
        return max(0.0, others - self.others) / max(1.0, total - self.total)
