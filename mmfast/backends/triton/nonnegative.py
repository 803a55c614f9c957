"""min 1/2 x'Cx + q'x over x >= 0, for a positive semidefinite C with a unit diagonal and q in its range: exact, in finitely many steps.

The active-set method of csrc/solvers/nnls.h on a table in place of a factor: T is C after exchanging (sweeping) the rows of the set,
with -C_SS^-1 in the set, C_NS C_SS^-1 beside it, and the Schur complement outside. A row joins or leaves by one update of rank 1. Slacks come
from C itself and the table only corrects x, so that its rounding does not stay in the result; where it has gathered too much, it is made anew.
"""

import triton
import triton.language as tl

from mmfast.backends.triton.problem import column, pick, times


@triton.jit
def exchange(T, at, c, pivot):
    """The table after the row where `at`, with column c, joins the set (pivot > 0) or leaves it (pivot < 0)."""
    share = c / tl.abs(pivot)
    out = T - c[:, None] * (c / pivot)[None, :]
    out = tl.where(at[None, :], share[:, None], out)
    out = tl.where(at[:, None], share[None, :], out)
    return tl.where(at[:, None] & at[None, :], -1.0 / pivot, out)


@triton.jit
def table(C, inside, idx, K: tl.constexpr, least):
    """(the table of a set made anew, the set): rows whose pivot is less than `least` are dependent and taken out of it."""
    T = C
    for k in range(K):
        at = (idx == k) & inside
        if tl.max(tl.where(at, 1, 0), axis=0) > 0:
            c = column(T, at)
            pivot = pick(c, at)
            if pivot > least:
                T = exchange(T, at, c, tl.maximum(pivot, 1e-15))
            else:
                inside = inside & ~at
    return T, inside


@triton.jit
def inverse_times(T, inside, r):
    """C_SS^-1 r_S from the table, zero outside the set."""
    return tl.where(inside, -times(T, tl.where(inside, r, 0.0)), 0.0)


@triton.jit
def nonnegative(C, q, inside, free, reach, noise, hidden, idx, K: tl.constexpr):
    """(x [P], its table, its set), x zero where not free; `inside` guesses the set, reach is the size of the sums that q is made of.

    A row dependent on the set whose slack is less than `noise`, or `hidden` times its weights, of the sums below zero stays out: near-opposite members
    amplify rounding, and a pivot of rounding hides a part of its length.
    """
    # from the guess all leave at once whose x would be negative, until none is: most problems end here
    x = q * 0.0
    T, inside = table(C, inside, idx, K, 1e-10)
    guessing = tl.full((), 1, tl.int32)
    while guessing > 0:
        x = inverse_times(T, inside, -q)
        negative = inside & ~(x > 0.0)
        guessing = tl.max(tl.where(negative, 1, 0), axis=0)
        if guessing > 0:
            T, inside = table(C, inside & ~negative, idx, K, 1e-10)

    left_out = ~free  # rows that cannot join: not free, or rounding alone would take them in
    entering = tl.full((), -1, tl.int32)  # the row whose x is being raised
    stale = tl.full((), 0, tl.int32)  # whether a row left the table since it was made
    going = tl.full((), 1, tl.int32)
    for_ever = 8 * K + 32
    while going > 0:
        going += 1
        slack = q + times(C, x)
        moved = tl.where(inside, x - inverse_times(T, inside, slack), x)
        if tl.min(tl.where(inside, moved, 1.0), axis=0) > 0.0:
            x = moved
            slack = q + times(C, x)
        size = reach + tl.sum(x, axis=0)
        unsettled = tl.max(tl.where(inside, tl.abs(slack), 0.0), axis=0) > 1e-12 * size
        if unsettled & (stale > 0):
            T, inside = table(C, inside, idx, K, -1.0)
            stale = stale * 0
        else:
            candidates = tl.where(inside | left_out, float("inf"), slack)
            found = tl.argmin(candidates, axis=0)
            violated = tl.min(candidates, axis=0) < -1e-13 * size
            at = idx == tl.where(entering >= 0, entering, found)
            if violated | (entering >= 0):
                c = column(T, at)
                pivot, lack = pick(c, at), pick(slack, at)
                z = tl.where(inside, c, 0.0)
                weights = 1.0 + tl.sum(tl.abs(z), axis=0)
                falls = z > 1e-12 * weights  # less is rounding and never reaches zero
                until = tl.where(falls, x / tl.where(falls, z, 1.0), float("inf"))
                partial, first = tl.min(until, axis=0), tl.argmin(until, axis=0)
                independent = pivot > 1e-15 * weights * weights
                full = tl.where(independent, tl.maximum(-lack, 0.0) / tl.where(independent, pivot, 1.0), float("inf"))
                if (full == float("inf")) & ((lack >= -tl.maximum(weights * hidden, noise) * size) | (partial == float("inf"))):
                    left_out = left_out | at
                    entering = entering * 0 - 1
                else:
                    step = tl.minimum(full, partial)
                    x = tl.where(at, x + step, tl.where(inside, tl.maximum(x - step * z, 0.0), x))
                    if full <= partial:
                        inside = inside | at
                        T = exchange(T, at, c, pivot)
                        entering = entering * 0 - 1
                    else:
                        entering = tl.where(entering >= 0, entering, found)
                        out = idx == first
                        x = tl.where(out, 0.0, x)
                        inside = inside & ~out
                        leaving = column(T, out)
                        depth = pick(leaving, out)
                        if (depth < -0.5) & (depth > -1e4):
                            T = exchange(T, out, leaving, depth)
                            stale = stale * 0 + 1
                        else:  # it was nearly dependent: the update would lose too many digits
                            T, inside = table(C, inside, idx, K, -1.0)
                            stale = stale * 0
            else:
                going = going * 0
        if going > for_ever:
            going = going * 0
    return x, T, inside
