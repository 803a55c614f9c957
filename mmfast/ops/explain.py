"""What a resolve would do: which kernels, why those, what they read and write, and how fast it could be at best."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmfast import contract
from mmfast.backends import cuda, library
from mmfast.backends.choice import TRITON_ROWS, backends, choose, triton_kernels
from mmfast.resolvers.base import Rule
from mmfast.resolvers.elementwise import ElementwiseRule
from mmfast.resolvers.names import ResolverLike, instance_of

CACHED = 1 << 18  # bytes of a sample that are still in a processor's cache when it is combined


@dataclass(frozen=True)
class Explanation:
    """What `explain` found; printed, a line for each.

    Attributes:
        backend: "cpu", "cuda", "triton" or "reference".
        why: what it is, or why not another.
        path: the kernels, in words.
        launches: of the kernels of a chain of rules on a GPU; None elsewhere.
        read, written: bytes that the path moves at most; None for plain torch, which is not counted.
        floor_bytes: each gradient read once and one result written; what a mask hides is not taken off.
        floor_us: the time of those at `bandwidth`; None where that is not known.
        bandwidth: of the device's memory in GB/s.
    """

    backend: str
    why: str
    path: str
    launches: int | None
    read: int | None
    written: int | None
    floor_bytes: int
    floor_us: float | None
    bandwidth: float | None

    def __str__(self) -> str:
        moved = "not counted" if self.read is None else f"{_size(self.read)} read, {_size(self.written or 0)} written"
        launches = "" if self.launches is None else f", {self.launches} launch{'es' if self.launches != 1 else ''}"
        floor = _size(self.floor_bytes)
        if self.floor_us is not None:
            floor += f", {self.floor_us:.3g} µs at {self.bandwidth:.4g} GB/s"
        return f"backend  {self.backend}: {self.why}\npath     {self.path}{launches}\nmemory   {moved}\nfloor    {floor}"


def _size(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} B"


def _bandwidth(device: torch.device) -> float | None:
    """GB/s of a GPU's memory by its data sheet; a processor's own has to be measured."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    clock, width = getattr(properties, "memory_clock_rate", None), getattr(properties, "memory_bus_width", None)
    return 2 * clock * width / 8e6 if clock and width else None  # kHz and bits; two transfers a clock


def _why(backend: str, asked: str, device: torch.device) -> str:
    if backend != "reference":
        return backends()[backend][1]
    if asked == "triton":
        return f"plain torch; the Triton kernels take at most {TRITON_ROWS} gradients, and none that torch.func transforms"
    if device.type == "cuda":
        return "plain torch; " + (cuda.why_not(device.index) or backends()["cuda"][1])
    if device.type == "cpu":
        return "plain torch; " + (library.missing_reason or "asked for")
    return f"plain torch; no compiled kernels for {device.type}"


def _first(chain: list[Rule]) -> str:
    return "Gramian" if any(rule.needs_gram for rule in chain) else "a look at which rows are zero"


def _cuda(first: Tensor, present: int, k: int, chain: list[Rule], per: str, mask: Tensor | None) -> tuple[str, int, int, int]:
    """(path, bytes read, bytes written, launches) of a chain of rules, as csrc/ops_cuda.cpp takes it; forced paths are for tests and not looked at."""
    batch = first.shape[0] if first.dim() else 1
    inner, size = first.numel() // max(batch, 1), first.element_size()
    gram, random = any(rule.needs_gram for rule in chain), any(rule.random for rule in chain)
    few = len(chain) <= 4 and sum(len(rule.params()) for rule in chain) <= 64  # persistent.cu
    one = gram and few and (per == "sample" or (per == "batch" and (mask is None or mask.dim() == 1)))
    state = sum(rule.state_size(k) for rule in chain)
    name, read, written, launches = cuda.plan(
        first.device.index or 0, size, present, k, batch, inner, state, contract.per_code(per) if one else 2
    )
    if name == "persistent":
        return "one cooperative launch, gradients kept in shared memory", read, written, launches
    if name == "cluster":
        return "one launch of a cluster of blocks, gradients kept in shared memory", read, written, launches
    if name == "per_sample":
        return "one launch, a block for each sample, gradients kept in shared memory", read, written, launches + random
    if per == "batch_sum":  # the sums are written, and read for the Gramian
        sums = present * inner * max(size, 4)
        return "sums over the batch, Gramian, fold, weights, weighted sum", read + sums, written + sums, launches + 1 + random
    if not gram:
        return f"{_first(chain)}, weights, weighted sum", read, written, 4 + random
    return "Gramian, fold, weights, weighted sum", read, written, launches + random


