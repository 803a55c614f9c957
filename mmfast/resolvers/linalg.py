"""Batched symmetric linear algebra in plain torch, without synchronisation: eigenvalues by parallel Jacobi rotations."""

import torch
from torch import Tensor

from mmfast.resolvers.base import EPS

_JACOBI_ROWS = 256  # beyond, some 5000 rounds of small calls take minutes


def cosines(G: Tensor) -> tuple[Tensor, Tensor]:
    """(norms [B, K], cosines [B, K, K] with an exact 1 on the diagonal)."""
    norm = G.diagonal(dim1=-2, dim2=-1).sqrt()
    C = G / (norm.unsqueeze(-1) * norm.unsqueeze(-2))
    identity = torch.eye(G.shape[-1], dtype=G.dtype, device=G.device)
    return norm, torch.where(identity.bool(), identity, C)


def times(M: Tensor, x: Tensor) -> Tensor:
    """M x for M [..., K, K] and x [..., K]."""
    return (M @ x.unsqueeze(-1)).squeeze(-1)


def _turn(top: Tensor, bottom: Tensor, c: Tensor, s: Tensor, dim: int) -> Tensor:
    """Rotates top[i] against bottom[i] along dim and moves all but top[0] on by one chair: after n - 1 rounds every pair has met once."""
    top, bottom = c * top - s * bottom, s * top + c * bottom
    h = top.shape[dim]
    seats = (top.narrow(dim, 0, 1), bottom.narrow(dim, 0, 1), top.narrow(dim, 1, max(h - 2, 0)), bottom.narrow(dim, 1, h - 1))
    return torch.cat([*seats, top.narrow(dim, h - 1, 1)] if h > 1 else [top, bottom], dim)


def eigh(A: Tensor) -> tuple[Tensor, Tensor]:
    """(eigenvalues [B, K], eigenvectors in the columns of [B, K, K]) of symmetric A [B, K, K], by a fixed number of Jacobi sweeps.

    A row that is decoupled from the rest keeps its place: its eigenvalue is the one with its index. Small eigenvalues of a positive
    semidefinite matrix with badly scaled rows come out as accurate as large ones, down to the rounding of the largest.
    """
    k = A.shape[-1]
    if k > _JACOBI_ROWS:
        return _by_lapack(A)
    n = k + k % 2
    h = n // 2
    A = torch.nn.functional.pad(A, (0, n - k, 0, n - k))
    # two rows below the rounding of the largest are left alone: turning them against each other only undoes what was made zero
    rounding = 4 * EPS * A.diagonal(dim1=-2, dim2=-1).amax(-1, keepdim=True)
    V = torch.eye(n, dtype=A.dtype, device=A.device).expand_as(A)
    for _ in range((4 + (n - 1).bit_length()) * (n - 1)):  # sweeps: 64 rows need 9, 128 need 10
        diagonal = A.diagonal(dim1=-2, dim2=-1)
        p, q, off = diagonal[..., :h], diagonal[..., h:], 2 * A[..., :h, h:].diagonal(dim1=-2, dim2=-1)
        gap = q - p
        still = (off == 0) | (torch.maximum(p, q) <= rounding)
        # tangent of the angle, at most pi/4, that makes off zero
        t = torch.where(still, 0, off / (gap + torch.copysign(torch.hypot(gap, off), gap)))
        c = (1 + t * t).rsqrt()
        s = t * c
        columns = torch.cat([A, V], -2)
        columns = _turn(columns[..., :h], columns[..., h:], c.unsqueeze(-2), s.unsqueeze(-2), -1)
        A, V = columns[..., :n, :], columns[..., n:, :]
        A = _turn(A[..., :h, :], A[..., h:, :], c.unsqueeze(-1), s.unsqueeze(-1), -2)
    return A.diagonal(dim1=-2, dim2=-1)[..., :k], V[..., :k, :k]


def _by_lapack(A: Tensor) -> tuple[Tensor, Tensor]:
    """The same by torch.linalg.eigh, which waits for a GPU, and knows small eigenvalues to the rounding of the largest alone."""
    diagonal = A.diagonal(dim1=-2, dim2=-1)
    off = A - torch.diag_embed(diagonal)
    alone = (off == 0).all(-1)
    least = -1 - diagonal.sum(-1, keepdim=True)  # decoupled rows come first, in their order
    values, V = torch.linalg.eigh(off + torch.diag_embed(torch.where(alone, least, diagonal)))
    place = alone.int().argsort(dim=-1, descending=True, stable=True)
    values = torch.zeros_like(values).scatter(-1, place, values)
    V = torch.zeros_like(V).scatter(-1, place.unsqueeze(-2).expand_as(V), V)
    identity = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    return torch.where(alone, diagonal, values), torch.where(alone.unsqueeze(-2), identity, V)


def kept(values: Tensor, active: Tensor, precision: float) -> Tensor:
    """Which eigenvalues of active rows are more than the rounding of the Gramian [B, K]."""
    values = torch.where(active, values, 0)
    count = active.sum(-1, keepdim=True)
    return values > values.amax(-1, keepdim=True) * 8 * precision * count
