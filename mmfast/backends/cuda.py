"""The compiled CUDA kernels, and the plan by which a call chooses among them."""

import ctypes
from contextlib import nullcontext

import torch

from mmfast.backends import compiled, library

gram, combine, lengths = compiled.gram, compiled.combine, compiled.lengths
weights, resolve = compiled.weights, compiled.resolve
graddrop, trimmed_mean, heads = compiled.graddrop, compiled.trimmed_mean, compiled.heads


def why_not() -> str | None:
    """Why the compiled CUDA kernels can't run here, or None when they can."""
    if not library.available:
        return library.missing_reason
    if not library.built_with_cuda:
        reason = library.read_facts(library.PATH).get("why_not_more") or "unknown"
        return f"{library.PATH} was built without CUDA ({reason}); build it again with: {library.BUILD_LINE.replace('=cpu', '=cuda')}"
    return None if torch.cuda.is_available() else f"torch {torch.__version__} sees no CUDA device"


def plan(device: int, size: int, k: int, rows: int, batch: int, inner: int, state: int, per: int) -> tuple[str, int, int, int]:
    """(path, bytes read, bytes written, launches) by csrc/cuda/plan.h for k of `rows` gradients [batch, inner], of `size` bytes a number.

    The rules keep `state` numbers; `per` is 0 for one problem, 1 for one per sample, 2 for what no single launch serves.
    """
    found = (ctypes.c_int64 * 4)()
    numbers = [ctypes.c_int64(x) for x in (device, size, k, rows, batch, inner, state, per)]
    with torch.cuda.device(device) if torch.cuda.is_available() else nullcontext():  # the current one is asked
        ctypes.CDLL(str(library.PATH)).mmfast_cuda_plan(*numbers, found)
    path, read, written, launches = found
    return ("two_pass", "persistent", "per_sample", "cluster")[path], read, written, launches
