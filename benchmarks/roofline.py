"""Measures what the machine can do at best: reading memory (GB/s) and multiply-adds (GFLOP/s), with peak.cpp or, without a compiler, torch."""

import ctypes
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from time import perf_counter

import torch

SOURCE = Path(__file__).with_name("peak.cpp")
BUILD = Path(__file__).parent.parent / "build" / "benchmarks"


@cache
def _library() -> ctypes.CDLL | None:
    """peak.cpp compiled for this very machine, or None without a compiler."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return None
    target = BUILD / f"peak-{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]}.so"
    if not target.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        flags = ["-O3", "-std=c++17", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC", "-pthread"]
        line = [compiler, *flags, str(SOURCE), "-o", str(target)]
        if subprocess.run(line, check=False, capture_output=True).returncode != 0:
            return None
    library = ctypes.CDLL(str(target))
    library.fma_flops.restype = library.fma_seconds.restype = library.read_seconds.restype = ctypes.c_double
    library.fma_flops.argtypes = library.fma_seconds.argtypes = [ctypes.c_int, ctypes.c_int64]
    library.read_seconds.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_int]
    return library


def source() -> str:
    return "peak.cpp" if _library() else "torch"


def readers(data: torch.Tensor) -> dict[str, Callable[[], object]]:
    """Ways to read all of `data` (float32, contiguous) once; the fastest of them is the machine's stream-read rate."""
    library, threads = _library(), torch.get_num_threads()
    found: dict[str, Callable[[], object]] = {"torch.sum": data.sum}
    if library is not None:
        for streams in (1, 2, 4):
            found[f"read x{streams}"] = lambda s=streams: library.read_seconds(data.data_ptr(), data.numel(), threads, s)
    return found


def peak_flops(seconds: float = 0.3) -> float:
    """The most float32 operations per second of all threads together (a multiply-add counts two); the best of many short runs."""
    library, threads = _library(), torch.get_num_threads()
    best = 0.0
    stop = perf_counter() + seconds
    if library is not None:
        rounds = 500_000
        while perf_counter() < stop:
            best = max(best, library.fma_flops(threads, rounds) / library.fma_seconds(threads, rounds))
        return best
    for size in (512, 1024, 2048):
        a = torch.randn(size, size)
        stop = perf_counter() + seconds / 3
        while perf_counter() < stop:
            start = perf_counter()
            torch.mm(a, a)
            best = max(best, 2 * size**3 / (perf_counter() - start))
    return best
