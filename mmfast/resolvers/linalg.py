"""Batched symmetric linear algebra in plain torch, without synchronisation: eigenvalues by parallel Jacobi rotations."""

import torch
from torch import Tensor

EPS = torch.finfo(torch.float64).eps
SWEEPS = 12  # quadratic convergence: 64 rows need 9, 256 need 10


def cosines(G: Tensor) -> tuple[Tensor, Tensor]:
    """(norms [B, K], cosines [B, K, K] with an exact 1 on the diagonal)."""
    norm = G.diagonal(dim1=-2, dim2=-1).sqrt()
    C = G / (norm.unsqueeze(-1) * norm.unsqueeze(-2))
    identity = torch.eye(G.shape[-1], dtype=G.dtype, device=G.device)
    return norm, torch.where(identity.bool(), identity, C)


def _tournament(k: int) -> Tensor:
    """The place from which each place is filled after a round in which 2i met 2i + 1; k - 1 rounds meet every pair once."""
    top, bottom = list(range(0, k, 2)), list(range(1, k, 2))
    moved = torch.empty(k, dtype=torch.int64)
    moved[torch.tensor(top)] = torch.tensor(top[:1] + bottom[:1] + top[1:-1] if k > 2 else top)
    moved[torch.tensor(bottom)] = torch.tensor(bottom[1:] + top[-1:] if k > 2 else bottom)
    return moved


def eigh(A: Tensor) -> tuple[Tensor, Tensor]:
    """(eigenvalues [B, K], eigenvectors in the columns of [B, K, K]) of symmetric A [B, K, K], by a fixed number of Jacobi sweeps.

    A row that is decoupled from the rest keeps its place: its eigenvalue is the one with its index.
    """
    k = A.shape[-1]
    if k == 1:
        return A[..., 0], torch.ones_like(A)
    n = k + k % 2
    A = torch.nn.functional.pad(A, (0, n - k, 0, n - k))
    V = torch.eye(n, dtype=A.dtype, device=A.device).expand_as(A)
    moved = _tournament(n).to(A.device)
    stack = torch.cat([A, V], -2)  # a rotation turns the columns of both
    for _ in range(SWEEPS * (n - 1)):
        diagonal = stack[..., :n, :].diagonal(dim1=-2, dim2=-1)
        p, q, off = diagonal[..., 0::2], diagonal[..., 1::2], stack[..., :n:2, 1::2].diagonal(dim1=-2, dim2=-1)
        # tangent of the angle, |angle| <= pi/4, that makes off zero
        gap = q - p
        t = torch.where(off == 0, 0, 2 * off * torch.where(gap < 0, -1.0, 1.0) / (gap.abs() + torch.hypot(gap, 2 * off)))
        c = (1 + t * t).rsqrt()
        s = t * c
        left, right = stack[..., 0::2], stack[..., 1::2]
        c_, s_ = c.unsqueeze(-2), s.unsqueeze(-2)
        stack = torch.stack([c_ * left - s_ * right, s_ * left + c_ * right], -1).flatten(-2)[..., moved]
        A, V = stack[..., :n, :], stack[..., n:, :]
        c_, s_ = c.unsqueeze(-1), s.unsqueeze(-1)
        upper, lower = A[..., 0::2, :], A[..., 1::2, :]
        A = torch.stack([c_ * upper - s_ * lower, s_ * upper + c_ * lower], -2).flatten(-3, -2)[..., moved, :]
        stack = torch.cat([A, V], -2)
    return A.diagonal(dim1=-2, dim2=-1)[..., :k], V[..., :k, :k]


def kept(values: Tensor, active: Tensor) -> Tensor:
    """Which eigenvalues of active rows are more than the rounding of a float64 Gramian [B, K]."""
    values = torch.where(active, values, 0)
    count = active.sum(-1, keepdim=True)
    return values > values.amax(-1, keepdim=True) * 8 * EPS * count
