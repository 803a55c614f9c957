"""Eigenvalues and eigenvectors of a symmetric tile by cyclic Jacobi rotations; the criteria are those of mmfast/resolvers/linalg.py."""

import triton
import triton.language as tl

from mmfast.backends.triton.problem import column, diagonal, pick

_SWEEPS = tl.constexpr(16)  # 64 rows need 9


@triton.jit
def rotate(A, V, p, q, tangent, apq, idx):
    """A and V after a rotation of rows and columns p and q that makes A[p, q] zero."""
    cosine = 1.0 / tl.sqrt(1.0 + tangent * tangent)
    sine = tangent * cosine
    at_p, at_q = idx == p, idx == q
    Ap, Aq, Vp, Vq = column(A, at_p), column(A, at_q), column(V, at_p), column(V, at_q)
    # the corner has formulas of its own, which keep small eigenvalues accurate
    new_p = tl.where(at_p, Ap - tangent * apq, tl.where(at_q, 0.0, cosine * Ap - sine * Aq))
    new_q = tl.where(at_q, Aq + tangent * apq, tl.where(at_p, 0.0, sine * Ap + cosine * Aq))
    A = tl.where(at_p[None, :], new_p[:, None], tl.where(at_q[None, :], new_q[:, None], A))
    A = tl.where(at_p[:, None], new_p[None, :], tl.where(at_q[:, None], new_q[None, :], A))
    V = tl.where(at_p[None, :], (cosine * Vp - sine * Vq)[:, None], tl.where(at_q[None, :], (sine * Vp + cosine * Vq)[:, None], V))
    return A, V


@triton.jit
def eigh(A, idx, K: tl.constexpr):
    """(eigenvalues [P], eigenvectors in the columns of [P, P]); a row decoupled from the rest keeps its place."""
    V = tl.where(idx[:, None] == idx[None, :], 1.0, 0.0).to(tl.float64)
    # two rows below the rounding of the largest are left alone: turning them against each other only undoes what was made zero
    rounding = 8.881784197001252e-16 * tl.max(diagonal(A, idx), axis=0)
    sweep = tl.full((), 0, tl.int32)
    while sweep < _SWEEPS:
        sweep += 1
        turned = tl.full((), 0, tl.int32)
        for p in range(K - 1):
            for q in range(p + 1, K):
                Ap, Aq = column(A, idx == p), column(A, idx == q)
                app, apq, aqq = pick(Ap, idx == p), pick(Ap, idx == q), pick(Aq, idx == q)
                if (tl.abs(apq) > 1e-16 * tl.sqrt(tl.abs(app * aqq))) & (tl.maximum(app, aqq) > rounding):
                    gap, off = aqq - app, 2.0 * apq
                    length = tl.sqrt(gap * gap + off * off)
                    tangent = off / tl.where(gap < 0.0, gap - length, gap + length)
                    A, V = rotate(A, V, p, q, tangent, apq, idx)
                    turned += 1
        if turned == 0:
            sweep += _SWEEPS
    return diagonal(A, idx), V


@triton.jit
def kept(values, active, precision):
    """Which eigenvalues of active rows are more than the rounding of the Gramian."""
    values = tl.where(active, values, 0.0)
    return values > tl.max(values, axis=0) * 8.0 * precision * tl.sum(active.to(tl.int32), axis=0).to(tl.float64)
