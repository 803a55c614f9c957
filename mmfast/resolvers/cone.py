"""Rules that keep the direction where no gradient conflicts with it: UPGrad, DualProj, PCD. Mirrors csrc/solvers/cone.h.

The compiled form is an active set; here the same problems go through a primal-dual interior-point method, a batch at a time.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mmfast.resolvers.base import PreferringRule, Problem, Rule
from mmfast.resolvers.linalg import cosines, times
from mmfast.resolvers.units import common_change, to_one_unit

_ITERATIONS = 20  # 12 to 15 suffice on every kind of Gramian of the tests
_MOST = 2**24  # numbers of the matrices that are factored at once
_RIDGE = 1e-13  # keeps a flat or unbounded minimum finite


def _identity_where(free: Tensor, C: Tensor) -> Tensor:
    """C with identity rows and columns where not free [..., k]."""
    identity = torch.eye(C.shape[-1], dtype=C.dtype, device=C.device)
    return torch.where(free.unsqueeze(-1) & free.unsqueeze(-2), C, identity)


def _distance(C: Tensor, q: Tensor, l: Tensor) -> Tensor:
    """How far l is from min(l, C l + q) = 0, the conditions of optimality [..., 1]."""
    return torch.minimum(l, times(C, l) + q).abs().amax(-1, keepdim=True)


def _nonnegative(C: Tensor, q: Tensor, free: Tensor) -> Tensor:
    """argmin 1/2 l'Cl + q'l over l >= 0 with l = 0 where not free; C [..., k, k] has a unit diagonal, q and free are [..., k]."""
    q = torch.where(free, q, 0)
    size = q.abs().amax(-1, keepdim=True)
    q = torch.where(free, q / torch.where(size > 0, size, 1), 1)
    C = _identity_where(free, C)
    ridge = _RIDGE * torch.eye(C.shape[-1], dtype=C.dtype, device=C.device)
    l, s = torch.ones_like(q), torch.ones_like(q)  # the solution and its slacks C l + q
    best = l  # of all steps: near-opposite rows leave a factor without digits, and what follows goes astray
    for _ in range(_ITERATIONS):
        mu = (l * s).mean(-1, keepdim=True)
        residual = times(C, l) + _RIDGE * l + q - s
        factor, _ = torch.linalg.cholesky_ex(C + ridge + torch.diag_embed(s / l))
        target = torch.zeros_like(q)
        for _ in range(2):  # Mehrotra: the predictor aims at l s = 0 and tells the corrector how far it can aim
            dl = torch.cholesky_solve((target / l - s - residual).unsqueeze(-1), factor).squeeze(-1)
            ds = times(C, dl) + _RIDGE * dl + residual
            longest = 1 / torch.maximum(-dl / l, -ds / s).amax(-1, keepdim=True).clamp(min=1)
            after = ((l + longest * dl) * (s + longest * ds)).mean(-1, keepdim=True)
            target = (after / mu) ** 3 * mu - dl * ds
        next_l, next_s = l + 0.995 * longest * dl, s + 0.995 * longest * ds
        go_on = (mu > 1e-24) & (next_l + next_s).isfinite().all(-1, keepdim=True)
        l, s = torch.where(go_on, next_l, l), torch.where(go_on, next_s, s)
        best = torch.where(_distance(C, q, l) < _distance(C, q, best), l, best)
    # on the set that was found the ridge is refined away
    inside = l > s
    factor, _ = torch.linalg.cholesky_ex(_identity_where(inside, C) + ridge)
    exact = torch.where(inside, l, 0)
    for _ in range(3):
        slack = torch.where(inside, times(C, exact) + q, 0)
        exact = exact - torch.cholesky_solve(slack.unsqueeze(-1), factor).squeeze(-1)
    exact = exact.clamp(min=0)
    better = _distance(C, q, exact) <= _distance(C, q, best)
    return torch.where(free, torch.where(better, exact, best) * size, 0)


class UPGrad(PreferringRule):
    """The sum of the gradients' projections on the cone where none conflicts (Quinton & Rey, "Jacobian descent for
    multi-objective optimization", 2024).

    Args:
        pref: K non-negative weights of the projections, that of a missing gradient being lost; None gives 1 / (number present) to each.
    """

    method = 8
    lifts = True

    def __init__(self, pref: Sequence[float] | None = None, *, every: int = 1) -> None:
        super().__init__(pref, every=every)

    def rule(self, p: Problem) -> Tensor:
        norms, C = cosines(p.G)
        u = self.preference(p, 1 / p.count.unsqueeze(-1)) * norms
        # K problems at once (fewer where they would fill the memory), the slacks of one in the rows of the next dimension; projecting g_i never needs
        # more of g_i itself
        k = C.shape[-1]
        free = p.active.unsqueeze(-2) & ~torch.eye(k, dtype=torch.bool, device=C.device)
        at_once = k if k <= 256 else max(1, _MOST // k**2)
        l = torch.cat(
            [
                _nonnegative(C.unsqueeze(-3).expand(*C.shape[:-2], q.shape[-2], k, k), q, part)
                for q, part in zip(C.split(at_once, -2), free.split(at_once, -2), strict=True)
            ],
            -2,
        )
        return (u + times(l.mT, u)) / norms


class DualProj(PreferringRule):
    """The projection of the weighted sum of the gradients on the cone where none conflicts (Lopez-Paz & Ranzato, "Gradient
    episodic memory", 2017).

    Args:
        pref: K non-negative weights of the sum, that of a missing gradient being lost; None gives 1 / (number present) to each.
    """

    method = 9
    lifts = True

    def __init__(self, pref: Sequence[float] | None = None, *, every: int = 1) -> None:
        super().__init__(pref, every=every)

    def rule(self, p: Problem) -> Tensor:
        norms, C = cosines(p.G)
        u = self.preference(p, 1 / p.count.unsqueeze(-1)) * norms
        return (u + _nonnegative(C, times(C, u), p.active)) / norms


class PCD(Rule):
    """The direction nearest to the first gradient along which all others make progress too ("Not all objectives are born equal:
    priority-constrained descent for hierarchical multi-objective optimization", TMLR 2026).

    The first gradient present is the primary one. The result has its norm, and is the primary gradient alone where the others
    contradict each other. Gradients are measured by a moving average of their squared norms, each call's
    divided by what they are in the mean over their averages: a loss scale that changes from call to call changes nothing. A missing one keeps its
    average.

    Args:
        tau: the share of its own progress that every other gradient is to make, from 0 to 1.
        beta: decay of the moving average, at least 0 and less than 1.
    """

    method = 10
    lifts = True

    def __init__(self, tau: float = 0.02, beta: float = 0.999, *, every: int = 1) -> None:
        super().__init__(every=every)
        if not 0 <= tau <= 1:
            raise ValueError(f"tau is {tau}; it should be from 0 to 1")
        if not 0 <= beta < 1:
            raise ValueError(f"beta is {beta}; it should be at least 0 and less than 1")
        self.tau, self.beta = float(tau), float(beta)

    def params(self) -> list[float]:
        return [self.tau, self.beta]

    def state_size(self, k: int) -> int:
        # the averages of |g_i|^2; the weight of all that was averaged, 1 - beta^n after n steps; the averages' sets and units
        return 3 * k + 1

    def rule(self, p: Problem) -> Tensor:
        assert p.state is not None
        k = p.G.shape[-1]
        average, weight, sets, units = p.state.split([k, 1, k, k], -1)
        kept, total = self.beta * weight, self.beta * weight + (1 - self.beta)
        square = p.G.diagonal(dim1=-2, dim2=-1) * p.scale.unsqueeze(-1)
        average = torch.where(p.active & (average == 0), square, average)
        change = square / torch.where(p.active, average, 1)
        sets, units = to_one_unit(p, change, sets, units)
        square = square * units
        moved = (kept * average + (1 - self.beta) * (square / common_change(p, change * units))) / total
        p.next_state = torch.cat([torch.where(p.active, moved, average), total, sets, units], -1)
        length = torch.where(p.active, square / moved, 1).sqrt()

        norms, C = cosines(p.G)
        primary = p.active & (p.active.cumsum(-1) == 1)
        others = p.active & ~primary
        first = torch.where(primary, length, 0)
        along = times(C, first)
        q = torch.where(others, along - self.tau * length, 0)
        l = _nonnegative(C, q, others)
        # with contradicting constraints the ridge or the lift alone stops l: without it half of what a constraint asks for must be left
        slack = times(C, l) - p.lift / (1 + p.lift) * l + q
        least = -0.5 * self.tau * length - 1e-6 * torch.where(p.active, length, 0).sum(-1, keepdim=True)
        feasible = (slack >= least).logical_or(~others).all(-1, keepdim=True)

        # Below the rounding of its own summands the direction is zero, which a constraint with tau > 0 does not allow.
        v = first + l
        square = (v * times(C, v)).sum(-1, keepdim=True)
        vanishes = square <= 1e-14 * v.sum(-1, keepdim=True) ** 2
        factor = torch.where(vanishes, 0, (norms * primary).sum(-1, keepdim=True) / square.sqrt())
        return torch.where(feasible & ~(vanishes & (self.tau > 0)), factor * v / norms, primary.double())

    def extra_repr(self) -> str:
        return f"tau={self.tau}, beta={self.beta}"
