"""An empty cooperative launch, and the launches that a captured CUDA graph holds, by launches.cu."""

import ctypes
import hashlib
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

from benchmarks.roofline import BUILD

SOURCE = Path(__file__).with_name("launches.cu")


def build(architecture: str) -> Path:
    """launches.cu compiled for an architecture such as "sm_90"; raises where that cannot be done."""
    home = os.environ.get("CUDA_HOME")
    nvcc = f"{home}/bin/nvcc" if home else shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    target = BUILD / f"launches-{architecture}-{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]}.so"
    if not target.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        line = [nvcc, "-O3", "-std=c++17", f"-arch={architecture}", "-Xcompiler", "-fPIC", "-shared", str(SOURCE), "-o", str(target)]
        done = subprocess.run(line, check=False, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(line)} failed: {done.stderr[-500:]}")
    return target


@cache
def library(architecture: str) -> ctypes.CDLL:
    """`build`, loaded."""
    found = ctypes.CDLL(str(build(architecture)))
    found.empty_cooperative.argtypes = [ctypes.c_int, ctypes.c_void_p]
    found.count_nodes.argtypes = [ctypes.c_void_p, ctypes.POINTER(ctypes.c_int64), ctypes.POINTER(ctypes.c_int64)]
    return found


def check(error: int) -> None:
    """Raises for a cudaError_t other than success."""
    if error:
        raise RuntimeError(f"CUDA error {error}")


def count(architecture: str, graph: int) -> tuple[int, int]:
    """(kernels, copies and memsets) of a cudaGraph_t."""
    kernels, memory = ctypes.c_int64(), ctypes.c_int64()
    check(library(architecture).count_nodes(graph, kernels, memory))
    return kernels.value, memory.value
