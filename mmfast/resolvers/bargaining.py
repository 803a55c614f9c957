"""Rules where the gradients bargain for utility: NashMTL, FairGrad. Mirrors csrc/solvers/bargaining.h, where the mathematics is told."""

import math

import torch
from torch import Tensor

from mmfast.resolvers.base import EPS, Problem, Rule
from mmfast.resolvers.linalg import cosines, times

FLAT = 1e-10
STEPS = 100
STEPS_OF_HIGH_POWERS = 400  # alpha below 0.1
SEARCHES = 6


class _Sides:
    """What each row pulls with against (C x)_i, for m = norm^((1 - alpha)/(1 + alpha)); cut off where x reaches the ceiling."""

    def __init__(self, norm: Tensor, active: Tensor, alpha: float) -> None:
        self.power, self.alpha = 1 / alpha, alpha
        self.m = norm ** ((1 - alpha) / (1 + alpha))
        share = alpha / (1 + alpha)
        height = share if alpha >= 0.5 else min(1 / 3, 1.3 * share)
        self.ceiling = FLAT**-height * torch.where(active, self.m, 0).amax(-1, keepdim=True)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(the pull, minus its derivative)."""
        free = self.m * (self.m / x) ** self.power
        barrier = (x / self.ceiling) ** (4 + 4 * self.power)
        return free * (1 - barrier), free / x * (self.power + (4 + 3 * self.power) * barrier)

    def floor(self, active: Tensor) -> Tensor:
        """Below every solution: no pull exceeds the sum of all x."""
        count = active.sum(-1, keepdim=True)
        return self.m * (self.m / (2 * count * self.ceiling)) ** self.alpha


def _bargain(p: Problem, alpha: float) -> Tensor:
    """w > 0 with G w = w^(-1/alpha), by a fixed number of Newton steps on x = D w."""
    norm, C = cosines(p.G)
    sides = _Sides(norm, p.active, alpha)
    x = sides.m.clone()
    for _ in range(STEPS if alpha >= 0.1 else STEPS_OF_HIGH_POWERS):
        pull, curve = sides(x)
        gradient = times(C, x) - pull
        H = C + torch.diag_embed(curve)
        size = H.diagonal(dim1=-2, dim2=-1).rsqrt()
        H = H * size.unsqueeze(-1) * size.unsqueeze(-2)
        R, _ = torch.linalg.cholesky_ex(H + EPS * H.shape[-1] * torch.eye(H.shape[-1], dtype=H.dtype, device=H.device), check_errors=False)
        step = -size * torch.cholesky_solve((size * gradient).unsqueeze(-1), R).squeeze(-1)
        step = torch.where(p.active, step, 0)
        x = _go(x, step) if alpha >= 0.5 else x + _length(C, x, step, gradient, sides, sides.floor(p.active), p.active) * step
        x = torch.minimum(x, 10 * sides.ceiling)
    return x / norm


def _go(x: Tensor, step: Tensor) -> Tensor:
    """x after a step on its logarithm, cut off at a factor of e^2."""
    change = step / x
    # small steps are plain: exp bends them out of the null space of C, where x may be large
    return x * torch.where(change.abs() < 0.1, 1 + change, change.clamp(-2, 2).exp())


def _length(C: Tensor, x: Tensor, step: Tensor, gradient: Tensor, sides: _Sides, floor: Tensor, active: Tensor) -> Tensor:
    """How far to go along a step: to where the slope is a tenth of what it was, above the floor. For high powers, which bend too much for a whole step."""
    slope0 = torch.where(active, gradient * step, 0).sum(-1, keepdim=True)
    right = torch.where(step < 0, (floor - x) / step, torch.inf).amin(-1, keepdim=True)
    most, left = right, torch.zeros_like(right)
    t = (0.9 * most).clamp(max=1)
    linear = torch.where(active, times(C, x) * step, 0).sum(-1, keepdim=True)
    square = torch.where(active, times(C, step) * step, 0).sum(-1, keepdim=True)
    small = torch.where(active, (step / x).abs(), 0).amax(-1, keepdim=True) < 0.1
    done = small
    for _ in range(SEARCHES):
        pull, curve = sides(x + t * step)
        slope = linear + t * square - torch.where(active, pull * step, 0).sum(-1, keepdim=True)
        bend = square + torch.where(active, curve * step.square(), 0).sum(-1, keepdim=True)
        done = done | (slope.abs() <= 0.1 * slope0.abs()) | slope.isnan()
        right, left = torch.where(slope > 0, t, right), torch.where(slope > 0, left, t)
        middle = torch.where(right.isfinite(), (left + right) / 2, 2 * t)
        next_t = t - slope / bend
        next_t = torch.where((next_t > left) & (next_t < right), next_t, middle)
        next_t = torch.minimum(next_t, 8 * t)
        next_t = torch.where(right == most, torch.minimum(next_t, left + 0.9 * (right - left)), next_t)
        t = torch.where(done, t, next_t)
    return t


class NashMTL(Rule):
    """The Nash bargaining solution, G w = 1 / w (Navon et al., "Multi-task learning as a bargaining game", ICML 2022).

    Its direction has norm sqrt(K) whatever the gradients' norms, and vanishes at a Pareto-stationary point, where the weights stop
    at about 1e5 / |g_i|.

    Args:
        max_norm: the largest norm of the direction; None for no limit (the published code has 1).
    """

    method = 11
    lifts = True

    def __init__(self, max_norm: float | None = None, *, every: int = 1) -> None:
        super().__init__(every=every)
        if max_norm is not None and not (math.isfinite(max_norm) and max_norm > 0):
            raise ValueError(f"max_norm is {max_norm}, expected None or a positive number")
        self.max_norm = max_norm

    def params(self) -> list[float]:
        return [self.max_norm or 0.0]

    @property
    def degree(self) -> float:  # type: ignore[override]
        return -1.0

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
        alpha: fairness: 0 is the mean of the gradients, 1 proportional fairness (NashMTL), and the larger, the nearer to equal progress for all;
            between 0 and 0.05 it is refused. With alpha below 1/2, and gradients that nearly oppose each other beside others a hundred times as
            long or more, Newton's method may end short of the solution: 7 of 500 such problems at 0.1 left a conflict of up to 2 %.
    """

    method = 12
    lifts = True

    def __init__(self, alpha: float = 1.0, *, every: int = 1) -> None:
        super().__init__(every=every)
        if not (math.isfinite(alpha) and (alpha == 0 or alpha >= 0.05)):
            raise ValueError(
                f"alpha is {alpha}, expected 0 or a number from 0.05 up: w^(-1/alpha) of less has no solution that Newton's method finds"
            )
        self.alpha = float(alpha)

    def params(self) -> list[float]:
        return [self.alpha]

    @property
    def degree(self) -> float:  # type: ignore[override]
        return -2 * self.alpha / (1 + self.alpha)

    def rule(self, p: Problem) -> Tensor:
        if self.alpha == 0:
            return torch.ones_like(p.G[..., 0]) / p.count.unsqueeze(-1)
        return _bargain(p, self.alpha) * (p.scale ** (-self.alpha / (1 + self.alpha))).unsqueeze(-1)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}"
