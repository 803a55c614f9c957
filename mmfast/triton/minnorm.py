"""MGDA in Triton; mirrors mmfast/resolvers/minnorm.py. params: the precision, then the rule's own."""

import triton
import triton.language as tl

from mmfast.triton.nonnegative import nonnegative
from mmfast.triton.problem import column, cosines, diagonal, load, store


@triton.jit
def shortest(G, active, idx, K):
    """The weights [P] of the shortest vector of the hull of the active rows.

    With a lift l > 0, min 1/2 x'(G + l 11')x - l 1'x over x >= 0 has x = s w, w the weights looked for and s = l / (l + w'Gw): on the
    rows of x, s Gw = l (1 - s). A lift of the shortest row's square costs no digit of any entry.
    """
    squares = diagonal(G, idx)
    lift = tl.min(tl.where(active, squares, float("inf")), axis=0)
    pair = active[:, None] & active[None, :]
    size = tl.sqrt(squares + tl.where(active, lift, 0.0))
    one = tl.where(idx[:, None] == idx[None, :], 1.0, 0.0)
    C = tl.where(pair & (idx[:, None] != idx[None, :]), (G + lift) / (size[:, None] * size[None, :]), one)
    x, _, _ = nonnegative(C, tl.where(active, -lift / size, 0.0), active, active, 0.0, idx, K)
    x = x / size
    return x / tl.sum(x, axis=0)


@triton.jit
def share(w, G, idx, K):
    """Rows that no entry of G tells apart share their weight, so that copies are treated alike."""
    norm = tl.sqrt(diagonal(G, idx))
    alike = idx[:, None] * 0 == idx[None, :] * 0
    for l in range(K):
        at = idx == l
        c = column(G, at)
        alike = alike & (tl.abs(c[:, None] - c[None, :]) <= 8.881784197001252e-16 * norm[:, None] * tl.sum(tl.where(at, norm, 0.0), axis=0))
    first = tl.min(tl.where(alike, idx[None, :], idx[None, :] * 0 + 1024), axis=1)  # row i belongs to group first[i]
    group = first[:, None] == first[None, :]
    return tl.sum(tl.where(group, w[None, :], 0.0), axis=1) / tl.sum(group.to(tl.int32), axis=1).to(tl.float64)


@triton.jit
def mgda(
    G_ptr, mask_ptr, rng_ptr, params_ptr, w_ptr, K, mask_stride, P: tl.constexpr, HAS_MASK: tl.constexpr, PRESERVE_NORM: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    idx = tl.arange(0, P)
    G, active, rows, half = load(G_ptr, mask_ptr, K, mask_stride, P, HAS_MASK)
    if UNIT:  # on the cosines
        norm, C = cosines(G, active, idx)
        w = share(shortest(C, active, idx, K), G, idx, K) / norm * half
    else:
        w = share(shortest(G, active, idx, K), G, idx, K)
    store(w_ptr, w, G, active, rows, tl.load(params_ptr), K, P, PRESERVE_NORM)
