"""IMTLG, AlignedMTL and ConFIG in Triton; mirrors mmfast/resolvers/alignment.py. numbers: the precision, then the rule's own."""

import triton
import triton.language as tl

from mmfast.backends.triton.nonnegative import inverse_times, table
from mmfast.backends.triton.problem import cosines, load, number, parameter, parameters, preference, store, times
from mmfast.backends.triton.rows import kernel
from mmfast.backends.triton.spectrum import eigh, kept


@triton.jit
def multiples(G, pref, active, precision, idx, K: tl.constexpr):
    """(norms, a, cosines of sum_i a_i g_i to the rows times its length, its squared length) for a = D^-1 C^+ pref.

    The squared length is 0 where the rows admit no such direction.
    """
    norm, C = cosines(G, active, idx)
    count = tl.sum(active.to(tl.int32), axis=0)
    pref = tl.where(active, pref, 0.0)
    T, independent = table(C, active, idx, K, tl.maximum(1e-8, 64.0 * precision * count.to(tl.float64)))
    if tl.sum(independent.to(tl.int32), axis=0) == count:
        x = inverse_times(T, active, pref)
        x += inverse_times(T, active, pref - times(C, x))
        cosine = pref
        square = tl.sum(x * pref, axis=0)
    else:
        values, V = eigh(C, idx, K)
        keep = kept(values, active, precision)
        whole = tl.where(active, tl.sum(V * pref[:, None], axis=0), 0.0)
        part = tl.where(keep, whole, 0.0)
        y = part / tl.where(keep, values, 1.0)
        known = tl.sum(part * part, axis=0) > 1e-24 * tl.sum(whole * whole, axis=0)  # below it, part is rounding
        square = tl.where(known, tl.sum(y * part, axis=0), 0.0)
        x = times(V, y)
        cosine = times(V, part)
    return norm, x / norm, cosine, square


@kernel
def imtlg(
    G_ptr, mask_ptr, rng_ptr, numbers, w_ptr, mask_stride: tl.int64, problems: tl.int64, K: tl.constexpr, P: tl.constexpr, HAS_MASK: tl.constexpr,
    NORM: tl.constexpr
):  # fmt: skip
    idx = tl.arange(0, P)
    G, active, rows, _ = load(G_ptr, mask_ptr, numbers, mask_stride, problems, K, P, HAS_MASK, NORM, False)
    precision = parameter(numbers, 0)
    _, a, _, square = multiples(G, tl.where(active, 1.0, 0.0).to(tl.float64), active, precision, idx, K)
    a = tl.where(active, a, 0.0)
    total, reach = tl.sum(a, axis=0), tl.sum(tl.abs(a), axis=0)
    defined = (square > 0.0) & (tl.abs(total) > 1e-12 * reach)
    w = a * tl.where(defined, 1.0, 0.0) / tl.where(defined, total, 1.0)
    store(w_ptr, w, G, active, rows, numbers, K, P, NORM, False)


@triton.jit
def tracked(norm, active, kind, idx):
    """The mean of the norms that ConFIG follows: 1 least, 2 largest, 3 harmonic, 4 arithmetic, 5 geometric; 6 + i norm i, or 4 where that is missing."""
    count = number(active)
    out = tl.min(tl.where(active, norm, float("inf")), axis=0)
    if kind == 2.0:
        out = tl.max(tl.where(active, norm, 0.0), axis=0)
    if kind == 3.0:
        out = count / tl.sum(tl.where(active, 1.0 / norm, 0.0), axis=0)
    if (kind == 4.0) | (kind > 5.0):
        out = tl.sum(tl.where(active, norm, 0.0), axis=0) / count
    if kind == 5.0:
        out = tl.exp(tl.sum(tl.where(active, tl.log(norm), 0.0), axis=0) / count)
    own = tl.sum(tl.where(active & (idx.to(tl.float64) == kind - 6.0), norm, 0.0), axis=0)
    return tl.where(own > 0.0, own, out)


@kernel
def config(
    G_ptr, mask_ptr, rng_ptr, numbers, w_ptr, mask_stride: tl.int64, problems: tl.int64, K: tl.constexpr, P: tl.constexpr, HAS_MASK: tl.constexpr,
    NORM: tl.constexpr, GIVEN: tl.constexpr,
):  # fmt: skip
    """numbers: the length model (0 is the projection), then K preferences or nothing."""
    idx = tl.arange(0, P)
    G, active, rows, _ = load(G_ptr, mask_ptr, numbers, mask_stride, problems, K, P, HAS_MASK, NORM, False)
    precision, kind = parameter(numbers, 0), parameter(numbers, 1)
    pref = tl.where(active, 1.0, 0.0).to(tl.float64)
    if GIVEN:
        pref = parameters(numbers, 2, idx, K)
    norm, a, cosine, square = multiples(G, pref, active, precision, idx, K)
    cosine = tl.where(active, cosine, 0.0)
    along = tl.sum(norm * cosine, axis=0)
    if kind != 0.0:
        along = tracked(norm, active, kind, idx) * tl.sum(cosine, axis=0)
    defined = square > 0.0
    w = a * (tl.where(defined, along, 0.0) / tl.where(defined, square, 1.0))
    store(w_ptr, w, G, active, rows, numbers, K, P, NORM, False)


@kernel
def aligned(
    G_ptr, mask_ptr, rng_ptr, numbers, w_ptr, mask_stride: tl.int64, problems: tl.int64, K: tl.constexpr, P: tl.constexpr, HAS_MASK: tl.constexpr,
    NORM: tl.constexpr, GIVEN: tl.constexpr,
):  # fmt: skip
    """numbers: the common squared norm among the eigenvalues (0 least, 1 lower median, 2 mean), then K preferences or nothing."""
    idx = tl.arange(0, P)
    G, active, rows, _ = load(G_ptr, mask_ptr, numbers, mask_stride, problems, K, P, HAS_MASK, NORM, False)
    precision, kind = parameter(numbers, 0), parameter(numbers, 1)
    pref = preference(numbers, 2, active, idx, K, GIVEN)
    values, V = eigh(G, idx, K)
    keep = kept(values, active, precision)
    count = tl.sum(keep.to(tl.int32), axis=0)
    if kind == 2.0:
        sigma = tl.sum(tl.where(keep, values, 0.0), axis=0) / tl.maximum(count, 1).to(tl.float64)
    else:
        smaller = (values[None, :] < values[:, None]) | ((values[None, :] == values[:, None]) & (idx[None, :] < idx[:, None]))
        place = tl.sum((smaller & keep[None, :]).to(tl.int32), axis=1)
        target = tl.where(kind == 0.0, 0, tl.maximum(count - 1, 0) // 2)
        sigma = tl.sum(tl.where(keep & (place == target), values, 0.0), axis=0)
    y = tl.where(keep, tl.sqrt(sigma / tl.where(keep, values, 1.0)), 0.0) * tl.sum(V * pref[:, None], axis=0)
    store(w_ptr, times(V, y), G, active, rows, numbers, K, P, NORM, False)
