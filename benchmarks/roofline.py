"""What the machine can do at best: reading memory and multiply-adds, as calls to be timed beside an operator; peak.cpp or, without a compiler, torch."""

import ctypes
import hashlib
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

import torch

from benchmarks.timing import Call

SOURCE = Path(__file__).with_name("peak.cpp")
BUILD = Path(__file__).parent.parent / "build" / "benchmarks"
TORCH = Path(torch.__file__).parent / "lib"


@cache
def _library() -> ctypes.CDLL | None:
    """peak.cpp compiled for this very machine, or None without a compiler."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return None
    target = BUILD / f"peak-{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]}.so"
    if not target.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        flags = ["-O3", "-std=c++17", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC", f"-L{TORCH}"]
        line = [compiler, *flags, str(SOURCE), "-ltorch_cpu", "-o", str(target)]
        if subprocess.run(line, check=False, capture_output=True).returncode != 0:
            return None
    library = ctypes.CDLL(str(target))
    library.operations.restype = ctypes.c_int64
    library.multiply_add.argtypes = [ctypes.c_int, ctypes.c_int64]
    library.read_all.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_int]
    return library


def readers(data: torch.Tensor) -> dict[str, Call]:
    """Ways to read all of `data` (float32, contiguous) once; the fastest of them is the machine's stream-read rate."""
    library, threads = _library(), torch.get_num_threads()
    found: dict[str, Call] = {"torch.sum": data.sum}
    if library is not None:
        for streams in (1, 2, 4):
            found[f"read x{streams}"] = lambda s=streams: library.read_all(data.data_ptr(), data.numel(), threads, s)  # type: ignore[misc]
    return found


def multiply_adds(operations: int) -> dict[str, Call]:
    """A way to do so many float32 operations, a multiply-add counted as two, on all threads at their peak."""
    library, threads = _library(), torch.get_num_threads()
    if library is not None:
        rounds = -(-operations // (threads * library.operations()))
        return {"peak.cpp": lambda: library.multiply_add(threads, rounds)}
    a, b = torch.randn(1024, 1024), torch.randn(1024, -(-operations // (2 * 1024**2)))
    return {"torch.mm": lambda: torch.mm(a, b)}
