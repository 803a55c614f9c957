"""How far given weights are from a rule's own optimality conditions, relative to the problem's size. None of it calls the rule."""

from collections.abc import Callable

import numpy as np
import scipy.linalg
import scipy.optimize
import torch
from torch import Tensor


def _size(G: Tensor, w: Tensor, expected: Tensor) -> float:
    """Error of w as a combination of gradients, relative to the expected one's summands."""
    d = G.diagonal().sqrt()
    return float(((w - expected).abs() * d).sum() / (expected.abs() * d).sum())


def pcgrad_fixed_residual(G: Tensor, w: Tensor) -> float:
    """Projections written out for each pair, on the Gramian."""
    g, expected = G.numpy(), np.zeros(len(G))
    for i in range(len(g)):
        c = np.eye(len(g))[i]
        for j in range(len(g)):
            if j != i and g[j] @ c < 0:
                c[j] -= g[j] @ c / g[j, j]
        expected += c
    return _size(G, w, torch.from_numpy(expected))


def nsgd_residual(G: Tensor, w: Tensor) -> float:
    """At the first call: one norm for all, the mean of the norms weighted by themselves."""
    d = G.diagonal().sqrt()
    return float(((w * d) / (d.square().sum() / d.sum()) - 1).abs().max())


def unit_residual(G: Tensor, w: Tensor) -> float:
    return float((w * G.diagonal().sqrt() - 1).abs().max())


def dbmtl_residual(G: Tensor, w: Tensor) -> float:
    """All as long as the longest."""
    d = G.diagonal().sqrt()
    return float((w * d / d.max() - 1).abs().max())


def krum_residual(n_byzantine: int, n_selected: int, power: int) -> Callable[[Tensor, Tensor], float]:
    def residual(G: Tensor, w: Tensor) -> float:
        """Equal weights that sum to 1, on rows none of which is farther from its neighbours than one left out."""
        d = G.diagonal()
        distance = (d[:, None] + d - 2 * G).clamp(min=0).fill_diagonal_(torch.inf) ** (power / 2)
        score = distance.sort(-1).values[:, : len(G) - n_byzantine - 2].sum(-1)
        taken = w != 0
        excess = (score[taken].max() - score[~taken].min()).clamp(min=0) / score.max().clamp(min=1e-300)
        return float(max((w[taken] - 1 / n_selected).abs().max(), abs(int(taken.sum()) - n_selected), excess))

    return residual


def fair_residual(alpha: float) -> Callable[[Tensor, Tensor], float]:
    """G w = w^(-1/alpha), but for the documented barrier, per row; the rounding of G w itself, 45 eps of its terms, is let off."""

    def residual(G: Tensor, w: Tensor) -> float:
        norm = G.diagonal().sqrt()
        x, alone = norm * w, norm ** ((1 - alpha) / (1 + alpha))
        height = alpha / (1 + alpha)
        ceiling = 1e-10 ** -(height if alpha >= 0.5 else min(1 / 3, 1.3 * height)) * alone.max()
        wanted = w ** (-1 / alpha)
        gap = G @ w - wanted * (1 - (x / ceiling) ** (4 + 4 / alpha))
        return (gap.abs() / (wanted + 1e-6 * norm * x.sum())).max().item() if (w > 0).all() else torch.inf

    return residual


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


def upgrad_residual(G: Tensor, w: Tensor) -> float:
    """Against the projection of each row by another solver; in terms of J'w, for w is not unique where rows are dependent."""
    size, C = _cosines(G)
    rows = _stacked(C)
    identity = np.eye(len(rows))
    v = torch.from_numpy(np.stack([identity[i] + scipy.optimize.nnls(rows.T, -rows[i])[0] for i in range(len(rows))]))
    expected = (size / len(w)) @ v
    return float((C @ (w * size - expected)).abs().max() / expected.sum())


def pcd_residual(G: Tensor, w: Tensor, tau: float = 0.02) -> float:
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
PCD_FIRST = (200 / 684 + 0.02**2) ** -0.5


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


