"""Rules that take the conflicting part out of each gradient, one other gradient at a time. Mirrors csrc/solvers/projection.h."""

import torch
from torch import Tensor

from mmfast.resolvers.base import Problem, Rule

_NEVER = 2**62


def _order(p: Problem, fixed: bool) -> tuple[Tensor, Tensor]:
    """For each row the others in the order in which it meets them [B, K, K], and which of those places are taken."""
    k = p.G.shape[-1]
    index = torch.arange(k, device=p.G.device)
    key = index.expand(p.G.shape)
    if not fixed:
        assert p.draw is not None
        row = 256 if k <= 256 else 4096  # from the place of one row's draws to the next one's
        key = key + row * p.draw.integer(row * index.unsqueeze(1) + index)
    meets = p.active.unsqueeze(-1) & p.active.unsqueeze(-2) & (index.unsqueeze(1) != index)
    sorted_key, order = torch.where(meets, key, _NEVER).sort(-1)
    return order, sorted_key != _NEVER


def _rows_of(G: Tensor, j: Tensor) -> Tensor:
    """Row j[b, i] of each G[b], as [B, K, K]."""
    return G.gather(1, j.expand(G.shape))


class PCGrad(Rule):
    """Projects each gradient off every other one that it conflicts with (Yu et al., "Gradient surgery for multi-task learning", NeurIPS 2020).

    Args:
        reduction: "sum" or "mean" of the projected gradients.
        order: "random", a new order for each gradient at each call, or "fixed", the order of the rows.
    """

    method = 4

    def __init__(self, reduction: str = "sum", order: str = "random", *, every: int = 1) -> None:
        if reduction not in ("sum", "mean"):
            raise ValueError(f"PCGrad: reduction is {reduction!r}, expected 'sum' or 'mean'")
        if order not in ("random", "fixed"):
            raise ValueError(f"PCGrad: order is {order!r}, expected 'random' or 'fixed'")
        self.random = order == "random"  # before the base makes the stream
        super().__init__(every=every)
        self.reduction, self._order = reduction, order

    @property
    def order(self) -> str:
        """Set when the rule is made, with its random stream."""
        return self._order

    def params(self) -> list[float]:
        return [float(self.reduction == "mean"), float(self.order == "fixed")]

    def rows(self, p: Problem) -> Tensor:
        order, taken = _order(p, self.order == "fixed")
        square = p.G.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
        c = torch.eye(p.G.shape[-1], dtype=p.G.dtype, device=p.G.device).repeat(p.G.shape[0], 1, 1)
        products = p.G  # of each projected row with all rows
        for place in range(p.G.shape[-1] - 1):
            j = order[..., place : place + 1]
            product = products.gather(-1, j)
            t = torch.where(taken[..., place : place + 1] & (product < 0), -product / square.gather(1, j), 0)
            c = c.scatter_add(-1, j, t)
            products = products + t * _rows_of(p.G, j)
        return c if self.reduction == "sum" else c / p.count.view(-1, 1, 1)

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}, order={self.order!r}"


class GradVac(Rule):
    """Turns each gradient towards the running mean of its cosine with every other one (Wang et al., "Gradient vaccine", ICLR 2021).

    Args:
        beta: weight of the newest cosine in its running mean, from 0 to 1.
    """

    method = 5
    random = True

    def __init__(self, beta: float = 0.5, *, every: int = 1) -> None:
        if not 0 <= beta <= 1:
            raise ValueError(f"GradVac: beta is {beta!r}, expected a number from 0 to 1")
        super().__init__(every=every)
        self.beta = beta

    def params(self) -> list[float]:
        return [self.beta]

    def state_size(self, k: int) -> int:
        return k * k

    def rows(self, p: Problem) -> Tensor:
        assert p.state is not None
        order, taken = _order(p, fixed=False)
        length = p.G.diagonal(dim1=-2, dim2=-1).sqrt().unsqueeze(-1)
        c = torch.eye(p.G.shape[-1], dtype=p.G.dtype, device=p.G.device).repeat(p.G.shape[0], 1, 1)
        products, norm, reach = p.G, length, length
        kept = p.state.view(p.G.shape)
        goals = kept.clamp(max=1 - max(1e-12, 4 * p.precision))  # closer to 1 than cosines are known is the same direction
        for place in range(p.G.shape[-1] - 1):
            j, now = order[..., place : place + 1], taken[..., place : place + 1]
            goal, other = goals.gather(-1, j), length.gather(1, j)
            cosine = torch.where(norm > 0, products.gather(-1, j) / (norm * other), 0).clamp(-1, 1)
            kept = torch.where(now, kept.scatter(-1, j, (1 - self.beta) * kept.gather(-1, j) + self.beta * cosine), kept)
            sine, goal_sine = ((1 - x) * (1 + x) for x in (cosine, goal))
            t = norm / other * (goal * (sine / goal_sine).sqrt() - cosine)
            t = torch.where(now & (cosine < goal), t, 0)
            c = c.scatter_add(-1, j, t)
            products = products + t * _rows_of(p.G, j)
            reach = reach + t.abs() * other
            square = (c * products).sum(-1, keepdim=True)
            # below it the gradient is gone
            norm = torch.where(t == 0, norm, torch.where(square > p.cancelled * reach.square(), square, 0).sqrt())
        p.next_state = kept.flatten(1)
        return c

    def extra_repr(self) -> str:
        return f"beta={self.beta}"