def explain(
    grads: Sequence[Tensor | None] | Tensor,
    resolver: ResolverLike,
    per: str = "batch",
    mask: Tensor | None = None,
    *,
    backend: str = "auto",
    bandwidth: float | None = None,
) -> Explanation:
    """Says what `resolve` with these arguments would do, without doing it.

    Args:
        grads, resolver, per, mask, backend: as for `resolve`. Nothing is read but shapes, and no state moves on.
        bandwidth: of the device's memory in GB/s; a GPU's is taken from its data sheet, a processor's is not known.

    Returns:
        An `Explanation`, made to be printed.

    Raises:
        ValueError, TypeError, RuntimeError: as `resolve` would.

    >>> import torch, mmfast as mf
    >>> print(mf.explain([torch.ones(1000)] * 3, mf.MGDA(), backend="reference", bandwidth=20.0))
    backend  reference: plain torch; asked for
    path     Gramian, weights and sum in plain torch
    memory   not counted
    floor    16 kB, 0.8 µs at 20 GB/s
    """
    grads = contract.as_rows(grads)
    k, there = len(grads), [g for g in grads if g is not None]
    resolver = instance_of(resolver, k)
    if not there:
        raise ValueError("grads has no tensor, expected at least one")
    there = contract.ordinary(there, per, mask, k) or there
    contract.check(there, per, mask, k)
    resolver.check(k)
    first = there[0]
    device, n, size = first.device, first.numel(), first.element_size()
    bytes_ = len(there) * n * size
    found = choose(device, backend, k, "elementwise" if isinstance(resolver, ElementwiseRule) else "two_pass")
    read: int | None = 2 * bytes_
    written: int | None = n * size
    launches: int | None = None
    chain = resolver.chain()
    if k > contract.MAX_GRADS:
        path, read, written = f"Gramian in blocks of at most {contract.MAX_GRADS} rows, weights, sums of blocks", None, None
    elif found == "reference":
        path, read, written = "Gramian, weights and sum in plain torch", None, None
    elif resolver.of_parameters:
        path, read, written = "what the rule keeps, element by element in plain torch; Gramian and weighted sum of that", None, None
    elif isinstance(resolver, ElementwiseRule):
        path = "element by element; rows of zeros are looked for first where the rule counts them"
    elif chain is None:
        path = f"Gramian, {type(resolver).__name__}'s own torch code, weighted sum"
    elif found == "cpu":
        path = f"{_first(chain)}, weights, weighted sum; the second read backwards, from the caches what they hold"
        if per == "sample":
            path, read = "sample by sample", bytes_ if bytes_ <= CACHED * first.shape[0] else read
    elif found == "triton":
        solved = "weights" if triton_kernels().has_solver(chain, len(there)) else "weights in plain torch"
        path = f"{_first(chain)}, {solved}, weighted sum; the second read backwards, from the caches what they hold"
    else:
        path, read, written, launches = _cuda(first, len(there), k, chain, per, mask)
    bandwidth = bandwidth or _bandwidth(device)
    floor = bytes_ + n * size
    return Explanation(
        found, _why(found, backend, device), path, launches, read, written, floor, floor / bandwidth / 1e3 if bandwidth else None, bandwidth
    )
