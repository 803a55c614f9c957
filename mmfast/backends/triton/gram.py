"""The first pass: Gramians of K rows, each number read once.

A chunk of at most 4096 elements is summed in the rows' precision (float32 for 16-bit types) in 128 lanes of its own, chunks in float64 in order;
a slot is a run of chunks, whose length depends on the number of elements alone. Slots are added in order, lanes in a tree.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfast.backends.triton.rows import WIDTH, Rows, current, here, kernel, mask_of, pointer, pointers, sample_of, warps

CHUNK = tl.constexpr(4096)
FEW = 8  # rows whose pairs have registers of their own; more are a product of matrices


@triton.jit
def _read(
    packed, mask, bits, mask_at, first, offset, end, inner, k, DTYPE: tl.constexpr, ACC: tl.constexpr, K: tl.constexpr,
    MASK: tl.constexpr, ALIGNED: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """The rows' elements first + offset, of those before `end` where not WHOLE."""
    xs = ()
    for i in tl.static_range(K):
        p = pointer(packed[i], DTYPE) + first
        if ALIGNED:
            p = tl.multiple_of(p, 16)
        wanted = here(mask, tl.full([1, 1], i, tl.int32), bits, mask_at, k, MASK)
        if MASK == 2:
            wanted = (
                wanted & (offset >= 0) & (tl.load(mask + sample_of(first, offset, inner) * k + i, mask=first + offset < end, other=0) != 0)
            )
        if not WHOLE:
            wanted = wanted & (first + offset < end)
        xs = xs + (tl.load(p + offset, mask=wanted, other=0).to(ACC),)
    return xs


@triton.jit
def _zeros(P: tl.constexpr, LANES: tl.constexpr, ACC: tl.constexpr):
    sums = ()
    for _ in tl.static_range(P):
        sums = sums + (tl.zeros([LANES], ACC),)
    return sums


@triton.jit
def _multiply(sums, xs, K: tl.constexpr):
    new = ()
    for i in tl.static_range(K):
        for j in tl.static_range(i, K):
            new = new + (sums[len(new)] + tl.sum(xs[i] * xs[j], axis=1),)
    return new


@triton.jit
def _widen(total, sums, P: tl.constexpr):
    new = ()
    for p in tl.static_range(P):
        new = new + (total[p] + sums[p].to(tl.float64),)
    return new


