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
def bargain(G, active, alpha, idx, K: tl.constexpr):
    """w > 0 with G w = w^(-1/alpha)."""
    norm, C = cosines(G, active, idx)
    share = 1.0 / alpha
    m = power(norm, (1.0 - alpha) / (1.0 + alpha))
    flat = 10.0 * tl.maximum(alpha / (1.0 + alpha), 1.0 / (alpha * 0.0 + 3.0))  # the ceiling is 1e-10 to this power
    most = tl.max(tl.where(active, m, 0.0), axis=0)
    ceiling = tl.where(most > 0.0, most, 1.0) * tl.exp(2.302585092994046 * flat)
    one = tl.where(idx[:, None] == idx[None, :], 1.0, 0.0)
    # the best multiple of what the rows would take alone
    own = tl.where(active, m, 0.0)
    alone = tl.sum(own * own, axis=0)
    together = tl.maximum(tl.sum(own * times(C, own), axis=0), 1e-6 * alone)
    start = power(tl.where(alone > 0.0, alone, 1.0) / tl.where(alone > 0.0, together, 1.0), alpha / (1.0 + alpha))
    x = tl.where(active, start * m, 1.0)
    last = alone * 0.0 + 1.0
    step = tl.full((), 0, tl.int32)
    while step < 100:
        step += 1
        u = tl.minimum(x / ceiling, 10.0)
        barrier = tl.where(u < 1e-4, 0.0, power(tl.where(u > 0.0, u, 1.0), 4.0 + 4.0 * share))
        pull = m * power(m / x, share)
        gradient = tl.where(active, pull * (1.0 - barrier) - times(C, x), 0.0)
        H = C + one * (pull / x * (share + (4.0 + 3.0 * share) * barrier))[:, None]
        size = tl.sqrt(tl.sum(one * H, axis=1))
        T, inside = table(tl.where(one > 0.0, 1.0, H / (size[:, None] * size[None, :])), active, idx, K, -1.0)
        part = inverse_times(T, inside, gradient / size) / size / x
        change = tl.max(tl.abs(part), axis=0)
        # small steps are plain: exp bends them out of the null space of C, where x may be large
        x = tl.where(tl.abs(part) < 0.1, x * (1.0 + part), x * tl.exp(tl.minimum(tl.maximum(part, -2.0), 2.0)))
        x = tl.minimum(x, 10.0 * ceiling)
        if (change < 1e-8) | ((change < 1e-4) & (change > 0.5 * last)):  # quadratic: the next step would be rounding
            step += 100
        last = change
    return x / norm


@kernel
def nash(
    G_ptr, mask_ptr, rng_ptr, numbers, w_ptr, mask_stride: tl.int64, K: tl.constexpr, P: tl.constexpr, HAS_MASK: tl.constexpr, PRESERVE_NORM: tl.constexpr
):  # fmt: skip
    """numbers: the largest norm of the direction, 0 for none."""
    idx = tl.arange(0, P)
    G, active, rows, half = load(G_ptr, mask_ptr, K, mask_stride, P, HAS_MASK)
    precision, most = parameter(numbers, 0), parameter(numbers, 1)
    w = tl.where(active, bargain(G, active, precision * 0.0 + 1.0, idx, K), 0.0)
    factor = half
    if most > 0.0:  # |d|^2 = w'Gw does not depend on the scale of G
        square = tl.sum(w * times(G, w), axis=0)
        factor = half * tl.minimum(1.0, most / tl.sqrt(tl.where(square > 0.0, square, most * most)))
    store(w_ptr, w * factor, G, active, rows, precision, K, P, PRESERVE_NORM)


@kernel
def fair(
    G_ptr, mask_ptr, rng_ptr, numbers, w_ptr, mask_stride: tl.int64, K: tl.constexpr, P: tl.constexpr, HAS_MASK: tl.constexpr, PRESERVE_NORM: tl.constexpr
):  # fmt: skip
    """numbers: alpha; 0 is the mean."""
    idx = tl.arange(0, P)
    G, active, rows, half = load(G_ptr, mask_ptr, K, mask_stride, P, HAS_MASK)
    precision, alpha = parameter(numbers, 0), parameter(numbers, 1)
    w = tl.where(active, 1.0, 0.0) / number(active)
    if alpha > 0.0:
        w = bargain(G, active, alpha, idx, K) * power(half, 2.0 * alpha / (1.0 + alpha))
    store(w_ptr, w, G, active, rows, precision, K, P, PRESERVE_NORM)
