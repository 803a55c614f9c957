"""MGDA and CAGrad in Triton; mirrors mmfast/resolvers/minnorm.py. numbers: the precision, then the rule's own."""

import triton
import triton.language as tl

from mmfast.backends.triton.nonnegative import inverse_times, nonnegative
from mmfast.backends.triton.problem import cancelled, column, cosines, diagonal, lift_of, load, number, parameter, store, times
from mmfast.backends.triton.rows import kernel


@triton.jit
def shortest(G, active, idx, K: tl.constexpr):
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
    x, _T, _set = nonnegative(C, tl.where(active, -lift / size, 0.0), active, active, 0.0, 2e-13, 0.0, idx, K)
    x = x / size
    total = tl.sum(x, axis=0)
    return x / tl.where(total > 0.0, total, 1.0)


@triton.jit
def share(w, G, idx, K: tl.constexpr):
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


@kernel
def mgda(
    G_ptr, mask_ptr, rng_ptr, numbers, w_ptr, mask_stride: tl.int64, problems: tl.int64, K: tl.constexpr, P: tl.constexpr, HAS_MASK: tl.constexpr,
    NORM: tl.constexpr, UNIT: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    idx = tl.arange(0, P)
    G, active, rows, half = load(G_ptr, mask_ptr, numbers, mask_stride, problems, K, P, HAS_MASK, NORM, True)
    norm, C = G, G
    if UNIT:
        norm, C = cosines(G, active, idx)
    w = share(shortest(C, active, idx, K), G, idx, K)
    if CAPPED:
        cap = parameter(numbers, 2)
        w = tl.where(w > cap, cap, w)
    if UNIT:
        w = w / norm * half
    store(w_ptr, w, G, active, rows, numbers, K, P, NORM, True)


@triton.jit
def ball(C, b, a, active, c, part, idx, K: tl.constexpr):
    """z >= 0 with d = g0 + sum_i z_i u_i at the best place within c of the mean g0 of length 1, for unit rows u with cosines C and b_i = u_i'g0.

    Best is where min_i (u_i'd) / a_i is largest. The places for all radii are the solutions z(t) of min 1/2 z'(C + aa')z + (b - t a)'z
    over z >= 0: on the rows of z the slope is a_i (t - a'z), on no row is it less. Newton's method looks for the t with z'Cz = c^2, exact
    once the set is known. Rounds 0 and 1 solve the same problem with other numbers: z with slopes of 0, the harmless place nearest to g0,
    and the shortest vector of the hull, which tells whether zero lies in it; then no direction helps every row. `part` of the diagonal of C
    is lift: where little more is left of that vector, it is zero as far as the Gramian tells.
    """
    one = tl.where(idx[:, None] == idx[None, :], 1.0, 0.0)
    pair = active[:, None] & active[None, :]
    z = b * 0.0
    harmless = z
    inside = active & (b < 0.0)
    zero = tl.sum(z, axis=0)
    t, low, high = zero, zero, zero
    going = tl.full((), 1, tl.int32)
    going = going - 1
    running = going + 1
    while running > 0:
        lift = tl.where(going == 0, 0.0, tl.where(going == 1, tl.where(active, 1.0, 0.0), a))
        size = tl.sqrt(1.0 + lift * lift)
        A = tl.where(pair & (one == 0.0), (C + lift[:, None] * lift[None, :]) / (size[:, None] * size[None, :]), one)
        q = (tl.where(going == 1, 0.0, b) - tl.where(going == 1, 1.0, t) * lift) / size
        reach = tl.sum(tl.abs(q), axis=0)
        x, T, inside = nonnegative(A, q, inside, active, reach, 1e-10, 0.0, idx, K)
        x = x / size
        Cx = times(C, x)
        square = tl.sum(x * Cx, axis=0)
        if going == 0:
            harmless = x
            z = x
            first = tl.min(tl.where(a > 0.0, b / tl.where(a > 0.0, a, 1.0), float("inf")), axis=0)  # below it z is zero
            t = tl.sum(a * x, axis=0)
            if square > c * c * 1.000000001:
                low = first
                high = t
                going += 1  # round 1 is left out
            else:
                low = tl.maximum(t, first)
                high = low * 0.0 + float("inf")
                t = low + c
                inside = active
        elif going == 1:
            total = tl.sum(x, axis=0)
            if square <= tl.maximum(1e-12 * total * total, 4.0 * part * tl.sum(x * x, axis=0)):
                running = running * 0
            inside = active & (harmless > 0.0)
        else:
            z = x
            gap = c * c - square
            total = tl.sum(x, axis=0)
            if gap > 0.0:
                low = t
            else:
                high = t
            # along the path of this set z moves by u / size for each unit of t
            r = tl.where(inside, lift / size, 0.0)
            u = inverse_times(T, inside, r)
            u = (u + inverse_times(T, inside, r - times(A, u))) / size
            slope = tl.sum(u * Cx, axis=0)
            bend = tl.sum(u * times(C, u), axis=0)
            root = slope * slope + bend * gap
            below = slope + tl.sqrt(tl.maximum(root, 0.0))
            found = (root >= 0.0) & (below > 0.0)
            step = tl.where(found, gap / tl.where(found, below, 1.0), 0.0)
            to = t + step
            if (tl.abs(gap) <= 1e-15 * (c * c + total * total)) | (tl.abs(step) <= 1e-15 * tl.abs(t)) & found:
                running = running * 0
            middle = tl.where(high < float("inf"), 0.5 * (low + high), 2.0 * t - low + c)
            t = tl.where(found & (to > low) & (to < high) & (going < 40), to, middle)
        going += 1
        if going > 100:
            running = running * 0
    square = tl.sum(z * times(C, z), axis=0)
    return z * tl.minimum(c / tl.sqrt(tl.where(square > 0.0, square, c * c)), 1.0)


@kernel
def cagrad(
    G_ptr, mask_ptr, rng_ptr, numbers, w_ptr, mask_stride: tl.int64, problems: tl.int64, K: tl.constexpr, P: tl.constexpr, HAS_MASK: tl.constexpr,
    NORM: tl.constexpr
):  # fmt: skip
    idx = tl.arange(0, P)
    G, active, rows, _ = load(G_ptr, mask_ptr, numbers, mask_stride, problems, K, P, HAS_MASK, NORM, True)
    c, rescale = parameter(numbers, 1), parameter(numbers, 2)
    shrink = 1.0 / tl.where(rescale == 1.0, 1.0 + c * c, tl.where(rescale == 2.0, 1.0 + c, 1.0))
    count = number(active)
    even = tl.where(active, 1.0 / count, 0.0)
    norm, C = cosines(G, active, idx)
    slope = times(G, even)
    part = lift_of(active, numbers, problems, NORM)
    part = part / (1.0 + part)  # of the diagonal of G, that no gradient has
    mean2 = tl.sum(even * slope, axis=0) - part * tl.sum(even * even * norm * norm, axis=0)
    reach = tl.sum(even * norm, axis=0)
    w = even
    if (mean2 > cancelled(numbers) * reach * reach) & (c > 0.0):  # else the mean gradient is rounding
        length = tl.sqrt(mean2)
        shortest_row = tl.min(tl.where(active, norm, float("inf")), axis=0)
        a = tl.where(active, shortest_row / norm, 0.0)
        z = ball(C, tl.where(active, slope / norm / length, 0.0), a, active, c, part, idx, K)
        w += share(tl.where(active, z * length / norm, 0.0), G, idx, K)
    store(w_ptr, shrink * w, G, active, rows, numbers, K, P, NORM, True)
