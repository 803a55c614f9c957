"""One row per rule: how to make it, what it promises, and how far given weights are from its own optimality conditions."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from scipy.optimize import nnls
from torch import Tensor

from mmfast.resolvers import minnorm, simple
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


def _conditions(G: Tensor, w: Tensor, slope: Tensor, level: Tensor) -> float:
    """How far a slope lies below its level, in units of |g_i| sum_j |w_j| |g_j|.

    That is what a relative change of every gradient moves (Gw)_i by, so the unit is strict for a short row beside long ones.
    """
    norm = G.diagonal().sqrt()
    return ((level - slope) / (norm * (w.abs() * norm).sum())).max().item()


def mgda_residual(G: Tensor, w: Tensor) -> float:
    return max(_conditions(G, w, G @ w, w @ G @ w), (w.sum() - 1).abs().item(), -w.min().item())


def mgda_unit_residual(G: Tensor, w: Tensor) -> float:
    norm = G.diagonal().sqrt()
    return mgda_residual(G / norm.unsqueeze(0) / norm.unsqueeze(1), w * norm)


def _hull_misses_zero(G: Tensor) -> float:
    """About the length of the shortest vector of the hull of the rows scaled to length 1."""
    norm = G.diagonal().sqrt()
    values, vectors = torch.linalg.eigh(G / norm.unsqueeze(0) / norm.unsqueeze(1))
    A = torch.cat([(vectors * values.clamp(min=0).sqrt()).T, torch.ones(1, len(G), dtype=G.dtype)])
    target = torch.zeros(len(G) + 1, dtype=G.dtype)
    target[-1] = 1
    return float(nnls(A.numpy(), target.numpy(), maxiter=100 * len(G))[1])


def cagrad_residual(c: float, shrink: float = 1.0) -> Callable[[Tensor, Tensor], float]:
    """d = g0 + J'z with z >= 0 has the best worst case in the ball when |J'z| = c |g0| and z is on the worst rows only."""

    def residual(G: Tensor, w: Tensor) -> float:
        w = w / shrink
        k, norm = len(G), G.diagonal().sqrt()
        z, mean2 = w - 1 / k, G.sum().clamp(min=0) / k**2
        if mean2 <= 1e-14 * norm.mean() ** 2:  # no mean gradient beyond rounding, no ball
            return z.abs().max().item()
        slope, reach = G @ w, (w.abs() * norm).sum()
        negative = (-z.min() / w.max()).item()
        # where rows cancel, a squared length has only the digits that G leaves it
        unit = c**2 * (mean2 + 1e-6 * norm.mean() ** 2) + 1e-6 * (z.abs() * norm).sum() ** 2
        ball = ((z @ G @ z - c**2 * mean2) / unit).item()
        if abs(ball) <= 1e-8:
            return max(negative, abs(ball), _conditions(G, w, slope, z @ slope / z.sum()))
        # inside the ball only where nothing helps every row, and then harmless to all and nearest to the mean
        apart = (z @ slope).abs() / reach**2
        return max(negative, ball, _conditions(G, w, slope, torch.zeros_like(reach)), apart.item(), _hull_misses_zero(G) - 1e-6)

    return residual


def _torchjd_mgda() -> object:
    from torchjd.aggregation import MGDA

    return MGDA(epsilon=1e-6, max_iters=3000)


def _torchjd_cagrad() -> object:
    pytest.importorskip("cvxpy")
    from torchjd.aggregation import CAGrad

    return CAGrad(c=0.5)


RULES: dict[str, Row] = {
    "Sum": Row(lambda k: simple.Sum(), golden=(1, 1)),
    "Mean": Row(lambda k: simple.Mean(), golden=(0.5, 0.5)),
    "Constant": Row(lambda k: simple.Constant([float(i + 1) for i in range(k)]), equivariant=False, golden=(1, 2)),
    "Random": Row(lambda k: simple.Random(), equivariant=False),
    "MGDA": Row(lambda k: minnorm.MGDA(), mgda_residual, nonconflicting=True, golden=(0.6, 0.4), torchjd=_torchjd_mgda),
    "MGDA l2": Row(
        lambda k: minnorm.MGDA("l2"), mgda_unit_residual, power=-0.5, nonconflicting=True, golden=(0.5 / 18**0.5, 0.5 / 38**0.5)
    ),
    "CAGrad": Row(lambda k: minnorm.CAGrad(0.5), cagrad_residual(0.5), golden=(0.7041, 0.5), torchjd=_torchjd_cagrad),
    "CAGrad c=0.1": Row(lambda k: minnorm.CAGrad(0.1, rescale=2), cagrad_residual(0.1, 1 / 1.1)),
    "CAGrad c=1": Row(lambda k: minnorm.CAGrad(1.0, rescale=1), cagrad_residual(1.0, 0.5), nonconflicting=True),
    "CAGrad c=3": Row(lambda k: minnorm.CAGrad(3.0), cagrad_residual(3.0), nonconflicting=True),
}
