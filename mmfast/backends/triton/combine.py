"""The second pass: sum_i w_i g_i, from the end, for what the first pass read last is still in the caches."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfast.backends.triton.rows import WIDTH, Rows, current, here, kernel, mask_of, pointer, pointers, warps

FEW = tl.constexpr(16)  # rows that are added in order; more are added in a tree
PROGRAMS = 4096  # that share the tiles: a few for every place on a GPU


@triton.jit
def _weighted(
    packed, mask, w, mask_at, w_at, bits, first, left, lane, k, DTYPE: tl.constexpr, ACC: tl.constexpr, K: tl.constexpr,
    MASK: tl.constexpr, SKIP: tl.constexpr, ALIGNED: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """The sum at elements first + lane, the first `left` of them where not WHOLE."""
    total = tl.zeros_like(lane).to(ACC)
    if K > FEW:
        row = tl.arange(0, K)
        there = here(mask, row, bits, mask_at, k, MASK)
        weight = tl.load(w + w_at + row, mask=there, other=0.0)
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
        weight = tl.load(w + w_at + row, mask=there, other=0.0)
        if SKIP:
            there = there & (weight != 0)
        p = pointer(packed[i], DTYPE) + first
        if ALIGNED:
            p = tl.multiple_of(p, 16)
        wanted = there & (lane >= 0)
        if not WHOLE:
            wanted = wanted & (lane < left)
        total = tl.fma(tl.zeros_like(total) + weight.to(ACC), tl.load(p + lane, mask=wanted, other=0).to(ACC), total)
    return total.to(DTYPE)


@kernel
def combine_kernel(
    packed, mask, w, out, bits: tl.int64, size: tl.int64, tiles: tl.int64, segments: tl.int64, mask_stride: tl.int64, w_stride: tl.int64,
    k: tl.int32, ACC: tl.constexpr, K: tl.constexpr, MASK: tl.constexpr, SKIP: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Tiles of segments, each with weights and mask of its own; what a mask hides is not read, nor a row of weight zero where SKIP."""
    DTYPE: tl.constexpr = out.dtype.element_ty
    lane = tl.arange(0, BLOCK)
    tile = segments * tiles - 1 - tl.program_id(0)
    while tile >= 0:
        segment = tile // tiles
        done = tile % tiles * BLOCK
        first, left = segment * size + done, size - done
        to = out + first
        if ALIGNED:
            to = tl.multiple_of(to, 16)
        mask_at, w_at = segment * mask_stride, segment * w_stride
        if left >= BLOCK:
            value = _weighted(packed, mask, w, mask_at, w_at, bits, first, left, lane, k, DTYPE, ACC, K, MASK, SKIP, ALIGNED, True)
            tl.store(to + lane, value)
        else:
            value = _weighted(packed, mask, w, mask_at, w_at, bits, first, left, lane, k, DTYPE, ACC, K, MASK, SKIP, ALIGNED, False)
            tl.store(to + lane, value, mask=lane < left)
        tile -= tl.num_programs(0)


def combine(rows: Rows, mask: Tensor | None, w: Tensor, per_sample: bool, skip: bool) -> Tensor:
    """A fresh tensor of the shape and dtype of one row; w float64 [K], or [B, K] per sample; rows of weight zero are not read where `skip`."""
    first = rows.held[0]
    out = torch.empty(first.shape, dtype=first.dtype, device=first.device)
    if out.numel() == 0:
        return out
    apart = per_sample or (mask is not None and mask.dim() == 2)
    segments, size = (rows.batch, rows.inner) if apart else (1, rows.batch * rows.inner)
    flat, stride, which = mask_of(mask, rows, True)
    block = 256 if size <= 256 else 1024
    if rows.k > FEW.value:
        block = 32768 // max(4, first.element_size()) // len(rows.packed)  # a tile of 64 registers a thread
    tiles = triton.cdiv(size, block)
    aligned = rows.aligned and (segments == 1 or size * first.element_size() % 16 == 0)
    with current(first.device):
        combine_kernel[(min(segments * tiles, PROGRAMS),)](
            rows.packed, flat, w, out, rows.bits, size, tiles, segments, stride, rows.k if per_sample else 0, rows.k,
            ACC=tl.float64 if first.dtype == torch.float64 else tl.float32, K=len(rows.packed), MASK=which, SKIP=skip, ALIGNED=aligned,
            BLOCK=block, num_warps=warps(32 if size <= 256 and rows.k <= FEW.value else WIDTH, first.device), enable_fp_fusion=False,
        )  # fmt: skip
    return out