@kernel
def few_kernel(
    packed, mask, slots, bits: tl.int64, n: tl.int64, inner: tl.int64, mask_stride: tl.int64, per_problem: tl.int64, each: tl.int64,
    k: tl.int32, DTYPE: tl.constexpr, ACC: tl.constexpr, K: tl.constexpr, MASK: tl.constexpr, ALIGNED: tl.constexpr, LANES: tl.constexpr,
    E: tl.constexpr,
):  # fmt: skip
    """One slot: the products of all pairs of K <= 8 rows, each lane of every pair in a register."""
    slot = tl.program_id(0).to(tl.int64)
    problem = slot // per_problem
    start, mask_at = problem * n, problem * mask_stride
    end = start + n
    offset = tl.arange(0, LANES)[:, None] * E + tl.arange(0, E)[None, :]
    P: tl.constexpr = K * (K + 1) // 2
    total = _zeros(P, LANES, tl.float64)
    chunk = slot % per_problem * each
    stop = tl.minimum(chunk + each, n // CHUNK)
    while chunk < stop:
        sums = _zeros(P, LANES, ACC)
        for step in range(0, CHUNK, LANES * E):
            first = start + chunk * CHUNK + step
            sums = _multiply(sums, _read(packed, mask, bits, mask_at, first, offset, end, inner, k, DTYPE, ACC, K, MASK, ALIGNED, True), K)
        total = _widen(total, sums, P)
        chunk += 1
    # the last chunk of a problem, where it is not whole
    first = start + chunk * CHUNK
    rest = tl.minimum(first + (slot % per_problem * each + each - chunk) * CHUNK, end)
    sums = _zeros(P, LANES, ACC)
    while first < rest:
        sums = _multiply(sums, _read(packed, mask, bits, mask_at, first, offset, end, inner, k, DTYPE, ACC, K, MASK, ALIGNED, False), K)
        first += LANES * E
    total = _widen(total, sums, P)
    to = slots + slot * K * K
    place = tl.arange(0, 1)
    for i in tl.static_range(K):
        for j in tl.static_range(i, K):
            both = here(mask, place + i, bits, mask_at, k, MASK) & here(mask, place + j, bits, mask_at, k, MASK)
            value = tl.where(both, tl.sum(total[i * K - i * (i - 1) // 2 + j - i], axis=0), 0.0)
            tl.store(to + (i * K + j) + place, value)
            tl.store(to + (j * K + i) + place, value)


@triton.jit
def _tile(
    at, mask, row, there, first, lane, end, inner, k, ACC: tl.constexpr, MASK: tl.constexpr, ALIGNED: tl.constexpr, WHOLE: tl.constexpr
):
    """The elements first + lane of all rows, [R, B]."""
    p = at + first
    if ALIGNED:
        p = tl.multiple_of(p, 16)
    wanted = there[:, None] & (lane >= 0)[None, :]
    if MASK == 2:
        sample = sample_of(first, lane, inner) * k
        wanted = wanted & (tl.load(mask + sample[None, :] + row[:, None], mask=wanted & (first + lane < end)[None, :], other=0) != 0)
    if not WHOLE:
        wanted = wanted & (first + lane < end)[None, :]
    return tl.load(p[:, None] + lane[None, :], mask=wanted, other=0).to(ACC)


@kernel
def many_kernel(
    packed, mask, slots, bits: tl.int64, n: tl.int64, inner: tl.int64, mask_stride: tl.int64, per_problem: tl.int64, each: tl.int64,
    k: tl.int32, DTYPE: tl.constexpr, ACC: tl.constexpr, K: tl.constexpr, MASK: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One slot of more rows, K a power of two: a product of matrices, in full precision ("ieee": no TF32)."""
    slot = tl.program_id(0).to(tl.int64)
    problem = slot // per_problem
    start, mask_at = problem * n, problem * mask_stride
    end = start + n
    row, lane = tl.arange(0, K), tl.arange(0, BLOCK)
    there = here(mask, row, bits, mask_at, k, MASK)
    at = pointers(packed, row, K, DTYPE)
    total = tl.zeros([K, K], tl.float64)
    chunk = slot % per_problem * each
    stop = tl.minimum(chunk + each, n // CHUNK)
    while chunk < stop:
        sums = tl.zeros([K, K], ACC)
        for step in range(0, CHUNK, BLOCK):
            x = _tile(at, mask, row, there, start + chunk * CHUNK + step, lane, end, inner, k, ACC, MASK, ALIGNED, True)
            sums = tl.dot(x, tl.trans(x), sums, input_precision="ieee", out_dtype=ACC)
        total += sums.to(tl.float64)
        chunk += 1
    first = start + chunk * CHUNK
    rest = tl.minimum(first + (slot % per_problem * each + each - chunk) * CHUNK, end)
    sums = tl.zeros([K, K], ACC)
    while first < rest:
        x = _tile(at, mask, row, there, first, lane, end, inner, k, ACC, MASK, ALIGNED, False)
        sums = tl.dot(x, tl.trans(x), sums, input_precision="ieee", out_dtype=ACC)
        first += BLOCK
    total += sums.to(tl.float64)
    both = there[:, None] & there[None, :]
    inside = (row < k)[:, None] & (row < k)[None, :]
    tl.store(slots + slot * k * k + row[:, None] * k + row[None, :], tl.where(both, total, 0.0), mask=inside)


@kernel
def fold_kernel(slots, G, per_problem: tl.int64, entries: tl.int64, BLOCK: tl.constexpr, LANES: tl.constexpr):
    """The slots of a problem: lane l adds up the slots l, l + LANES, ... in order, then the lanes meet in a tree."""
    problem = tl.program_id(0).to(tl.int64)
    entry = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    lane = tl.arange(0, LANES)
    total = tl.zeros([LANES, BLOCK], tl.float64)
    s = problem * 0
    while s < per_problem:
        at = (problem * per_problem + s + lane)[:, None] * entries + entry[None, :]
        total += tl.load(slots + at, mask=(s + lane < per_problem)[:, None] & (entry < entries)[None, :], other=0.0)
        s += LANES
    tl.store(G + problem * entries + entry, tl.sum(total, axis=0), mask=entry < entries)


@kernel
def sums_kernel(
    packed, mask, sums, bits: tl.int64, batch: tl.int64, inner: tl.int64, mask_stride: tl.int64, k: tl.int32, DTYPE: tl.constexpr,
    K: tl.constexpr, R: tl.constexpr, MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Each row summed over the batch, in float64 in order; a row that is not there is zero."""
    row, lane = tl.arange(0, R), tl.arange(0, BLOCK)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    at = pointers(packed, row, K, DTYPE)
    inside = ((row < k)[:, None]) & (first + lane < inner)[None, :]
    total = tl.zeros([R, BLOCK], tl.float64)
    b = first * 0
    while b < batch:
        for u in tl.static_range(2):  # so many reads on their way
            wanted = (
                inside & (here(mask, row, bits, tl.minimum(b + u, batch - 1) * mask_stride, k, MASK) & (row * 0 + b + u < batch))[:, None]
            )
            total += tl.load((at + ((b + u) * inner + first))[:, None] + lane[None, :], mask=wanted, other=0).to(tl.float64)
        b += 2
    tl.store(sums + row[:, None] * inner + first + lane[None, :], total.to(sums.dtype.element_ty), mask=inside)


def elements_each(k: int, size: int, aligned: bool) -> int:
    """Elements of a row that a thread reads at once: few rows leave registers for more, and so do whole addresses."""
    if not aligned:
        return 2 if k <= 4 else 1
    return (4 if size == 8 else 8) if k <= 4 else 2 if size == 8 else 4


def slots_of(n: int, k: int) -> tuple[int, int]:
    """(slots of a problem of k rows of n elements, chunks of each): a function of these alone."""
    chunks = triton.cdiv(n, CHUNK.value)
    each = max(1, triton.cdiv(chunks, 1024 if k <= FEW else 512 if k <= 32 else 256))
    return triton.cdiv(chunks, each), each


def batch_sums(rows: Rows, mask: Tensor | None) -> Tensor:
    """The rows summed over the batch: [K, inner] in accumulator precision."""
    first = rows.held[0]
    sums = torch.empty(rows.k, rows.inner, dtype=rows.accumulator, device=first.device)
    if sums.numel() == 0:
        return sums
    flat, stride, which = mask_of(mask, rows, True)
    r = triton.next_power_of_2(len(rows.packed))
    block = 1024 // r
    with current(first.device):
        sums_kernel[(triton.cdiv(rows.inner, block),)](
            rows.packed, flat, sums, rows.bits, rows.batch, rows.inner, stride, rows.k, DTYPE=rows.dtype, K=len(rows.packed), R=r,
            MASK=which, BLOCK=block, num_warps=warps(WIDTH, first.device), enable_fp_fusion=False,
        )  # fmt: skip
    return sums


def gram(rows: Rows, mask: Tensor | None, per_sample: bool) -> Tensor:
    """Gramian [K, K] float64 of the rows, or [B, K, K] per sample; zero where a row is missing or hidden in all of its problem."""
    first = rows.held[0]
    problems, n = (rows.batch, rows.inner) if per_sample else (1, rows.batch * rows.inner)
    shape = (problems, rows.k, rows.k) if per_sample else (rows.k, rows.k)
    per_problem, each = slots_of(n, rows.k)
    if per_problem == 0 or problems == 0:
        return torch.zeros(shape, dtype=torch.float64, device=first.device)
    flat, stride, which = mask_of(mask, rows, per_sample)
    G = torch.empty(shape, dtype=torch.float64, device=first.device)
    slots = G if per_problem == 1 else torch.empty(problems * per_problem, rows.k, rows.k, dtype=torch.float64, device=first.device)
    size, places = first.element_size(), len(rows.packed)
    aligned = rows.aligned and (problems == 1 or n * size % 16 == 0)
    numbers = (rows.bits, n, rows.inner, stride, per_problem, each, rows.k)
    wide = tl.float64 if size == 8 else tl.float32
    kinds: dict[str, Any] = {"DTYPE": rows.dtype, "ACC": wide, "K": places, "MASK": which, "ALIGNED": aligned}
    grid = (problems * per_problem,)
    with current(first.device):
        if rows.k <= FEW:
            lanes = WIDTH if n > 1024 else 32
            few_kernel[grid](
                rows.packed, flat, slots, *numbers, **kinds, LANES=lanes, E=(2 if rows.k <= 4 else 1) if which == 2 else elements_each(rows.k, size, aligned),
                num_warps=warps(lanes, first.device), enable_fp_fusion=True,
            )  # fmt: skip
        else:
            many_kernel[grid](
                rows.packed, flat, slots, *numbers, **kinds, BLOCK=block_of(size),
                num_warps=warps(2 * WIDTH if places == 64 else WIDTH, first.device), enable_fp_fusion=True,
            )  # fmt: skip
        if per_problem > 1:
            entries = rows.k * rows.k
            fold_kernel[(problems, triton.cdiv(entries, 4))](
                slots, G, per_problem, entries, BLOCK=4, LANES=128, num_warps=warps(WIDTH, first.device), enable_fp_fusion=False
            )
    return G


def block_of(size: int) -> int:
    """Elements of each row in a step of `many_kernel`."""
    return 32 if size == 8 else 64
