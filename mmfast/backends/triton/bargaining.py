"""NashMTL and FairGrad in Triton: the Newton steps of csrc/solvers/bargaining.h, where the mathematics is told. numbers: the precision, then the rule's own."""

import triton
import triton.language as tl

from mmfast.backends.triton.nonnegative import inverse_times, table
from mmfast.backends.triton.problem import cosines, load, number, parameter, store, times
from mmfast.backends.triton.rows import kernel


@triton.jit
def power(x, exponent):
    return tl.exp(exponent * tl.log(x))


@triton.jit
def pulls(x, m, ceiling, share):
    """(what each row pulls with against (C x)_i, minus its derivative); cut off where x reaches the ceiling."""
    u = tl.minimum(x / ceiling, 10.0)
    barrier = tl.where(u < 1e-4, 0.0, power(tl.where(u > 0.0, u, 1.0), 4.0 + 4.0 * share))
    free = m * power(m / x, share)
    return free * (1.0 - barrier), free / x * (share + (4.0 + 3.0 * share) * barrier)


@triton.jit
def step_length(C, x, Cx, m, step, lowest, slope, ceiling, share, active):
    """How far to go along a step: to where the slope is a tenth of what it was, above `lowest`."""
    linear, square = tl.sum(Cx * step, axis=0), tl.sum(step * times(C, step), axis=0)
    falls = step < 0.0
    most = tl.min(tl.where(falls, (lowest - x) / tl.where(falls, step, 1.0), float("inf")), axis=0)
    left, right, t = linear * 0.0, most, tl.minimum(1.0, 0.9 * most)
    trial = tl.full((), 0, tl.int32)
    while trial < 12:
        trial += 1
        pull, curve = pulls(tl.where(active, x + t * step, 1.0), m, ceiling, share)
        here = linear + t * square - tl.sum(pull * step, axis=0)
        if tl.abs(here) > 0.1 * tl.abs(slope):
            right = tl.where(here > 0.0, t, right)
            left = tl.where(here > 0.0, left, t)
            to = t - here / (square + tl.sum(curve * step * step, axis=0))
            middle = tl.where(right < float("inf"), 0.5 * (left + right), 2.0 * t)
            t = tl.minimum(tl.where((to > left) & (to < right), to, middle), 8.0 * t)
            t = tl.where(right == most, tl.minimum(t, left + 0.9 * (right - left)), t)
        else:
            trial += 12
    return t


@triton.jit
def bargain(G, active, alpha, idx, K: tl.constexpr, SEARCHES: tl.constexpr):
    """w > 0 with G w = w^(-1/alpha); SEARCHES below alpha = 1/2, where powers bend too much for a whole step."""
    norm, C = cosines(G, active, idx)
    share = 1.0 / alpha
    m = power(norm, (1.0 - alpha) / (1.0 + alpha))
    height = alpha / (1.0 + alpha)
    if SEARCHES:
        height = tl.minimum(1.0 / 3.0, 1.3 * height)
    most = tl.max(tl.where(active, m, 0.0), axis=0)
    ceiling = tl.where(most > 0.0, most, 1.0) * tl.exp(23.02585092994046 * height)  # 1e-10 to the power -height
    one = tl.where(idx[:, None] == idx[None, :], 1.0, 0.0)
    # the best multiple of what the rows would take alone
    own = tl.where(active, m, 0.0)
    alone = tl.sum(own * own, axis=0)
    together = tl.maximum(tl.sum(own * times(C, own), axis=0), 1e-6 * alone)
    start = power(tl.where(alone > 0.0, alone, 1.0) / tl.where(alone > 0.0, together, 1.0), alpha / (1.0 + alpha))
    x = tl.where(active, start * m, 1.0)
    lowest = x * 0.0
    if SEARCHES:  # below every solution: no pull exceeds the sum of all x
        lowest = m * power(m / (2.0 * number(active) * ceiling), alpha)
        x = tl.where(active, tl.maximum(x, 1.01 * lowest), x)
    last = alone * 0.0 + 1.0
    step = tl.full((), 0, tl.int32)
    steps = tl.where(alpha < 0.1, 400, 100)
    while step < steps:
        step += 1
        pull, curve = pulls(x, m, ceiling, share)
        Cx = times(C, x)
        gradient = tl.where(active, pull - Cx, 0.0)
        H = C + one * curve[:, None]
        size = tl.sqrt(tl.sum(one * H, axis=1))
        T, inside = table(tl.where(one > 0.0, 1.0, H / (size[:, None] * size[None, :])), active, idx, K, -1.0)
        change = inverse_times(T, inside, gradient / size) / size
        part = change / x
        largest = tl.max(tl.abs(part), axis=0)
        if SEARCHES:
            length = largest * 0.0 + 1.0
            if largest > 0.1:
                length = step_length(C, x, Cx, m, change, lowest, tl.sum(gradient * change, axis=0), ceiling, share, active)
            largest = largest * length
            x = x + length * change
        else:  # small steps are plain: exp bends them out of the null space of C, where x may be large
            x = tl.where(tl.abs(part) < 0.1, x * (1.0 + part), x * tl.exp(tl.minimum(tl.maximum(part, -2.0), 2.0)))
        x = tl.minimum(x, 10.0 * ceiling)
        if (largest < 1e-8) | ((largest < 1e-4) & (largest > 0.5 * last)):  # quadratic: the next step would be rounding
            step = steps
        last = largest
    return x / norm


@kernel
def nash(
    G_ptr, mask_ptr, rng_ptr, numbers, w_ptr, mask_stride: tl.int64, problems: tl.int64, K: tl.constexpr, P: tl.constexpr, HAS_MASK: tl.constexpr,
    NORM: tl.constexpr
):  # fmt: skip
    """numbers: the largest norm of the direction, 0 for none."""
    idx = tl.arange(0, P)
    G, active, rows, half = load(G_ptr, mask_ptr, numbers, mask_stride, problems, K, P, HAS_MASK, NORM, True)
    most = parameter(numbers, 1)
    w = tl.where(active, bargain(G, active, most * 0.0 + 1.0, idx, K, False), 0.0)
    factor = half
    if most > 0.0:  # |d|^2 = w'Gw does not depend on the scale of G
        square = tl.sum(w * times(G, w), axis=0)
        factor = half * tl.minimum(1.0, most / tl.sqrt(tl.where(square > 0.0, square, most * most)))
    store(w_ptr, w * factor, G, active, rows, numbers, K, P, NORM, True)


@kernel
def fair(
    G_ptr, mask_ptr, rng_ptr, numbers, w_ptr, mask_stride: tl.int64, problems: tl.int64, K: tl.constexpr, P: tl.constexpr, HAS_MASK: tl.constexpr,
    NORM: tl.constexpr, SEARCHES: tl.constexpr,
):  # fmt: skip
    """numbers: alpha; 0 is the mean."""
    idx = tl.arange(0, P)
    G, active, rows, half = load(G_ptr, mask_ptr, numbers, mask_stride, problems, K, P, HAS_MASK, NORM, True)
    alpha = parameter(numbers, 1)
    w = tl.where(active, 1.0, 0.0) / number(active)
    if alpha > 0.0:
        w = bargain(G, active, alpha, idx, K, SEARCHES) * power(half, 2.0 * alpha / (1.0 + alpha))
    store(w_ptr, w, G, active, rows, numbers, K, P, NORM, True)
