"""Rules where the gradients bargain for utility: NashMTL, FairGrad. Mirrors csrc/solvers/bargaining.h, where the mathematics is told."""

import math

import torch
from torch import Tensor

from mmfast.resolvers.base import EPS, Problem, Rule
from mmfast.resolvers.linalg import cosines, times

FLAT = 1e-10
STEPS = 100


def _bargain(p: Problem, alpha: float) -> Tensor:
    """w > 0 with G w = w^(-1/alpha), by a fixed number of Newton steps on log(D w), cut off at a factor of e^2."""
    power = 1 / alpha
    norm, C = cosines(p.G)
    m = norm ** ((1 - alpha) / (1 + alpha))
    ceiling = FLAT ** -max(alpha / (1 + alpha), 1 / 3) * torch.where(p.active, m, 0).amax(-1, keepdim=True)
    x = m.clone()
    for _ in range(STEPS):
        barrier = (x / ceiling) ** (4 + 4 * power)
        free_pull = m * (m / x) ** power
        gradient = times(C, x) - free_pull * (1 - barrier)
        # the Hessian of the logarithms where the gradient is zero: positive definite everywhere
        H = C * x.unsqueeze(-1) * x.unsqueeze(-2) + torch.diag_embed(x * free_pull * (power + (4 + 3 * power) * barrier))
        size = H.diagonal(dim1=-2, dim2=-1).rsqrt()
        H = H * size.unsqueeze(-1) * size.unsqueeze(-2)
        R, _ = torch.linalg.cholesky_ex(H + EPS * H.shape[-1] * torch.eye(H.shape[-1], dtype=H.dtype, device=H.device), check_errors=False)
        change = -size * torch.cholesky_solve((size * x * gradient).unsqueeze(-1), R).squeeze(-1)
        # small steps are plain: exp bends them out of the null space of C, where x may be large
        factor = torch.where(change.abs() < 0.1, 1 + change, change.clamp(-2, 2).exp())
        x = torch.minimum(x * factor, 10 * ceiling)
    return x / norm


class NashMTL(Rule):
    """The Nash bargaining solution, G w = 1 / w (Navon et al., "Multi-task learning as a bargaining game", ICML 2022).

    Its direction has norm sqrt(K) whatever the gradients' norms, and vanishes at a Pareto-stationary point, where the weights stop
    at about 1e5 / |g_i|.

    Args:
        max_norm: the largest norm of the direction; None for no limit (the published code has 1).
    """

    method = 11

    def __init__(self, max_norm: float | None = None) -> None:
        super().__init__()
        if max_norm is not None and not (math.isfinite(max_norm) and max_norm > 0):
            raise ValueError(f"max_norm is {max_norm}, expected None or a positive number")
        self.max_norm = max_norm

    def params(self) -> list[float]:
        return [self.max_norm or 0.0]

    def rule(self, p: Problem) -> Tensor:
        w = _bargain(p, 1.0)
        factor = p.scale.rsqrt()
        if self.max_norm is not None:
            u = torch.where(p.active, w, 0).unsqueeze(-1)
            norm = (u.mT @ p.G @ u).view(-1).clamp(min=torch.finfo(torch.float64).tiny).sqrt()
            factor = factor * (self.max_norm / norm).clamp(max=1)
        return w * factor.unsqueeze(-1)

    def extra_repr(self) -> str:
        return f"max_norm={self.max_norm}"


class FairGrad(Rule):
    """The alpha-fair solution, G w = w^(-1/alpha) (Ban and Ji, "Fair resource allocation in multi-task learning", ICML 2024).

    Args:
        alpha: fairness: 0 is the mean of the gradients, 1 proportional fairness (NashMTL), and the larger, the nearer to equal progress for all.
    """

    method = 12

    def __init__(self, alpha: float = 1.0) -> None:
        super().__init__()
        if not (math.isfinite(alpha) and alpha >= 0):
            raise ValueError(f"alpha is {alpha}, expected a number that is not negative")
        self.alpha = float(alpha)

    def params(self) -> list[float]:
        return [self.alpha]

    def rule(self, p: Problem) -> Tensor:
        if self.alpha == 0:
            return torch.ones_like(p.G[..., 0]) / p.count.unsqueeze(-1)
        return _bargain(p, self.alpha) * (p.scale ** (-self.alpha / (1 + self.alpha))).unsqueeze(-1)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}"
