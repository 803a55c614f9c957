"""What every solver's kernel does before and after its rule: missing rows, scale, lift, norm; mirrors mmfast/resolvers/solve.py.

One program solves one problem. Its matrices are [P, P] tiles of registers, P the next power of two of K; rows that do not take part
have 1 on the diagonal and 0 elsewhere, as in the plain-torch rules. A number at a place of a vector is picked by a mask and a sum.

NORM says what is done for a norm that is to be preserved: 0 nothing, 1 it is in the weights, as far as the Gramian tells, 2 as many programs again
solve the problems with Gramians changed within their precision, for norm.py.
"""

import struct
from collections.abc import Sequence

import triton
import triton.language as tl


def packed(params: Sequence[float]) -> tuple[int, ...]:
    """The bits of numbers as arguments of a kernel, 32 at a time: a float would be rounded to float32, and a tensor copied to the device.

    Odd and beyond 32 bits, so that all are alike to the compiler.
    """
    bits = [int.from_bytes(struct.pack("<d", x), "little") for x in params]
    return tuple((1 << 40) + 2 * half + 1 for x in bits for half in (x >> 32, x & 0xFFFFFFFF))


@triton.jit
def parameter(numbers, i: tl.constexpr):
    """Number i of `packed`."""
    high, low = numbers[2 * i].to(tl.int64) >> 1, numbers[2 * i + 1].to(tl.int64) >> 1
    return ((high << 32) | (low & 0xFFFFFFFF)).to(tl.float64, bitcast=True)


@triton.jit
def parameters(numbers, first: tl.constexpr, idx, K: tl.constexpr):
    """K of them at the places of a vector."""
    found = tl.zeros_like(idx).to(tl.float64)
    for i in tl.static_range(K):
        found = tl.where(idx == i, parameter(numbers, first + i), found)
    return found


@triton.jit
def preference(numbers, first: tl.constexpr, active, idx, K: tl.constexpr, GIVEN: tl.constexpr):
    """K preferences from place `first` on, or equal ones; zero for rows that do not take part."""
    if GIVEN:
        pref = parameters(numbers, first, idx, K)
    else:
        pref = 1.0 / number(active)
    return tl.where(active, pref, 0.0)


@triton.jit
def times(T, x):
    """T x for a symmetric tile."""
    return tl.sum(T * x[None, :], axis=1)


@triton.jit
def pick(x, at):
    """The sum of x where `at`: x itself at one place."""
    return tl.sum(tl.where(at, x, 0.0), axis=0)


@triton.jit
def column(T, at):
    """The column of a symmetric tile where `at`."""
    return tl.sum(tl.where(at[None, :], T, 0.0), axis=1)


@triton.jit
def diagonal(T, idx):
    return tl.sum(tl.where(idx[:, None] == idx[None, :], T, 0.0), axis=1)


@triton.jit
def number(at):
    """How many places `at` holds, float64; at least 1, to be divided by."""
    return tl.maximum(tl.sum(at.to(tl.int32), axis=0), 1).to(tl.float64)


