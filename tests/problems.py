"""Gramians that a rule meets in practice and at its limits; all float64 [K, K]."""

from collections.abc import Iterator

import torch
from torch import Tensor


def gramian(k: int, n: int | None = None, seed: int = 0) -> Tensor:
    """Of k standard normal rows of n numbers (default 3 k + 5)."""
    J = torch.randn(k, n or 3 * k + 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return J @ J.mT


def kinds(k: int, seed: int = 0) -> Iterator[tuple[str, Tensor]]:
    """(name, Gramian): well conditioned, conflicting, badly scaled rows, rank deficient, copies, nearly opposite, orthogonal."""
    g = torch.Generator().manual_seed(seed + 1000 * k)
    n = 3 * k + 5
    J = torch.randn(k, n, dtype=torch.float64, generator=g)
    yield "normal", J @ J.mT
    few = torch.randn(k, max(1, k // 2 + 1), dtype=torch.float64, generator=g)
    yield "rank deficient", few @ few.mT
    spread = J * torch.logspace(-3, 3, k, dtype=torch.float64).unsqueeze(1)
    yield "norms over 10^6", spread @ spread.mT
    close = torch.randn(1, n, dtype=torch.float64, generator=g) + 0.3 * J
    yield "aligned", close @ close.mT
    yield "copies", torch.ones(k, k, dtype=torch.float64) * 2.5
    yield "orthogonal", torch.diag(torch.arange(1, k + 1, dtype=torch.float64))
    if k >= 2:
        opposite = J.clone()
        opposite[1] = -J[0] + 1e-3 * J[1]
        yield "nearly opposite", opposite @ opposite.mT
        centred = J - J.mean(0)
        yield "sums to zero", centred @ centred.mT