def config_first_residual(G: Tensor, w: Tensor) -> float:
    """Equal cosines, and the length of d is the norm of the first row times the sum of the cosines."""
    norm, C, P = _range_of_cosines(G)
    if P.sum() < 1e-20:
        return w.abs().max().item()
    x, size, d = norm * w, norm[0] * len(norm), w @ G
    length = ((d @ w - norm[0] * (d / norm).sum()).abs() / (size * (size + x.abs().sum()))).item()
    return max(_direction_residual(norm, C, P, x, size + x.abs().sum()), length)


def aligned_residual(G: Tensor, w: Tensor) -> float:
    """Against w = sqrt(least eigenvalue) G^(-1/2) 1/K from LAPACK's QR iteration, which is accurate when the largest rows come last."""
    order = G.diagonal().argsort()
    values, V = map(torch.from_numpy, scipy.linalg.eigh(G[order][:, order].numpy(), driver="ev", lower=False))
    keep = values > 8 * len(G) * torch.finfo(G.dtype).eps * values[-1]
    values, V = values[keep], V[:, keep]
    gap = w[order] - V @ ((values[0] / values).sqrt() * V.mean(0))
    return (gap.abs().max() / torch.maximum(w.abs().max(), (values[0] / values[-1]).sqrt() / len(G))).item()


def _short_of(G: Tensor, w: Tensor, slope: Tensor, level: Tensor) -> float:
    """How far a slope lies below its level, in units of |g_i| sum_j |w_j| |g_j|.

    That is what a relative change of every gradient moves (Gw)_i by, so the unit is strict for a short row beside long ones.
    """
    norm = G.diagonal().sqrt()
    return ((level - slope) / (norm * (w.abs() * norm).sum())).max().item()


def mgda_residual(G: Tensor, w: Tensor) -> float:
    return max(_short_of(G, w, G @ w, w @ G @ w), (w.sum() - 1).abs().item(), -w.min().item())


def mgda_unit_residual(G: Tensor, w: Tensor) -> float:
    norm = G.diagonal().sqrt()
    return mgda_residual(G / norm.unsqueeze(0) / norm.unsqueeze(1), w * norm)


def mmpareto_residual(G: Tensor, w: Tensor, gamma: float = 1.5) -> float:
    """The plain sum times gamma without conflict; else along the shortest vector of the hull, as long as k times that or as the sum, whichever is more."""
    k, norm = len(G), G.diagonal().sqrt()
    if (G + torch.diag(norm.square()) > 0).all():
        return float((w / gamma - 1).abs().max())
    shortest = w / w.sum()
    size = (shortest * norm).sum()
    length = (shortest @ G @ shortest).clamp(min=0).sqrt()
    factor = w.sum() / (gamma * k)
    wanted = torch.maximum(G.sum().clamp(min=0).sqrt() / (k * length), torch.ones(())) if length > 3e-7 * size else factor
    unsure = length < 3e-7 * size and factor == 1  # a direction that is rounding is not made longer
    return max(mgda_residual(G, shortest), 0.0 if unsure else float((factor / wanted - 1).abs() * (length / size) ** 2))


def _hull_misses_zero(G: Tensor) -> float:
    """About the length of the shortest vector of the hull of the rows scaled to length 1."""
    norm = G.diagonal().sqrt()
    values, vectors = torch.linalg.eigh(G / norm.unsqueeze(0) / norm.unsqueeze(1))
    A = torch.cat([(vectors * values.clamp(min=0).sqrt()).T, torch.ones(1, len(G), dtype=G.dtype)])
    target = torch.zeros(len(G) + 1, dtype=G.dtype)
    target[-1] = 1
    return float(scipy.optimize.nnls(A.numpy(), target.numpy(), maxiter=100 * len(G))[1])


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
            return max(negative, abs(ball), _short_of(G, w, slope, z @ slope / z.sum()))
        # inside the ball only where nothing helps every row, and then harmless to all and nearest to the mean
        apart = (z @ slope).abs() / reach**2
        return max(negative, ball, _short_of(G, w, slope, torch.zeros_like(reach)), apart.item(), _hull_misses_zero(G) - 1e-6)

    return residual
