"""Keeping the norm of the plain sum where the Gramian loses it: lengths measured on the elements; mirrors mmfast/resolvers/norm.py.

The norm of a problem is three numbers: the factor, whether that is settled (1, or 0 where lengths are to be measured), and the noise. A kernel that measures
finds them first, and reads no gradient where they are settled. Its slots hold sums of squares; whoever needs the factor adds them up.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from mmfast.backends.triton.problem import exponent_of, half_of, number, parameter, power_of_two
from mmfast.resolvers import norm

MEASURED, KNOWN, MARGIN, LARGEST = (tl.constexpr(x) for x in (norm.MEASURED, norm.KNOWN, norm.MARGIN, norm.LARGEST))
# what settles a problem: nothing, its norm as given, its norm as found from the Gramian
ALWAYS, TOLD, FOUND = (tl.constexpr(i) for i in range(3))
SLOTS = 1024  # of a problem
LANES = tl.constexpr(128)  # that add up slots


class Measured(NamedTuple):
    """What the factor of each problem is made of."""

    norms: Tensor  # [problems, 3]: factor, settled, noise
    slots: Tensor  # [problems, slots, 2]: sums of squares of the plain sum and of the weighted one, where not settled


@triton.jit
def of_gramian(G_ptr, w_ptr, shifted_ptr, numbers, problem, k, P: tl.constexpr):
    """(factor, settled, noise) of the weights w of a problem; `shifted` are those of its Gramian changed within its precision."""
    precision = parameter(numbers, 0)
    idx = tl.arange(0, P)
    inside = idx < k
    at, w_at = G_ptr + problem * k * k, problem * k
    squares = tl.load(at + idx * (k + 1), mask=inside, other=0.0)
    rows = squares != 0.0
    half = half_of(tl.sum(squares, axis=0))
    given = tl.load(w_ptr + w_at + idx, mask=inside, other=0.0)
    exponent = exponent_of(tl.where(rows, given, 0.0))
    unit, inverse = power_of_two(exponent), power_of_two(-exponent)
    w = tl.where(rows, given, 0.0) * inverse
    change = w - tl.where(rows, tl.load(shifted_ptr + w_at + idx, mask=inside, other=0.0), 0.0) * inverse
    # some rows at a time, so that many do not need as many registers
    R: tl.constexpr = min(P, 16)
    plain, ours, moved = tl.zeros([R], tl.float64), tl.zeros([R], tl.float64), tl.zeros([R], tl.float64)
    for first in range(0, P, R):
        i = first + tl.arange(0, R)
        there = tl.load(at + i * (k + 1), mask=i < k, other=0.0) != 0.0
        tile = half * tl.load(at + i[:, None] * k + idx[None, :], mask=there[:, None] & rows[None, :], other=0.0) * half
        w_i = tl.load(w_ptr + w_at + i, mask=there, other=0.0) * inverse
        plain += tl.sum(tile, axis=1)
        ours += w_i * tl.sum(tile * w[None, :], axis=1)
        moved += (w_i - tl.load(shifted_ptr + w_at + i, mask=there, other=0.0) * inverse) * tl.sum(tile * change[None, :], axis=1)
    plain, ours, moved = tl.sum(plain, axis=0), tl.sum(ours, axis=0), tl.sum(moved, axis=0)
    length = tl.sqrt(half * tl.maximum(squares, 0.0) * half)
    plain_reach, reach = tl.sum(length, axis=0), tl.sum(tl.abs(w) * length, axis=0)
    least = precision * MEASURED
    lift = number(rows) * precision
    settled = tl.where((plain >= least * plain_reach * plain_reach) & (ours >= least * reach * reach), 1.0, 0.0)
    moved = tl.sqrt(tl.maximum(moved + lift * tl.sum(change * change * length * length, axis=0), 0.0))
    noise = tl.where(ours < lift * KNOWN * reach * reach, moved * MARGIN / half * unit, 0.0)
    factor = tl.sqrt(tl.where(ours > 0.0, tl.maximum(plain, 0.0) / tl.where(ours > 0.0, ours, 1.0), 0.0)) * inverse
    # weights that are no numbers stay what they are
    lost = tl.max(tl.where(tl.abs(given) < float("inf"), 0, 1), axis=0) > 0
    return tl.where(lost, 1.0, factor), tl.where(lost, 1.0, settled), tl.where(lost, 0.0, noise)


@triton.jit
def final_factor(norms_ptr, slots_ptr, problem, per_problem):
    """(the factor of a problem, whether it was settled): norm.measured of its slots where it was not."""
    factor, settled = tl.load(norms_ptr + 3 * problem), tl.load(norms_ptr + 3 * problem + 1)
    if settled == 0.0:
        noise = tl.load(norms_ptr + 3 * problem + 2)
        lane = tl.arange(0, LANES)
        plains, squares = tl.zeros([LANES], tl.float64), tl.zeros([LANES], tl.float64)
        slot = per_problem * 0
        while slot < per_problem:
            at = slots_ptr + (problem * per_problem + slot + lane) * 2
            plains += tl.load(at, mask=slot + lane < per_problem, other=0.0)
            squares += tl.load(at + 1, mask=slot + lane < per_problem, other=0.0)
            slot += LANES
        plain, ours = tl.sum(plains, axis=0), tl.sum(squares, axis=0)
        factor = tl.where(ours > 0.0, tl.sqrt(plain) / tl.sqrt(tl.where(ours > 0.0, ours, 1.0)), 0.0)
        trust = tl.sqrt(ours) / tl.where(noise > 0.0, noise, 1.0)
        most = tl.maximum(factor * trust * trust, LARGEST)
        factor = tl.where((noise > 0.0) & (trust < 1.0), tl.minimum(factor, most), factor)
        factor = tl.where((plain < float("inf")) & (ours < float("inf")), factor, float("nan"))
    return factor, settled


@triton.jit
def settle(G_ptr, w_ptr, shifted_ptr, norms_ptr, numbers, problem, is_first, k, P: tl.constexpr, SETTLED: tl.constexpr):
    """Whether a problem is settled; its first program stores the norm that is found."""
    settled = tl.zeros([], tl.float64)
    if SETTLED == TOLD:
        settled = tl.load(norms_ptr + 3 * problem + 1)
    if SETTLED == FOUND:
        factor, settled, noise = of_gramian(G_ptr, w_ptr, shifted_ptr, numbers, problem, k, P)
        if is_first:
            tl.store(norms_ptr + 3 * problem, factor)
            tl.store(norms_ptr + 3 * problem + 1, settled)
            tl.store(norms_ptr + 3 * problem + 2, noise)
    return settled
