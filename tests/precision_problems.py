"""Gradients whose Gramian is rounded: many shapes, low ranks, with zero in their hull and without, in float32 and bfloat16."""

import torch
from torch import Tensor

SIZES = [(2, 2), (3, 2), (5, 2), (8, 3), (3, 50), (8, 200), (16, 10), (64, 10), (64, 200)]
KINDS = ["normal", "rank", "half rank", "hull", "agree", "stationary", "opposite", "spread", "copies"]


def gradients(kind: str, k: int, n: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """J [k, n] of the dtype."""
    generator = torch.Generator().manual_seed(1000 * seed + 10 * k + n)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, dtype=torch.float64, generator=generator)

    J = randn(k, n)
    if kind == "rank":  # one direction, both signs
        J = randn(k, 1) @ randn(1, n)
    elif kind == "half rank":
        r = max(1, min(k, n) // 2)
        J = randn(k, r) @ randn(r, n)
    elif kind == "hull":  # zero is a positive combination of all rows
        weight = torch.rand(k, dtype=torch.float64, generator=generator) + 0.1
        J[-1] = -(weight[:-1] @ J[:-1]) / weight[-1]
    elif kind == "agree":  # no conflict at all
        J = J.abs()
    elif kind == "stationary":  # a batch near its optimum: the plain sum is small
        J = J - J.mean(0) * (1 - 1e-3)
    elif kind == "opposite":  # pairs that differ from opposite ones by little
        J[1::2] = -J[0 : k - k % 2 : 2] * 1.7 + 1e-3 * J[1::2]
    elif kind == "spread":
        J = J * torch.logspace(-3, 3, k, dtype=torch.float64).unsqueeze(1)
    elif kind == "copies":
        J = torch.cat([J[: k - k // 2], J[: k // 2]])
    return J.to(dtype)
