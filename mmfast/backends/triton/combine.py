"""The second pass: sum_i w_i g_i, from the end, for what the first pass read last is still in the caches.

NORM says what is done for a norm that is to be preserved: 0 nothing, 1 the weights are multiplied by what norm.py found, 2 and problems that were
measured are summed in double precision, for what is left of their summands is as small as their rounding.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfast.backends.triton.norm import Measured, final_factor
from mmfast.backends.triton.rows import WIDTH, Rows, current, here, kernel, mask_of, pointer, pointers, warps

FEW = tl.constexpr(16)  # rows that are added in order; more are added in a tree
PROGRAMS = 4096  # that share the tiles: a few for every place on a GPU


@triton.jit
def _weighted(
    packed, mask, w, factor, mask_at, bits, first, left, lane, k, DTYPE: tl.constexpr, ACC: tl.constexpr, K: tl.constexpr,
    MASK: tl.constexpr, SKIP: tl.constexpr, ALIGNED: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """The sum at elements first + lane, the first `left` of them where not WHOLE."""
    total = tl.zeros_like(lane).to(ACC)
    if K > FEW:
        row = tl.arange(0, K)
        there = here(mask, row, bits, mask_at, k, MASK)
        weight = tl.load(w + row, mask=there, other=0.0) * factor
        if SKIP:
            there = there & (weight != 0)
        p = pointers(packed, row, K, DTYPE) + first
        if ALIGNED:
            p = tl.multiple_of(p, 16)
        wanted = there[:, None] & (lane >= 0)[None, :]
        if not WHOLE:
            wanted = wanted & (lane < left)[None, :]
        total = tl.sum(weight.to(ACC)[:, None] * tl.load(p[:, None] + lane[None, :], mask=wanted, other=0).to(ACC), axis=0)
    for i in tl.static_range(K if K <= FEW else 0):
        row = tl.full([1], i, tl.int32)
        there = here(mask, row, bits, mask_at, k, MASK)
        weight = tl.load(w + row, mask=there, other=0.0) * factor
        if SKIP:
            there = there & (weight != 0)
        p = pointer(packed[i], DTYPE) + first
        if ALIGNED:
            p = tl.multiple_of(p, 16)
        wanted = there & (lane >= 0)
        if not WHOLE:
            wanted = wanted & (lane < left)
        total = tl.fma(tl.zeros_like(total) + weight.to(ACC), tl.load(p + lane, mask=wanted, other=0).to(ACC), total)
    return total


@triton.jit
def _write(
    packed, mask, w, out, factor, mask_at, bits, first, left, k, ACC: tl.constexpr, K: tl.constexpr, MASK: tl.constexpr, SKIP: tl.constexpr,
    ALIGNED: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A tile of the result."""
    DTYPE: tl.constexpr = out.dtype.element_ty
    lane = tl.arange(0, BLOCK)
    to = out + first
    if ALIGNED:
        to = tl.multiple_of(to, 16)
    value = _weighted(packed, mask, w, factor, mask_at, bits, first, left, lane, k, DTYPE, ACC, K, MASK, SKIP, ALIGNED, WHOLE)
    if ACC == tl.float64 and DTYPE != tl.float64:  # Triton's interpreter makes zeros of it in one step
        value = value.to(tl.float32)
    if WHOLE:
        tl.store(to + lane, value.to(DTYPE))
    else:
        tl.store(to + lane, value.to(DTYPE), mask=lane < left)


