"""One row per rule: how to make it, what it promises, and how far given weights are from its own optimality conditions."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from mmfast.resolvers import alignment, bargaining, simple
from mmfast.resolvers.base import Resolver

# The two-row example every multi-task library is checked on: J and the golden weights of it.
GOLDEN_J = torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]], dtype=torch.float64)


@dataclass(frozen=True)
class Row:
    """What a rule promises.

    residual(G, w) is the worst violation of the rule's own optimality conditions, relative to the problem's size, for
    one full problem G [K, K] without missing rows; it must not call the rule's own code.
    """

    make: Callable[[int], Resolver]  # K -> a fresh resolver
    residual: Callable[[Tensor, Tensor], float] | None = None
    power: float | None = 0.0  # w(s G) = s^power w(G); None where no such law holds
    equivariant: bool = True  # permuting the rows permutes the weights
    nonconflicting: bool = False  # G w >= 0
    golden: tuple[float, ...] | None = None  # weights on GOLDEN_J
    golden_tolerance: float = 1e-4
    torchjd: Callable[[], object] | None = None  # the peer's aggregator that computes the same
    tolerance: float = 1e-8  # of residual
    min_k: int = 1


def _torchjd(name: str, *args: object) -> object:
    return getattr(importlib.import_module("torchjd.aggregation"), name)(*args)


def fair_residual(alpha: float) -> Callable[[Tensor, Tensor], float]:
    """G w = w^(-1/alpha), but for the documented barrier, per row; the rounding of G w itself, 45 eps of its terms, is let off."""

    def residual(G: Tensor, w: Tensor) -> float:
        norm = G.diagonal().sqrt()
        x, alone = norm * w, norm ** ((1 - alpha) / (1 + alpha))
        ceiling = 1e-10 ** -max(alpha / (1 + alpha), 1 / 3) * alone.max()
        wanted = w ** (-1 / alpha)
        gap = G @ w - wanted * (1 - (x / ceiling) ** (4 + 4 / alpha))
        return (gap.abs() / (wanted + 1e-6 * norm * x.sum())).max().item() if (w > 0).all() else torch.inf

    return residual


def _range_of_cosines(G: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(norms, cosines C, projector on the range of C)."""
    norm = G.diagonal().sqrt()
    C = G / (norm * norm.unsqueeze(1))
    values, V = torch.linalg.eigh(C)
    V = V[:, values > 8 * len(G) * torch.finfo(G.dtype).eps * values[-1]]
    return norm, C, V @ V.T


def _direction_residual(norm: Tensor, C: Tensor, P: Tensor, x: Tensor, size: Tensor) -> float:
    """x lies in the range of C and C x is proportional to P 1; both relative to size."""
    cosine, wanted = C @ x, P.sum(1)
    gap = cosine - wanted * (cosine @ wanted) / (wanted @ wanted)
    return max(gap.abs().max() / size, (x - P @ x).norm() / size).item()


def imtlg_residual(G: Tensor, w: Tensor) -> float:
    norm, C, P = _range_of_cosines(G)
    if P.sum() < 1e-20:
        return w.abs().max().item()
    x = norm * w
    return max(_direction_residual(norm, C, P, x, x.abs().sum()), ((w.sum() - 1).abs() / w.abs().sum()).item())


def config_residual(G: Tensor, w: Tensor) -> float:
    """Equal cosines, and the length of d is the sum of the rows' projections on it: |d|^2 = <sum_i g_i, d>."""
    norm, C, P = _range_of_cosines(G)
    if P.sum() < 1e-20:
        return w.abs().max().item()
    x, size = norm * w, norm.sum()
    d = w @ G
    length = ((d @ w - d.sum()).abs() / (size * (size + x.abs().sum()))).item()
    backwards = max(0.0, (-(C @ x).sum() / size).item() - 1e-12)
    return max(_direction_residual(norm, C, P, x, size + x.abs().sum()), length, backwards)


def aligned_residual(G: Tensor, w: Tensor) -> float:
    """Against w = sqrt(least eigenvalue) G^(-1/2) 1/K from LAPACK's QR iteration, which is accurate when the largest rows come last."""
    linalg = pytest.importorskip("scipy.linalg")
    order = G.diagonal().argsort()
    values, V = map(torch.from_numpy, linalg.eigh(G[order][:, order].numpy(), driver="ev", lower=False))
    keep = values > 8 * len(G) * torch.finfo(G.dtype).eps * values[-1]
    values, V = values[keep], V[:, keep]
    gap = w[order] - V @ ((values[0] / values).sqrt() * V.mean(0))
    return (gap.abs().max() / torch.maximum(w.abs().max(), (values[0] / values[-1]).sqrt() / len(G))).item()


RULES: dict[str, Row] = {
    "Sum": Row(lambda k: simple.Sum(), golden=(1, 1)),
    "Mean": Row(lambda k: simple.Mean(), golden=(0.5, 0.5)),
    "Constant": Row(lambda k: simple.Constant([float(i + 1) for i in range(k)]), equivariant=False, golden=(1, 2)),
    "Random": Row(lambda k: simple.Random(), equivariant=False),
    "NashMTL": Row(lambda k: bargaining.NashMTL(), fair_residual(1.0), power=-0.5, nonconflicting=True, golden=(0.5915, 0.4071)),
    "NashMTL(max_norm)": Row(lambda k: bargaining.NashMTL(max_norm=1.0), power=-0.5, nonconflicting=True, golden=(0.4182, 0.2878)),
    "FairGrad(0.5)": Row(lambda k: bargaining.FairGrad(0.5), fair_residual(0.5), power=-1 / 3, nonconflicting=True),
    "FairGrad": Row(lambda k: bargaining.FairGrad(), fair_residual(1.0), power=-0.5, nonconflicting=True, golden=(0.5915, 0.4071)),
    "FairGrad(2)": Row(lambda k: bargaining.FairGrad(2.0), fair_residual(2.0), power=-2 / 3, nonconflicting=True),
    "IMTLG": Row(lambda k: alignment.IMTLG(), imtlg_residual, golden=(0.5923, 0.4077), torchjd=lambda: _torchjd("IMTLG")),
    "AlignedMTL": Row(lambda k: alignment.AlignedMTL(), aligned_residual, golden=(0.5591, 0.4083), torchjd=lambda: _torchjd("AlignedMTL")),
    "AlignedMTL(median)": Row(lambda k: alignment.AlignedMTL("median")),
    "AlignedMTL(rmse)": Row(lambda k: alignment.AlignedMTL("rmse"), golden=(1.5109, 1.1033)),
    "ConFIG": Row(lambda k: alignment.ConFIG(), config_residual, golden=(1.2265, 0.8441), torchjd=lambda: _torchjd("ConFIG")),
    "ConFIG(geometric)": Row(lambda k: alignment.ConFIG(length="geometric")),
}
