"""One row per rule: how to make it, what it promises, and how far given weights are from its own optimality conditions."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.optimize
import torch
from torch import Tensor

from mmfast.resolvers import compose, cone, magnitude, projection, robust, simple
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


def _size(G: Tensor, w: Tensor, expected: Tensor) -> float:
    """Error of w as a combination of gradients, relative to the expected one's summands."""
    d = G.diagonal().sqrt()
    return float(((w - expected).abs() * d).sum() / (expected.abs() * d).sum())


def _pcgrad_fixed(G: Tensor, w: Tensor) -> float:
    """Projections written out for each pair, on the Gramian."""
    g, expected = G.numpy(), np.zeros(len(G))
    for i in range(len(g)):
        c = np.eye(len(g))[i]
        for j in range(len(g)):
            if j != i and g[j] @ c < 0:
                c[j] -= g[j] @ c / g[j, j]
        expected += c
    return _size(G, w, torch.from_numpy(expected))


def _nsgd(G: Tensor, w: Tensor) -> float:
    """At the first call: one norm for all, the mean of the norms weighted by themselves."""
    d = G.diagonal().sqrt()
    return float(((w * d) / (d.square().sum() / d.sum()) - 1).abs().max())


def _krum(n_byzantine: int, n_selected: int, power: int) -> Callable[[Tensor, Tensor], float]:
    def residual(G: Tensor, w: Tensor) -> float:
        """Equal weights that sum to 1, on rows none of which is farther from its neighbours than one left out."""
        d = G.diagonal()
        distance = (d[:, None] + d - 2 * G).clamp(min=0).fill_diagonal_(torch.inf) ** (power / 2)
        score = distance.sort(-1).values[:, : len(G) - n_byzantine - 2].sum(-1)
        taken = w != 0
        excess = (score[taken].max() - score[~taken].min()).clamp(min=0) / score.max().clamp(min=1e-300)
        return float(max((w[taken] - 1 / n_selected).abs().max(), abs(int(taken.sum()) - n_selected), excess))

    return residual


def _torchjd_krum() -> object:
    from torchjd.aggregation import Krum

    return Krum(1)


def _peer(name: str) -> Callable[[], object]:
    def make() -> object:
        import torchjd.aggregation

        return getattr(torchjd.aggregation, name)()

    return make


def _cosines(G: Tensor) -> tuple[Tensor, Tensor]:
    size = G.diagonal().sqrt()
    return size, G / (size.unsqueeze(-1) * size)


def _stacked(C: Tensor) -> np.ndarray:
    """Rows whose Gramian is C, free of the rounding that makes dependent rows look independent."""
    values, vectors = torch.linalg.eigh(C)
    return (vectors * torch.where(values > 1e-13 * values[-1], values, 0).sqrt()).numpy()


def _complementary(C: Tensor, l: Tensor, slack: Tensor, reach: Tensor) -> float:
    """How far l >= 0, slack >= 0 and l * slack = 0 are from holding."""
    return max(float(-l.min() / reach), float(-slack.min() / reach), float((l * slack).abs().max() / reach**2))


def dual_cone_residual(G: Tensor, u: Tensor, v: Tensor) -> float:
    """v projects the direction of u on the cone without conflict: u <= v, 0 <= Gv, u'Gv = v'Gv."""
    size, C = _cosines(G)
    u, v = u * size, v * size
    return _complementary(C, v - u, C @ v, v.abs().sum())


def _upgrad_residual(G: Tensor, w: Tensor) -> float:
    """Against the projection of each row by another solver; in terms of J'w, for w is not unique where rows are dependent."""
    size, C = _cosines(G)
    rows = _stacked(C)
    identity = np.eye(len(rows))
    v = torch.from_numpy(np.stack([identity[i] + scipy.optimize.nnls(rows.T, -rows[i])[0] for i in range(len(rows))]))
    expected = (size / len(w)) @ v
    return float((C @ (w * size - expected)).abs().max() / expected.sum())


