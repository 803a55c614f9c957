"""What the self-check of a device found, kept in the user's cache for this machine, library, driver, torch and Triton."""

import contextlib
import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mmfast.backends import library

try:
    import fcntl
except ImportError:  # no such locks on Windows, nor compiled kernels
    fcntl = None  # type: ignore[assignment]


@dataclass(frozen=True)
class Result:
    """What the self-check found of one path of a backend on one device.

    Attributes:
        backend, path: which kernels.
        passed: whether all problems had the bits of the CPU, or were within tolerance where bits are not promised.
        problems: how many were run.
        worst: largest error relative to the largest element of its result.
        seconds: what the check of this path took.
        why: what was wrong; empty where it passed.
    """

    backend: str
    path: str
    passed: bool
    problems: int = 0
    worst: float = 0.0
    seconds: float = 0.0
    why: str = ""


def _hash(*paths: Path) -> str:
    digest = hashlib.blake2b(digest_size=12)
    for path in paths:
        with contextlib.suppress(OSError):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _driver() -> str:
    """The driver's own release; the version of CUDA that it speaks where that cannot be read."""
    try:
        return Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    except (OSError, IndexError):
        return str(torch._C._cuda_getDriverVersion()) if hasattr(torch._C, "_cuda_getDriverVersion") else "unknown"


@functools.cache
def facts(device: torch.device) -> dict[str, Any]:
    """All that a verdict on a GPU depends on; the library is read once in a process."""
    properties = torch.cuda.get_device_properties(device)
    try:
        import triton

        triton_version = triton.__version__
    except Exception:  # noqa: BLE001 what is broken is as good as not there
        triton_version = None
    return {
        "library": _hash(library.PATH),
        "triton sources": _hash(*sorted((Path(__file__).parent / "triton").glob("*.py"))),
        "driver": _driver(),
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "processors": properties.multi_processor_count,
        "torch": torch.__version__,
        "triton": triton_version,
    }


def folder() -> Path | None:
    """Where verdicts are kept: mmfast in the user's cache; None where there is no home."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmfast"
    except RuntimeError:
        return None


class Kept:
    """The file of one verdict, the lock of whoever is testing, and a marker that names the path under test: it outlives a process that the test kills.

    Where nothing can be written, or without a key, all of it does nothing: then a verdict lives as long as its process.
    """

    def __init__(self, key: dict[str, Any] | None) -> None:
        self.key = key
        where = folder() if key else None
        name = hashlib.blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=12).hexdigest()
        self.file = where and where / f"verdict-{name}.json"
        self._lock: Any = None

    def load(self) -> dict[tuple[str, str], Result]:
        """Results by (backend, path); none where the file is not there, not ours, or cut short."""
        if self.file is None:
            return {}
        try:
            kept = json.loads(self.file.read_text())
            if kept["key"] != self.key:
                return {}
            results = [Result(**result) for result in kept["results"]]
            whole = (
                r
                for r in results
                if f"{r.backend} {r.path}".split() == [r.backend, r.path] and type(r.passed) is bool and type(r.why) is str
            )
            return {(r.backend, r.path): r for r in whole}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return {}

    def save(self, results: dict[tuple[str, str], Result]) -> bool:
        """Written aside and renamed, so that a reader sees all of it or nothing."""
        if self.file is None:
            return False
        text = json.dumps({"key": self.key, "results": [asdict(result) for result in results.values()]}, indent=1)
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            handle, aside = tempfile.mkstemp(dir=self.file.parent, prefix=self.file.stem, suffix=".aside")
            try:
                with os.fdopen(handle, "w") as file:
                    file.write(text)
                os.replace(aside, self.file)
            except OSError:
                os.unlink(aside)
                raise
        except OSError:
            return False
        return True

    @contextlib.contextmanager
    def testing(self) -> Iterator[bool]:
        """Whether nobody else is testing; not waited for. A marker found while this is held was left by a process that is gone."""
        locked = False
        if self.file is not None and fcntl is not None:
            try:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                self._lock = self.file.with_suffix(".lock").open("w")
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                locked = True
            except OSError:
                pass
        try:
            yield locked
        finally:
            if self._lock is not None:
                self._lock.close()
                self._lock = None

    def mark(self, backend: str, path: str) -> None:
        if self.file is not None:
            with contextlib.suppress(OSError):
                self.file.with_suffix(".running").write_text(f"{backend} {path}")

    def unmark(self) -> None:
        if self.file is not None:
            with contextlib.suppress(OSError):
                self.file.with_suffix(".running").unlink()

    def marked(self) -> tuple[str, str] | None:
        """(backend, path) that was under test when its process ended."""
        if self.file is None:
            return None
        try:
            backend, path = self.file.with_suffix(".running").read_text().split()
        except (OSError, ValueError):
            return None
        return backend, path
