"""K gradients as one argument of a kernel: their addresses, which of them are there, and what every launch needs to know."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from inspect import signature
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDTH = 128  # threads of a program: the lanes of a sum, so that they do not depend on the device
TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32, torch.float64: tl.float64}


def kernel(function: Callable[..., None]) -> Any:
    """`triton.jit` that asks of an argument its type alone: one kernel serves all addresses and sizes, and what it must know is a constant."""
    plain = [name for name, argument in signature(function).parameters.items() if argument.annotation is not tl.constexpr]
    return triton.jit(do_not_specialize=plain)(function)


class Rows(NamedTuple):
    """K places of one shape [batch, inner]; `held` keeps the memory of those that are there."""

    held: list[Tensor]
    packed: tuple[int, ...]  # an odd number for each place, see `odd`
    bits: int  # bit i is set where place i holds a gradient: at most 64, ops.TRITON_ROWS
    k: int
    batch: int
    inner: int
    aligned: bool

    @property
    def dtype(self) -> Any:
        return TYPES[self.held[0].dtype]

    @property
    def accumulator(self) -> torch.dtype:
        return torch.float64 if self.held[0].dtype == torch.float64 else torch.float32


def padded(k: int) -> int:
    """How many places a kernel is compiled for: up to eight as many as there are, else a power of two."""
    return k if k <= 8 else triton.next_power_of_2(k)


def odd(address: int) -> int:
    """Twice an address plus one, as a signed number of 64 bits: all are alike to the compiler, whatever the address is divisible by."""
    twice = (2 * address + 1) & (2**64 - 1)
    return twice - 2**64 if twice >> 63 else twice  # addresses of some GPUs have the highest bits set


def rows_of(grads: Sequence[Tensor], missing: Sequence[int] = ()) -> Rows:
    """The gradients at their places; one that is missing has its neighbour's address and is never read."""
    held = [g.detach().resolve_neg().contiguous() for g in grads]
    first, k = held[0], len(held) + len(missing)
    batch = first.shape[0] if first.dim() else 1
    addresses = [g.data_ptr() for g in held]
    places = [i for i in range(k) if i not in missing]
    packed = [odd(addresses[0])] * padded(k)
    for place, address in zip(places, addresses, strict=True):
        packed[place] = odd(address)
    bits = sum(1 << place for place in places)
    inner = first.numel() // max(batch, 1)
    return Rows(
        held, tuple(packed), bits - (1 << 64 if bits >> 63 else 0), k, batch, inner, all(address % 16 == 0 for address in addresses)
    )


def mask_of(mask: Tensor | None, rows: Rows, per_sample: bool) -> tuple[Tensor, int, int]:
    """(mask, its stride from problem to problem, which: 0 none, 1 hides rows of a problem, 2 hides rows of a sample of one problem)."""
    if mask is None:
        return torch.empty(0, dtype=torch.uint8, device=rows.held[0].device), 0, 0
    flat = mask.contiguous().view(torch.uint8)
    if mask.dim() == 1:
        return flat, 0, 1
    return flat, rows.k, 1 if per_sample else 2


@lru_cache(maxsize=16)
def _threads_of_a_warp(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).warp_size if device.type == "cuda" else 32


def warps(threads: int, device: torch.device) -> int:
    """Warps that have so many threads: 32 each, or 64 on some GPUs of AMD."""
    return max(1, threads // _threads_of_a_warp(device))


def current(device: torch.device) -> AbstractContextManager[object]:
    """The device, made current: a kernel is launched on that one."""
    return nullcontext() if device.type == "cpu" else torch.accelerator.device_index(device.index)


@triton.jit
def pointer(packed, DTYPE: tl.constexpr):
    """The pointer to the numbers of a place."""
    return (packed.to(tl.int64) >> 1).to(tl.pointer_type(DTYPE))


@triton.jit
def pointers(packed, row, K: tl.constexpr, DTYPE: tl.constexpr):
    """The pointers of the places `row` [R] as a tensor."""
    at = tl.zeros_like(row).to(tl.int64)
    for i in tl.static_range(K):
        at = tl.where(row == i, pointer(packed[i], tl.int8).to(tl.int64), at)
    return at.to(tl.pointer_type(DTYPE))


@triton.jit
def here(mask, row, bits, mask_at, k, MASK: tl.constexpr):
    """Which places `row` of a problem are to be read; those hidden in single samples count as there."""
    found = ((bits >> row.to(tl.int64)) & 1) != 0
    if MASK == 1:
        found = found & (tl.load(mask + mask_at + row, mask=row < k, other=0) != 0)
    return found


@triton.jit
def sample_of(first, offset, inner):
    """The sample of the elements first + offset, offset < 4096: one long division for all of them, each has a short one."""
    sample = first // inner
    rest = first - sample * inner
    near = (tl.minimum(rest, 4096).to(tl.int32) + offset) // tl.minimum(inner, 4096).to(tl.int32)
    return sample + tl.where(inner + 0 * offset >= 4096, (rest + offset >= inner).to(tl.int32), near)


INTERPRETED = not isinstance(here, triton.JITFunction)  # TRITON_INTERPRET was 1 when this was imported