def _pcd_residual(G: Tensor, w: Tensor, tau: float = 0.02) -> float:
    """At the first step, where every average is the gradient's own square norm: w times the norms is f (1, l)."""
    size, C = _cosines(G)
    v = w * size
    l, slack = v[1:] / v[0], C[1:] @ v / v[0] - tau
    norm = abs(float((v @ C @ v).clamp(min=0).sqrt() / size[0]) - 1) / max(1.0, float(v.abs().sum() / size[0]))
    if l.numel() == 0 or not (l.any() or slack.min() < 0):
        return norm
    if l.any():
        return max(norm, _complementary(C[1:, 1:], l, slack, 1 + l.sum()))
    # The primary gradient alone despite a violated constraint: some combination of the constraints must contradict itself (Farkas).
    margin = (tau - C[1:, 0]).numpy()
    system = np.vstack([_stacked(C)[1:].T, margin])
    return max(norm, scipy.optimize.nnls(system, np.eye(len(system))[-1])[1])


# With c the cosine of the golden rows, -22 / sqrt(18 38), the direction is c_1 + (tau - c) c_2; its square norm 1 - c^2 + tau^2.
_PCD_FIRST = (200 / 684 + 0.02**2) ** -0.5

RULES: dict[str, Row] = {
    "Sum": Row(lambda k: simple.Sum(), golden=(1, 1)),
    "Mean": Row(lambda k: simple.Mean(), golden=(0.5, 0.5)),
    "Constant": Row(lambda k: simple.Constant([float(i + 1) for i in range(k)]), equivariant=False, golden=(1, 2)),
    "Random": Row(lambda k: simple.Random(), equivariant=False),
    "PCGrad": Row(lambda k: projection.PCGrad(), equivariant=False, golden=(20 / 9, 30 / 19)),
    "PCGrad fixed": Row(
        lambda k: projection.PCGrad(reduction="mean", order="fixed"),
        residual=lambda G, w: _pcgrad_fixed(G, w * len(w)),
        equivariant=False,
        golden=(10 / 9, 15 / 19),
    ),
    "GradVac": Row(lambda k: projection.GradVac(), equivariant=False, golden=(20 / 9, 30 / 19)),
    "GradNorm": Row(lambda k: magnitude.GradNorm(alpha=1.0, lr=0.1, update_at=2), golden=(1, 1)),
    "NSGD": Row(lambda k: magnitude.NSGD(update_at=2), residual=_nsgd, golden=(1.268309, 0.872905)),
    "CRMOGM": Row(lambda k: compose.CRMOGM(projection.PCGrad()), equivariant=False, golden=(20 / 9, 30 / 19)),
    "Compose": Row(
        lambda k: compose.Compose(projection.GradVac(), compose.CRMOGM(magnitude.NSGD()), simple.Random(), projection.PCGrad()), equivariant=False
    ),
    "Krum": Row(lambda k: robust.Krum(1), residual=_krum(1, 1, 2), min_k=4),
    "Krum plain": Row(lambda k: robust.Krum(1, distance="plain"), residual=_krum(1, 1, 1), min_k=4, torchjd=_torchjd_krum),
    "Multi-Krum": Row(lambda k: robust.Krum(2, n_selected=3), residual=_krum(2, 3, 2), min_k=5),
    "UPGrad": Row(
        lambda k: cone.UPGrad(),
        residual=_upgrad_residual,
        nonconflicting=True,
        golden=(10 / 9, 15 / 19),
        golden_tolerance=1e-12,
        torchjd=_peer("UPGrad"),
    ),
    "DualProj": Row(
        lambda k: cone.DualProj(),
        residual=lambda G, w: dual_cone_residual(G, torch.full_like(w, 1 / len(w)), w),
        nonconflicting=True,
        golden=(11 / 18, 1 / 2),
        golden_tolerance=1e-12,
        torchjd=_peer("DualProj"),
    ),
    "PCD": Row(
        lambda k: cone.PCD(),
        residual=_pcd_residual,
        equivariant=False,
        golden=(_PCD_FIRST, (0.02 + 22 / 684**0.5) * (18 / 38) ** 0.5 * _PCD_FIRST),
        golden_tolerance=1e-12,
        torchjd=_peer("PCD"),
    ),
}
