"""Squared lengths of the plain sum and of sum_i w_i g_i on the elements, in double precision, for problems whose norm the Gramian does not settle."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfast import contract
from mmfast.backends.triton.combine import FEW
from mmfast.backends.triton.gram import fold_kernel
from mmfast.backends.triton.norm import ALWAYS, FOUND, SLOTS, TOLD, Measured, settle
from mmfast.backends.triton.problem import packed
from mmfast.backends.triton.rows import WIDTH, Rows, current, here, kernel, mask_of, pointer, pointers, warps

SAMPLE, BATCH_SUM = contract.PER["sample"], contract.PER["batch_sum"]


@triton.jit
def _both(packed, mask, w, mask_at, bits, first, left, lane, k, DTYPE: tl.constexpr, K: tl.constexpr, MASK: tl.constexpr):
    """(the plain sum, sum_i w_i g_i) at elements first + lane, the first `left` of them."""
    plain, ours = tl.zeros_like(lane).to(tl.float64), tl.zeros_like(lane).to(tl.float64)
    if K > FEW:
        row = tl.arange(0, K)
        there = here(mask, row, bits, mask_at, k, MASK)
        p = pointers(packed, row, K, DTYPE) + first
        x = tl.load(p[:, None] + lane[None, :], mask=there[:, None] & (lane < left)[None, :], other=0).to(tl.float64)
        plain = tl.sum(x, axis=0)
        ours = tl.sum(tl.load(w + row, mask=there, other=0.0)[:, None] * x, axis=0)
    for i in tl.static_range(K if K <= FEW else 0):
        row = tl.full([1], i, tl.int32)
        there = here(mask, row, bits, mask_at, k, MASK)
        x = tl.load(pointer(packed[i], DTYPE) + first + lane, mask=there & (lane < left), other=0).to(tl.float64)
        plain += x
        ours = tl.fma(tl.zeros_like(ours) + tl.load(w + row, mask=there, other=0.0), x, ours)
    return plain, ours


@kernel
def lengths_kernel(
    packed, mask, G, w, shifted, norms, slots, numbers, bits: tl.int64, size: tl.int64, tiles: tl.int64, segments: tl.int64, repeats: tl.int64,
    mask_stride: tl.int64, per_problem: tl.int64, each: tl.int64, k: tl.int32, DTYPE: tl.constexpr, K: tl.constexpr, P: tl.constexpr,
    MASK: tl.constexpr, SETTLED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One slot: `each` tiles of the segments of a problem; `repeats` parts of a segment are added up before they are squared."""
    slot = tl.program_id(0).to(tl.int64)
    problem = slot // per_problem
    tile = slot % per_problem * each
    settled = settle(G, w, shifted, norms, numbers, problem, tile == 0, k, P, SETTLED)
    if settled == 0.0:
        stop = tl.minimum(tile + each, segments * tiles)
        lane = tl.arange(0, BLOCK)
        weights = w + problem * k
        plains, squares = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
        while tile < stop:
            done = tile % tiles * BLOCK
            plain, ours = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
            part = (problem * segments + tile // tiles) * repeats
            end = part + repeats
            while part < end:
                x, y = _both(packed, mask, weights, part * mask_stride, bits, part * size + done, size - done, lane, k, DTYPE, K, MASK)
                plain += x
                ours += y
                part += 1
            plains += plain * plain
            squares += ours * ours
            tile += 1
        tl.store(slots + 2 * slot, tl.sum(plains, axis=0))
        tl.store(slots + 2 * slot + 1, tl.sum(squares, axis=0))


def _launch(
    rows: Rows, mask: Tensor | None, per: int, G: Tensor, w: Tensor, shifted: Tensor, norms: Tensor, precision: float, settled: int
) -> Tensor:
    """The slots [problems, slots, 2] of the rows."""
    first = rows.held[0]
    problems = rows.batch if per == SAMPLE else 1
    apart = mask is not None and mask.dim() == 2
    segments, repeats, size = 1, 1, rows.batch * rows.inner
    if per == SAMPLE:
        size = rows.inner
    elif per == BATCH_SUM:
        repeats, size = rows.batch, rows.inner
    elif apart:
        segments, size = rows.batch, rows.inner
    flat, stride, which = mask_of(mask, rows, True)
    block = 512 if rows.k <= FEW.value else 2048 // len(rows.packed)
    tiles = triton.cdiv(size, block)
    each = max(1, triton.cdiv(segments * tiles, SLOTS))
    per_problem = triton.cdiv(segments * tiles, each)
    slots = torch.empty(problems, per_problem, 2, dtype=torch.float64, device=first.device)
    if slots.numel():
        with current(first.device):
            lengths_kernel[(problems * per_problem,)](
                rows.packed, flat, G, w, shifted, norms, slots, packed((precision,)), rows.bits, size, tiles, segments, repeats, stride, per_problem,
                each, rows.k, DTYPE=rows.dtype, K=len(rows.packed), P=triton.next_power_of_2(rows.k), MASK=which, SETTLED=settled, BLOCK=block,
                num_warps=warps(WIDTH, first.device), enable_fp_fusion=False,
            )  # fmt: skip
    return slots


def lengths(rows: Rows, mask: Tensor | None, w: Tensor, per: int) -> Tensor:
    """[2] float64, or [B, 2] per sample: squared lengths of the plain sum and of sum_i w_i g_i, of their batch sums for per="batch_sum"."""
    slots = _launch(rows, mask, per, w, w, w, w, 0.0, ALWAYS.value)
    problems, per_problem, _ = slots.shape
    found = torch.zeros(problems, 2, dtype=torch.float64, device=w.device)
    if per_problem == 1:
        found = slots[:, 0]
    elif slots.numel():
        with current(w.device):
            fold_kernel[(problems, 1)](
                slots, found, per_problem, 2, BLOCK=4, LANES=128, num_warps=warps(WIDTH, w.device), enable_fp_fusion=False
            )
    return found if per == SAMPLE else found[0]


def measure(rows: Rows, mask: Tensor | None, w: Tensor, per: int, norms: Tensor) -> Measured:
    """What the factor of each problem is made of, where the `norms` [..., 3] are known."""
    return Measured(norms, _launch(rows, mask, per, w, w, w, norms, 0.0, TOLD.value))


def measure_by_gramian(rows: Rows, mask: Tensor | None, G: Tensor, both: Tensor, per: int, precision: float) -> Measured:
    """The same from the Gramian and its weights [2, ..., K], or [1, ..., K], from solve.solve_twice."""
    norms = torch.empty(*G.shape[:-2], 3, dtype=torch.float64, device=G.device)
    return Measured(norms, _launch(rows, mask, per, G, both[0], both[-1], norms, precision, FOUND.value))