@triton.jit
def power_of_two(exponent):
    """2^exponent in float64, for an int64 exponent of a normal number."""
    return ((exponent + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def exponent_of(w):
    """The exponent of a power of two near the largest weight: weights that follow the gradients' lengths may have squares that no number holds."""
    largest = tl.max(tl.abs(w), axis=0)
    usable = (largest > 2.2250738585072014e-308) & (largest < float("inf"))
    return ((tl.where(usable, largest, 1.0).to(tl.int64, bitcast=True) >> 52) & 2047) - 1023


@triton.jit
def problem_of(problems, NORM: tl.constexpr):
    """The problem of this program."""
    problem = tl.program_id(0).to(tl.int64)
    if NORM == 2:
        problem = problem % problems
    return problem


@triton.jit
def entries(G_ptr, i, j, wanted, numbers, problems, K: tl.constexpr, NORM: tl.constexpr):
    """Entries (i, j) of the Gramian of this program where `wanted`, else 0; changed as norm.shifted does where it solves a problem again."""
    at = G_ptr + problem_of(problems, NORM) * K * K
    found = tl.load(at + i * K + j, mask=wanted, other=0.0)
    if NORM == 2:
        change = tl.where(tl.program_id(0) >= problems, parameter(numbers, 0), 0.0)
        odd = i & j  # Hadamard's pattern: whether the number of bits that both have is odd
        odd = odd ^ (odd >> 4)
        odd = odd ^ (odd >> 2)
        odd = odd ^ (odd >> 1)
        length_i = tl.sqrt(tl.maximum(tl.load(at + i * (K + 1), mask=i < K, other=0.0), 0.0))
        length_j = tl.sqrt(tl.maximum(tl.load(at + j * (K + 1), mask=j < K, other=0.0), 0.0))
        found += tl.where((odd & 1) != 0, -change, change) * length_i * length_j
    return found


@triton.jit
def half_of(trace):
    """scale^(-1/2), for scale the power of four that brings the trace into [1, 4)."""
    tiny = trace < 2.2250738585072014e-308  # an exponent of a subnormal number is read off a larger one
    bits = tl.where(tiny, tl.where(tiny, trace, 0.0) * 18014398509481984.0, trace).to(tl.int64, bitcast=True)
    exponent = ((bits >> 52) & 2047) - 1023 - tl.where(tiny, 54, 0)
    return power_of_two(tl.where(trace > 0.0, -((exponent - (exponent & 1)) // 2), 0))


@triton.jit
def lift_of(active, numbers, problems, NORM: tl.constexpr):
    """By how much, relative to the squared norms, the diagonal is raised for rules that follow the inverse of a rounded Gramian; twice where it is solved again."""
    precision = parameter(numbers, 0)
    lift = tl.where(precision > 2.220446049250313e-16, tl.sum(active.to(tl.int32), axis=0).to(tl.float64) * precision, 0.0)
    if NORM == 2:
        lift *= tl.where(tl.program_id(0) >= problems, 2.0, 1.0)
    return lift


@triton.jit
def cancelled(numbers):
    """A squared length below this part of its summands' is what rounding left over."""
    return tl.maximum(1e-14, 8.0 * parameter(numbers, 0))


@triton.jit
def load(
    G_ptr, mask_ptr, numbers, mask_stride, problems, K: tl.constexpr, P: tl.constexpr, HAS_MASK: tl.constexpr, NORM: tl.constexpr, LIFTS: tl.constexpr
):  # fmt: skip
    """(G / scale, lifted where LIFTS, active, rows, half): rows are there, active where the problem is finite too; half is scale^(-1/2)."""
    idx = tl.arange(0, P)
    one = idx[:, None] == idx[None, :]
    inside = idx < K
    raw = entries(G_ptr, idx[:, None], idx[None, :], inside[:, None] & inside[None, :], numbers, problems, K, NORM)
    squares = diagonal(raw, idx)
    rows = squares != 0.0
    if HAS_MASK:
        rows = rows & (tl.load(mask_ptr + problem_of(problems, NORM) * mask_stride + idx, mask=inside, other=0) != 0)
    pair = rows[:, None] & rows[None, :]
    trace = pick(squares, rows)
    wrong = tl.max(tl.max(tl.where(pair & ~(tl.abs(raw) < float("inf")), 1, 0), axis=1), axis=0) + tl.where(trace < float("inf"), 0, 1)
    active = rows & (idx * 0 + wrong == 0)  # the interpreter cannot broadcast a comparison of scalars
    half = half_of(trace)
    # twice, for the whole factor may not be a number where its halves are
    G = tl.where(active[:, None] & active[None, :], half * raw * half, tl.where(one, 1.0, 0.0))
    if LIFTS:
        G += tl.where(one & active[:, None], lift_of(active, numbers, problems, NORM) * G, 0.0)
    return G, active, rows, half


@triton.jit
def store(w_ptr, w, G, active, rows, numbers, K: tl.constexpr, P: tl.constexpr, NORM: tl.constexpr, LIFTS: tl.constexpr):
    """Writes the weights w where active, 0 in missing rows, NaN in a problem that is not finite; G is as `load` gave it."""
    idx = tl.arange(0, P)
    w = tl.where(active, w, 0.0)
    if NORM == 1:  # norm.by_gramian
        if LIFTS:  # the norm is that of the gradients as they are
            G = tl.where(idx[:, None] == idx[None, :], G / (1.0 + lift_of(active, numbers, 0, NORM)), G)
        pair = active[:, None] & active[None, :]
        plain = tl.sum(tl.sum(tl.where(pair, G, 0.0), axis=1), axis=0)
        inverse = power_of_two(-exponent_of(w))
        w *= inverse
        ours = tl.sum(tl.sum(tl.where(pair, G * w[:, None] * w[None, :], 0.0), axis=1), axis=0)
        reach = tl.sum(tl.abs(w) * tl.sqrt(tl.maximum(diagonal(G, idx), 0.0)), axis=0)
        floor = 16.0 * parameter(numbers, 0) * reach * reach  # below it the length of d is rounding of G: not to be blown up
        known = reach > 0.0
        factor = tl.sqrt(tl.maximum(plain, 0.0) / tl.where(known, tl.maximum(ours, floor), 1.0))
        w = w * tl.where(known, factor, 0.0)
    w = tl.where(rows & ~active, float("nan"), w)
    tl.store(w_ptr + tl.program_id(0).to(tl.int64) * K + idx, w, mask=idx < K)


@triton.jit
def cosines(G, active, idx):
    """(norms, cosines with an exact 1 on the diagonal)."""
    norm = tl.sqrt(diagonal(G, idx))
    return norm, tl.where(idx[:, None] == idx[None, :], 1.0, G / (norm[:, None] * norm[None, :]))
