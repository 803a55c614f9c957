"""What every solver's kernel does before and after its rule: missing rows, scale, norm; mirrors reference.solve.

One program solves one problem. Its matrices are [P, P] tiles of registers, P the next power of two of K; rows that do not take part
have 1 on the diagonal and 0 elsewhere, as in the plain-torch rules. A number at a place of a vector is picked by a mask and a sum.
"""

import triton
import triton.language as tl


@triton.jit
def parameter(numbers, i: tl.constexpr):
    """Number i of solve.packed()."""
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
def load(G_ptr, mask_ptr, K: tl.constexpr, mask_stride, P: tl.constexpr, HAS_MASK: tl.constexpr):
    """(G / scale, active, rows, half): rows are there, active where the problem is finite too; half is scale^(-1/2), a power of two."""
    idx = tl.arange(0, P)
    problem = tl.program_id(0).to(tl.int64)
    inside = idx < K
    raw = tl.load(G_ptr + problem * K * K + idx[:, None] * K + idx[None, :], mask=inside[:, None] & inside[None, :], other=0.0)
    squares = diagonal(raw, idx)
    rows = squares != 0.0
    if HAS_MASK:
        rows = rows & (tl.load(mask_ptr + problem * mask_stride + idx, mask=inside, other=0) != 0)
    pair = rows[:, None] & rows[None, :]
    trace = pick(squares, rows)
    wrong = tl.max(tl.max(tl.where(pair & ~(tl.abs(raw) < float("inf")), 1, 0), axis=1), axis=0) + tl.where(trace < float("inf"), 0, 1)
    active = rows & (idx * 0 + wrong == 0)  # the interpreter cannot broadcast a comparison of scalars

    # the power of four that brings the trace into [1, 4); an exponent of a subnormal number is read off a larger one
    tiny = trace < 2.2250738585072014e-308
    bits = tl.where(tiny, tl.where(tiny, trace, 0.0) * 18014398509481984.0, trace).to(tl.int64, bitcast=True)
    exponent = ((bits >> 52) & 2047) - 1023 - tl.where(tiny, 54, 0)
    half = power_of_two(tl.where(trace > 0.0, -((exponent - (exponent & 1)) // 2), 0))
    # twice, for the whole factor may not be a number where its halves are
    G = tl.where(active[:, None] & active[None, :], half * raw * half, tl.where(idx[:, None] == idx[None, :], 1.0, 0.0))
    return G, active, rows, half


@triton.jit
def store(w_ptr, w, G, active, rows, precision, K: tl.constexpr, P: tl.constexpr, PRESERVE_NORM: tl.constexpr):
    """Writes the weights w where active, 0 in missing rows, NaN in a problem that is not finite."""
    idx = tl.arange(0, P)
    w = tl.where(active, w, 0.0)
    if PRESERVE_NORM:
        pair = active[:, None] & active[None, :]
        plain = tl.sum(tl.sum(tl.where(pair, G, 0.0), axis=1), axis=0)
        ours = tl.sum(tl.sum(tl.where(pair, G * w[:, None] * w[None, :], 0.0), axis=1), axis=0)
        reach = tl.sum(tl.abs(w) * tl.sqrt(tl.maximum(diagonal(G, idx), 0.0)), axis=0)
        floor = 16.0 * precision * reach * reach  # below it the length of d is rounding of G: not to be blown up
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
