"""UPGrad and DualProj in Triton; mirrors mmfast/resolvers/cone.py. numbers: the precision, then K preferences or nothing."""

import triton.language as tl

from mmfast.backends.triton.nonnegative import nonnegative
from mmfast.backends.triton.problem import column, cosines, load, pick, preference, store, times
from mmfast.backends.triton.rows import kernel

HIDDEN = tl.constexpr(4e-8)  # kHidden of csrc/solvers/nnls.h


@kernel
def upgrad(
    G_ptr, mask_ptr, rng_ptr, numbers, w_ptr, mask_stride: tl.int64, problems: tl.int64, K: tl.constexpr, P: tl.constexpr, HAS_MASK: tl.constexpr,
    NORM: tl.constexpr, GIVEN: tl.constexpr,
):  # fmt: skip
    """The sum of the projections of the rows, one after the other."""
    idx = tl.arange(0, P)
    G, active, rows, _ = load(G_ptr, mask_ptr, numbers, mask_stride, problems, K, P, HAS_MASK, NORM, True)
    norm, C = cosines(G, active, idx)
    u = preference(numbers, 1, active, idx, K, GIVEN) * norm
    total = u
    for i in range(K):
        at = idx == i
        q = tl.where(at, 0.0, column(C, at))
        share = pick(u, at)
        if (tl.min(q, axis=0) < 0.0) & (share > 0.0):
            free = active & ~at  # projecting g_i never needs more of g_i itself
            x, _T, _set = nonnegative(C, q, free & (q < 0.0), free, 1.0, 1e-10, HIDDEN, idx, K)
            total += share * x
    store(w_ptr, total / norm, G, active, rows, numbers, K, P, NORM, True)


@kernel
def dualproj(
    G_ptr, mask_ptr, rng_ptr, numbers, w_ptr, mask_stride: tl.int64, problems: tl.int64, K: tl.constexpr, P: tl.constexpr, HAS_MASK: tl.constexpr,
    NORM: tl.constexpr, GIVEN: tl.constexpr,
):  # fmt: skip
    """The projection of the weighted sum."""
    idx = tl.arange(0, P)
    G, active, rows, _ = load(G_ptr, mask_ptr, numbers, mask_stride, problems, K, P, HAS_MASK, NORM, True)
    norm, C = cosines(G, active, idx)
    u = preference(numbers, 1, active, idx, K, GIVEN) * norm
    q = tl.where(active, times(C, u), 0.0)
    x, _T, _set = nonnegative(C, q, q < 0.0, active, tl.sum(u, axis=0), 1e-10, HIDDEN, idx, K)
    store(w_ptr, (u + x) / norm, G, active, rows, numbers, K, P, NORM, True)
