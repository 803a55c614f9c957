"""The compiled CPU kernels. Small plain calls go past the dispatcher, see direct.py."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from mmfast.backends import compiled, library

gram, combine, lengths = compiled.gram, compiled.combine, compiled.lengths
weights, resolve = compiled.weights, compiled.resolve
graddrop, trimmed_mean, heads = compiled.graddrop, compiled.trimmed_mean, compiled.heads


def gram_lists(tensors: Sequence[Sequence[Tensor]], rows: Sequence[Sequence[int]], k: int) -> Tensor:
    """The Gramian [K, K] over several tensors, in one pass; rows[t] are the places of tensor t's gradients among K."""
    return torch.ops.mmfast.gram_lists(*_flat(tensors, rows), k)


def combine_lists(tensors: Sequence[Sequence[Tensor]], rows: Sequence[Sequence[int]], w: Tensor) -> list[Tensor]:
    """The weighted sum of each tensor, in one pass."""
    out = [grads[0].new_empty(grads[0].shape) for grads in tensors]
    torch.ops.mmfast.combine_lists(*_flat(tensors, rows), w, out)
    return out


def _flat(tensors: Sequence[Sequence[Tensor]], rows: Sequence[Sequence[int]]) -> tuple[list[Tensor], list[int], list[int]]:
    return [g for grads in tensors for g in grads], [len(grads) for grads in tensors], [row for places in rows for row in places]


def why_not() -> str | None:
    """Why the compiled CPU kernels can't run here, or None when they can."""
    return library.missing_reason


def isa() -> str | None:
    """The instruction set that they run here, or None without them."""
    if not library.available:
        return None
    name = ctypes.CDLL(str(library.PATH)).mmfast_cpu_isa
    name.restype = ctypes.c_char_p
    return name().decode()
