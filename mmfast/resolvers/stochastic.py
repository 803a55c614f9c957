"""Rules whose weights are one variable that moves on at every call, along products of two independent batches: MoDo, SDMGrad. In plain torch alone.

They take the square matrix of inner products between the gradients of one batch and of another, `mf.gram(grads, others=...)`, which is neither symmetric
nor definite; the weights are for the gradients of a third batch, or of one of the two. On one batch's own Gramian they are biased, as the methods'
papers say.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mmfast.resolvers.base import PreferringRule, Problem, Rule
from mmfast.resolvers.chain import states_of
from mmfast.resolvers.linalg import times
from mmfast.resolvers.solve import present


def project_on_simplex(y: Tensor, active: Tensor) -> Tensor:
    """The nearest point to y [B, K] of the simplex over the active places; 0 elsewhere."""
    ordered = torch.where(active, y, -torch.inf).sort(-1, descending=True).values
    excess = (ordered.cumsum(-1) - 1) / torch.arange(1, y.shape[-1] + 1, device=y.device)
    count = (ordered > excess).sum(-1, keepdim=True).clamp(min=1)
    return torch.where(active, (y - excess.gather(-1, count - 1)).clamp(min=0), 0)


class _Moving(Rule):
    """A point of the simplex over the gradients, kept in `state` [*problems, K], zeros at first."""

    keeps = True

    def chain(self) -> None:
        return None

    def state_size(self, k: int) -> int:
        return k

    def moved(self, p: Problem, w: Tensor) -> Tensor:
        """The next point [B, K] after w."""
        raise NotImplementedError

    def rule(self, p: Problem) -> Tensor:
        assert p.state is not None
        begun = p.state.sum(-1, keepdim=True) != 0
        w = self.moved(p, torch.where(begun, torch.where(p.active, p.state, 0), p.active / p.count.unsqueeze(-1)))
        p.next_state = torch.where(p.active, w, p.state)
        return w

    def forward(self, G: Tensor, mask: Tensor | None = None) -> Tensor:
        k, problems = G.shape[-1], tuple(G.shape[:-2])
        rows, finite = present(G, mask)
        active = (rows & finite.unsqueeze(-1)).reshape(-1, k)
        state = states_of([self], problems, k, G.device)[0]
        assert state is not None
        kept = state.view(-1, k)
        products = torch.where(active.unsqueeze(-1) & active.unsqueeze(-2), G.reshape(-1, k, k).double(), 0)
        p = Problem(products, active, torch.ones_like(kept[..., 0]), kept, None)
        w = self.rule(p).view(*problems, k)
        assert p.next_state is not None
        kept.copy_(torch.where(active.any(-1, keepdim=True), p.next_state, kept))
        return torch.where(finite.unsqueeze(-1), torch.where(rows, w, 0), torch.where(rows, torch.nan, 0.0).to(w))


def _check_positive(rule: str, name: str, value: float, least: float | None = None) -> float:
    if not math.isfinite(value) or (value <= 0 if least is None else value < least):
        raise ValueError(
            f"{rule}: {name} is {value!r}, expected a {'positive' if least is None else 'finite'} number{'' if least is None else f' of at least {least:g}'}"
        )
    return float(value)


class MoDo(_Moving):
    """Multi-objective gradient with double sampling: w <- the projection on the simplex of w - gamma (A + rho) w, A the products of two batches (Chen et al.,
    "Three-way trade-off in multi-objective learning", NeurIPS 2023).

    gamma is a step for the gradients as they are: under a `GradScaler` give it products of unscaled ones. A gradient of which both batches' product with
    itself is exactly 0 counts as missing.

    Args:
        gamma: step size, positive.
        rho: strength of the pull towards equal weights, at least 0.

    Example:
        >>> first, second, third = torch.randn(3, 2, 5)  # the gradients of two losses on three independent batches
        >>> modo = mf.MoDo(gamma=0.1)
        >>> w = mf.weights(mf.gram(first, others=second), modo)
        >>> mf.combine(third, w).shape
        torch.Size([5])
    """

    def __init__(self, gamma: float = 0.1, rho: float = 0.1) -> None:
        super().__init__()
        self.gamma, self.rho = _check_positive("MoDo", "gamma", gamma), _check_positive("MoDo", "rho", rho, 0)

    def moved(self, p: Problem, w: Tensor) -> Tensor:
        return project_on_simplex(w - self.gamma * (times(p.G, w) + self.rho * w), p.active)

    def extra_repr(self) -> str:
        return f"gamma={self.gamma}, rho={self.rho}"


class SDMGrad(_Moving, PreferringRule):
    """Stochastic direction-oriented multi-objective gradient: weights near a preference, by projected steps on products of two batches (Xiao et al.,
    "Direction-oriented multi-objective learning", NeurIPS 2023).

    Each call takes n_iter steps of gradient descent with momentum on A (w + penalty pref), A the products of two batches over the squared mean of the
    roots of its diagonal; the weights are (w + penalty pref) / (1 + penalty).

    Args:
        penalty: the method's lambda, at least 0: how strongly the direction is held to the preferred one.
        pref: K numbers, none negative; None for 1 / K each.
        lr, momentum, n_iter: of the steps.
    """

    def __init__(
        self, penalty: float = 0.3, pref: Sequence[float] | None = None, lr: float = 10.0, momentum: float = 0.5, n_iter: int = 20
    ) -> None:
        super().__init__(pref)
        self.penalty, self.lr = _check_positive("SDMGrad", "penalty", penalty, 0), _check_positive("SDMGrad", "lr", lr)
        if not 0 <= momentum < 1:
            raise ValueError(f"SDMGrad: momentum is {momentum!r}, expected a number of at least 0, below 1")
        if not isinstance(n_iter, int) or n_iter < 1:
            raise ValueError(f"SDMGrad: n_iter is {n_iter!r}, expected a number of steps, 1 or more")
        self.momentum, self.n_iter = float(momentum), n_iter

    def moved(self, p: Problem, w: Tensor) -> Tensor:
        own = torch.where(p.active, p.G.diagonal(dim1=-2, dim2=-1), 0)
        scale, size = ((x.sqrt().sum(-1, keepdim=True) / p.count.unsqueeze(-1)).square() for x in (own.clamp(min=0), own.abs()))
        scale = torch.where(scale > 0, scale, torch.where(size > 0, size, 1))  # where the batches disagree on every gradient, some unit
        A = p.G / scale.unsqueeze(-1)
        wanted = self.penalty * self._wanted(p)
        velocity = torch.zeros_like(w)
        for _ in range(self.n_iter):
            velocity = self.momentum * velocity + times(A, w + wanted)
            w = project_on_simplex(w - self.lr * velocity, p.active)
        return w

    def _wanted(self, p: Problem) -> Tensor:
        return self.preference(p, p.active / p.count.unsqueeze(-1))

    def rule(self, p: Problem) -> Tensor:
        return (super().rule(p) + self.penalty * self._wanted(p)) / (1 + self.penalty)

    def extra_repr(self) -> str:
        return f"penalty={self.penalty}, pref={self.pref}, lr={self.lr}, momentum={self.momentum}, n_iter={self.n_iter}"
