"""GradDrop and TrimmedMean element by element, and which rows are zero. The operations are those of mmfast/resolvers/elementwise.py."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfast.backends.triton.rows import WIDTH, Rows, current, here, kernel, mask_of, pointer, pointers, sample_of, warps

FEW = tl.constexpr(8)  # rows that have code of their own
SLOTS = 1024  # programs that look for numbers in a problem


@kernel
def presence_kernel(
    packed, mask, found, bits: tl.int64, n: tl.int64, inner: tl.int64, mask_stride: tl.int64, per_problem: tl.int64, each: tl.int64,
    k: tl.int32, DTYPE: tl.constexpr, K: tl.constexpr, R: tl.constexpr, MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """found[problem, row] = 1 where a number of the row is not zero: all who find one write the same, and a row that is found is read no more."""
    slot = tl.program_id(0).to(tl.int64)
    problem = slot // per_problem
    row, lane = tl.arange(0, R), tl.arange(0, BLOCK)
    there = here(mask, row, bits, problem * mask_stride, k, MASK)
    at = pointers(packed, row, K, DTYPE)
    first, end = problem * n + slot % per_problem * each, problem * n + n
    stop = tl.minimum(first + each, end)
    open = there
    while (first < stop) & (tl.max(open.to(tl.int32), axis=0) > 0):
        wanted = open[:, None] & (first + lane < stop)[None, :]
        if MASK == 2:
            sample = sample_of(first, lane, inner) * k
            wanted = wanted & (tl.load(mask + sample[None, :] + row[:, None], mask=wanted, other=0) != 0)
        x = tl.load((at + first)[:, None] + lane[None, :], mask=wanted, other=0)
        hit = tl.max((x != 0).to(tl.int32), axis=1) > 0
        tl.store(found + problem * k + row, 1.0, mask=hit)
        open = open & (tl.load(found + problem * k + row, mask=open, other=1.0, volatile=True) == 0)
        first += BLOCK


def presence(rows: Rows, mask: Tensor | None, per_sample: bool) -> Tensor:
    """float64 [K], or [B, K] per sample: 1 where a row has a number that is not zero and not hidden, else 0."""
    first = rows.held[0]
    problems, n = (rows.batch, rows.inner) if per_sample else (1, rows.batch * rows.inner)
    found = torch.zeros((problems, rows.k) if per_sample else (rows.k,), dtype=torch.float64, device=first.device)
    if problems * n == 0:
        return found
    flat, stride, which = mask_of(mask, rows, per_sample)
    r = triton.next_power_of_2(len(rows.packed))
    block = max(32, 2048 // r)
    each = triton.cdiv(triton.cdiv(n, SLOTS), block) * block
    per_problem = triton.cdiv(n, each)
    with current(first.device):
        presence_kernel[(problems * per_problem,)](
            rows.packed, flat, found, rows.bits, n, rows.inner, stride, per_problem, each, rows.k, DTYPE=rows.dtype, K=len(rows.packed), R=r,
            MASK=which, BLOCK=block, num_warps=warps(WIDTH, first.device), enable_fp_fusion=False,
        )  # fmt: skip
    return found


@triton.jit
def _divided(a, b):
    """a / b, rounded once."""
    if a.dtype == tl.float32:
        return tl.div_rn(a, b)
    else:
        return a / b


@triton.jit
def _row(packed, mask, i: tl.constexpr, bits, e, n, inner, mask_stride, k, DTYPE: tl.constexpr, ACC: tl.constexpr, MASK: tl.constexpr):
    """Row i at the elements e of all; zero where it is hidden."""
    wanted = here(mask, tl.full([1], i, tl.int32), bits, 0, k, 0) & (e < n)
    if MASK != 0:
        wanted = wanted & (tl.load(mask + e // inner * mask_stride + i, mask=wanted, other=0) != 0)
    return tl.load(pointer(packed[i], DTYPE) + e, mask=wanted, other=0).to(ACC)


@triton.jit
def _tile(packed, mask, bits, e, n, inner, mask_stride, k, DTYPE: tl.constexpr, ACC: tl.constexpr, K: tl.constexpr, MASK: tl.constexpr):
    """All rows at the elements e; zero where they are hidden."""
    row = tl.arange(0, K)
    wanted = here(mask, row, bits, 0, k, 0)[:, None] & (e < n)[None, :]
    if MASK != 0:
        wanted = wanted & (tl.load(mask + (e // inner * mask_stride)[None, :] + row[:, None], mask=wanted, other=0) != 0)
    return tl.load(pointers(packed, row, K, DTYPE)[:, None] + e[None, :], mask=wanted, other=0).to(ACC)


@kernel
def graddrop_kernel(
    packed, mask, leak, rng, out, bits: tl.int64, n: tl.int64, inner: tl.int64, mask_stride: tl.int64, k: tl.int32, each: tl.int32,
    ACC: tl.constexpr, K: tl.constexpr, MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """leak holds one share for all rows (each = 0), or one for each (each = 1). Elements 64 g + p, + 16, + 32 and + 48 take the four words of the Philox block at place 16 g + p, p < 16."""
    DTYPE: tl.constexpr = out.dtype.element_ty
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    low, high = (place & 0xFFFFFFFF).to(tl.uint32), (place >> 32).to(tl.uint32)
    seed, counter = tl.load(rng), tl.load(rng + 1)
    step = tl.zeros_like(low)
    words = tl.philox(seed, low, high, step, step + (counter & 0xFFFFFFFF).to(tl.uint32))
    row = tl.arange(0, K if K > FEW else 1)
    for word in tl.static_range(4):
        e = place // 16 * 64 + place % 16 + 16 * word
        total = tl.zeros([BLOCK], ACC)
        size = tl.zeros([BLOCK], ACC)
        if K > FEW:
            x = _tile(packed, mask, bits, e, n, inner, mask_stride, k, DTYPE, ACC, K, MASK)
            for i in range(K):
                one = tl.sum(tl.where(row[:, None] == i, x, 0.0), axis=0)
                total += one
                size += tl.abs(one)
        for i in tl.static_range(K if K <= FEW else 0):
            one = _row(packed, mask, i, bits, e, n, inner, mask_stride, k, DTYPE, ACC, MASK)
            total += one
            size += tl.abs(one)
        purity = 0.5 * (1 + _divided(total, size))
        u = (((words[word] >> 9).to(tl.int32).to(tl.float32) + 0.5) * 1.1920928955078125e-07).to(ACC)
        positive, negative = (purity > u).to(ACC), (purity < u).to(ACC)  # what is let through without a leak
        kept = tl.zeros([BLOCK], ACC)
        if K > FEW:
            x = _tile(packed, mask, bits, e, n, inner, mask_stride, k, DTYPE, ACC, K, MASK)
            least = tl.load(leak + row * each, mask=row < k, other=0.0).to(ACC)
            kept = tl.sum(tl.maximum(tl.where(x > 0, positive[None, :], negative[None, :]), least[:, None]) * x, axis=0)
        for i in tl.static_range(K if K <= FEW else 0):
            one = _row(packed, mask, i, bits, e, n, inner, mask_stride, k, DTYPE, ACC, MASK)
            least = tl.load(leak + i * each, mask=i < k, other=0.0).to(ACC)
            kept += tl.maximum(tl.where(one > 0, positive, negative), least) * one
        tl.store(out + e, (kept + 0 * size).to(DTYPE), mask=e < n)  # a non-finite element stays one


@kernel
def trimmed_kernel(
    packed, mask, found, out, bits: tl.int64, n: tl.int64, inner: tl.int64, mask_stride: tl.int64, trim: tl.int32, k: tl.int32,
    ACC: tl.constexpr, K: tl.constexpr, R: tl.constexpr, MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """By rank, equal values in the order of their rows; a row that is missing or hidden has none."""
    DTYPE: tl.constexpr = out.dtype.element_ty
    row = tl.arange(0, R)
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = here(mask, row, bits, 0, k, 0)
    there = there & (tl.load(found + row, mask=there, other=0.0) != 0)
    wanted = there[:, None] & (e < n)[None, :]
    if MASK != 0:
        wanted = wanted & (tl.load(mask + (e // inner * mask_stride)[None, :] + row[:, None], mask=wanted, other=0) != 0)
    x = tl.load(pointers(packed, row, K, DTYPE)[:, None] + e[None, :], mask=wanted, other=0).to(ACC)
    rank = tl.zeros([R, BLOCK], tl.int32)
    for j in range(K):
        one = row == j
        y = tl.sum(tl.where(one[:, None], x, 0.0), axis=0)[None, :]
        counts = tl.sum((one[:, None] & wanted).to(tl.int32), axis=0)[None, :] > 0
        rank += (counts & ((y < x) | ((y == x) & (j < row)[:, None]))).to(tl.int32)
    count = tl.sum(wanted.to(tl.int32), axis=0)
    cut = tl.maximum(tl.minimum(trim, (count - 1) // 2), 0)
    kept = wanted & (rank >= cut[None, :]) & (rank < (count - cut)[None, :])
    mean = _divided(tl.sum(tl.where(kept, x, 0.0), axis=0), tl.maximum(count - 2 * cut, 1).to(ACC))
    tl.store(out + e, (mean + tl.sum(0 * x, axis=0)).to(DTYPE), mask=e < n)


def graddrop(rows: Rows, mask: Tensor | None, leak: Tensor, rng: Tensor) -> Tensor:
    """GradDrop of the rows with the random stream (seed, counter) as it stands; leak is float64 [1] or [K]."""
    first = rows.held[0]
    out = torch.empty(first.shape, dtype=first.dtype, device=first.device)
    n = out.numel()
    if n:
        flat, stride, which = mask_of(mask, rows, True)
        with current(first.device):
            block = 256 if rows.k <= FEW.value else 16
            graddrop_kernel[(triton.cdiv(n, 4 * block),)](
                rows.packed, flat, leak, rng, out, rows.bits, n, rows.inner, stride, rows.k, int(len(leak) > 1),
                ACC=tl.float64 if first.dtype == torch.float64 else tl.float32, K=len(rows.packed), MASK=which, BLOCK=block,
                num_warps=warps(WIDTH, first.device), enable_fp_fusion=False,
            )  # fmt: skip
    return out


def trimmed_mean(rows: Rows, mask: Tensor | None, trim: int) -> Tensor:
    """TrimmedMean of the rows."""
    first = rows.held[0]
    out = torch.empty(first.shape, dtype=first.dtype, device=first.device)
    n = out.numel()
    if n:
        found = presence(rows, mask, False)
        flat, stride, which = mask_of(mask, rows, True)
        r = triton.next_power_of_2(len(rows.packed))
        block = max(16, 1024 // r)
        with current(first.device):
            trimmed_kernel[(triton.cdiv(n, block),)](
                rows.packed, flat, found, out, rows.bits, n, rows.inner, stride, min(trim, rows.k), rows.k,
                ACC=tl.float64 if first.dtype == torch.float64 else tl.float32, K=len(rows.packed), R=r, MASK=which, BLOCK=block,
                num_warps=warps(WIDTH, first.device), enable_fp_fusion=False,
            )  # fmt: skip
    return out