@kernel
def combine_kernel(
    packed, mask, w, out, norms, slots, scaled, bits: tl.int64, size: tl.int64, tiles: tl.int64, segments: tl.int64, mask_stride: tl.int64,
    w_stride: tl.int64, per_problem: tl.int64, k: tl.int32, ACC: tl.constexpr, K: tl.constexpr, R: tl.constexpr, MASK: tl.constexpr,
    SKIP: tl.constexpr, ALIGNED: tl.constexpr, NORM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Tiles of segments, each with weights and mask of its own; what a mask hides is not read, nor a row of weight zero where SKIP."""
    PART: tl.constexpr = BLOCK // 4  # in double precision, for the sake of registers
    tile = segments * tiles - 1 - tl.program_id(0)
    factor, settled = tl.full((), 1, tl.float64), tl.full((), 1, tl.float64)
    found = tl.full((), -1, tl.int64)  # the problem that they are of
    while tile >= 0:
        segment = tile // tiles
        done = tile % tiles * BLOCK
        first, left = segment * size + done, size - done
        mask_at, at = segment * mask_stride, w + segment * w_stride
        if NORM:
            problem = tl.where(w_stride > 0, segment, 0)
            if problem != found:
                factor, settled = final_factor(norms, slots, problem, per_problem)
                found = problem
            if first == problem * size:
                row = tl.arange(0, R)
                tl.store(scaled + problem * k + row, tl.load(at + row, mask=row < k, other=0.0) * factor, mask=row < k)
        if NORM == 2 and settled == 0.0:
            for part in range(0, BLOCK, PART):
                _write(
                    packed, mask, at, out, factor, mask_at, bits, first + part, left - part, k, tl.float64, K, MASK, SKIP, False, False, PART
                )  # fmt: skip
        elif left >= BLOCK:
            _write(packed, mask, at, out, factor, mask_at, bits, first, left, k, ACC, K, MASK, SKIP, ALIGNED, True, BLOCK)
        else:
            _write(packed, mask, at, out, factor, mask_at, bits, first, left, k, ACC, K, MASK, SKIP, ALIGNED, False, BLOCK)
        tile -= tl.num_programs(0)


def combine(rows: Rows, mask: Tensor | None, w: Tensor, per_sample: bool, skip: bool) -> Tensor:
    """A fresh tensor of the shape and dtype of one row; w float64 [K], or [B, K] per sample; rows of weight zero are not read where `skip`."""
    return _launch(rows, mask, w, per_sample, skip, None)[0]


def combine_with_norm(rows: Rows, mask: Tensor | None, w: Tensor, per_sample: bool, measured: Measured) -> tuple[Tensor, Tensor]:
    """(the same, the weights) with the weights multiplied by the factor that was measured; w itself where there are no numbers to add up."""
    return _launch(rows, mask, w, per_sample, True, measured)


def _launch(rows: Rows, mask: Tensor | None, w: Tensor, per_sample: bool, skip: bool, measured: Measured | None) -> tuple[Tensor, Tensor]:
    first = rows.held[0]
    out = torch.empty(first.shape, dtype=first.dtype, device=first.device)
    if out.numel() == 0:
        return out, w
    apart = per_sample or (mask is not None and mask.dim() == 2)
    segments, size = (rows.batch, rows.inner) if apart else (1, rows.batch * rows.inner)
    flat, stride, which = mask_of(mask, rows, True)
    block = 256 if size <= 256 else 1024
    if rows.k > FEW.value:
        block = 32768 // max(4, first.element_size()) // len(rows.packed)  # a tile of 64 registers a thread
    tiles = triton.cdiv(size, block)
    aligned = rows.aligned and (segments == 1 or size * first.element_size() % 16 == 0)
    double = first.dtype == torch.float64
    scaled = w if measured is None else torch.empty(w.shape, dtype=w.dtype, device=w.device)
    norms, slots = (w, w) if measured is None else measured
    with current(first.device):
        combine_kernel[(min(segments * tiles, PROGRAMS),)](
            rows.packed, flat, w, out, norms, slots, scaled, rows.bits, size, tiles, segments, stride, rows.k if per_sample else 0,
            slots.shape[1] if measured else 0, rows.k, ACC=tl.float64 if double else tl.float32, K=len(rows.packed),
            R=triton.next_power_of_2(len(rows.packed)), MASK=which, SKIP=skip, ALIGNED=aligned,
            NORM=0 if measured is None else 1 if double else 2, BLOCK=block,
            num_warps=warps(32 if size <= 256 and rows.k <= FEW.value else WIDTH, first.device), enable_fp_fusion=False,
        )  # fmt: skip
    return out, scaled
