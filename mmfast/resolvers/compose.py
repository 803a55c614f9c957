"""Resolvers made of other resolvers: Compose, CRMOGM."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmfast.resolvers.base import Problem, Resolver, Rule, call_resolver, known_precision, weights_of
from mmfast.resolvers.chain import states_of
from mmfast.resolvers.elementwise import ElementwiseRule
from mmfast.resolvers.names import ResolverLike, made_of
from mmfast.resolvers.solve import advance_states, apply, present, row_map
from mmfast.resolvers.units import common_change, to_one_unit


class Compose(Resolver):
    """Applies resolvers one after the other, each to the gradients that the one before left (Javaloy et al., ICML 2022).

    Row i of the gradients becomes what the step makes of it: w_i g_i, or for PCGrad and GradVac the corrected g_i. All of it happens on
    the Gramian, in one call of the compiled solver where every step is a built-in rule.

    Args:
        resolvers: one or more resolvers, or names or classes of them; nested ones are laid out flat.

    Example:
        >>> mf.Compose(mf.GradNorm(alpha=1.0), mf.PCGrad())
        Compose(GradNorm(alpha=1.0, lr=0.001, update_at=20), PCGrad(reduction='sum', order='random'))
    """

    parts: Sequence[Resolver]

    def __init__(self, *resolvers: ResolverLike) -> None:
        super().__init__()
        if not resolvers:
            raise ValueError("Compose: no resolver was given, expected one or more")
        steps = [made_of(part) for part in resolvers]
        for n, part in enumerate(steps):
            if isinstance(part, ElementwiseRule):
                raise TypeError(f"Compose: resolvers[{n}] is {part!r}, expected a Resolver of Gramians")
        flat = [p for part in steps for p in (part.parts if isinstance(part, Compose) else [part])]
        if len({id(part) for part in flat}) < len(flat):
            raise ValueError("Compose: one resolver was given twice, expected one for each step, because each keeps its own state")
        self.parts = nn.ModuleList(flat)  # type: ignore[assignment]

    @property
    def degree(self) -> float:  # type: ignore[override]
        degree = 0.0
        for part in self.parts:  # the rows that it sees have grown by 1 + degree
            degree += (1 + degree) * part.degree
        return degree

    def check(self, k: int) -> None:
        for part in self.parts:
            part.check(k)

    def chain(self) -> list[Rule] | None:
        rules: list[Rule] = []
        for part in self.parts:
            steps = part.chain()
            if steps is None:
                return None
            rules += steps
        return rules

    def forward(self, G: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.chain() is not None:
            return weights_of(self, G, mask)
        rows, finite = present(G, mask)
        active = rows & finite.unsqueeze(-1)
        current = _only(G, active)
        total: Tensor | None = None  # row map of the steps so far
        for part in self.parts:
            A = _only(_row_map(current, part, active), active)
            total = A if total is None else A @ total
            current, active = apply(A, current, active, known_precision())
        assert total is not None
        return torch.where(rows & ~finite.unsqueeze(-1), torch.nan, total.sum(-2))

    def reset(self) -> None:
        for part in self.parts:
            part.reset()

    def __repr__(self) -> str:
        return f"Compose({', '.join(map(repr, self.parts))})"


def _row_map(G: Tensor, resolver: Resolver, mask: Tensor) -> Tensor:
    """What a resolver does to the rows, [..., K, K]: gradient i becomes sum_j A[i, j] g_j."""
    if not isinstance(resolver, Rule) or not resolver.maps_rows or resolver.hold is not None:  # what is held are weights
        return torch.diag_embed(call_resolver(resolver, G, mask, known_precision()))
    k, rng = G.shape[-1], resolver.rng
    states = [None if s is None else s.view(-1, s.shape[-1]) for s in states_of([resolver], tuple(G.shape[:-2]), k, G.device)]
    A, after = row_map(G.reshape(-1, k, k), mask.reshape(-1, k), [resolver], states, rng, known_precision())
    advance_states(states, after, rng)
    return A.view(G.shape)


def _only(G: Tensor, active: Tensor) -> Tensor:
    """G with zeros in the rows and columns that are not active."""
    return torch.where(active.unsqueeze(-1) & active.unsqueeze(-2), G.double(), 0)


class CRMOGM(Rule):
    """Smooths the weights of another resolver over calls (Zhou et al., "On the convergence of stochastic multi-objective gradient
    manipulation and beyond", NeurIPS 2022).

    A loss scale that changes from call to call changes nothing: weights that follow the gradients' norms (NashMTL, FairGrad) are averaged as those of
    gradients that have changed, in the mean, since they were first seen, by 1.

    Args:
        inner: the resolver whose weights to smooth, or its name or class; those of a class of your own are taken to depend on ratios of the gradients
            alone, unless its `degree` says otherwise. The first weights of a gradient are taken as they are.
        alpha: weight of the running mean against the newest weights, from 0 to 1.
    """

    method = 18
    smooths = True

    def __init__(self, inner: ResolverLike, alpha: float = 0.9) -> None:
        inner = made_of(inner)
        if isinstance(inner, ElementwiseRule):
            raise TypeError(f"CRMOGM: inner is {inner!r}, expected a Resolver of Gramians")
        if not 0 <= alpha <= 1:
            raise ValueError(f"CRMOGM: alpha is {alpha!r}, expected a number from 0 to 1")
        super().__init__()
        self.inner, self.alpha = inner, alpha

    def params(self) -> list[float]:
        return [self.alpha, self.degree]

    @property
    def degree(self) -> float:  # type: ignore[override]
        return self.inner.degree

    def check(self, k: int) -> None:
        self.inner.check(k)

    def state_size(self, k: int) -> int:
        return 5 * k

    def chain(self) -> list[Rule] | None:
        inner = self.inner.chain()
        # the compiled solver smooths the weights of one step: those of a composition belong to several
        return None if inner is None or len(inner) > 1 else [*inner, self]

    def smooth(self, p: Problem, w: Tensor) -> Tensor:
        """The smoothed weights [B, K] of the weights w of the step before."""
        assert p.state is not None
        mean, seen, first, sets, units = p.state.chunk(5, -1)
        factor: Tensor | float = 1.0  # weights over it are of gradients in the row's unit
        if self.degree:
            norm = (p.G.diagonal(dim1=-2, dim2=-1) * p.scale.unsqueeze(-1)).sqrt()
            first = torch.where(p.active & (first == 0), norm, first)
            change = norm / torch.where(p.active, first, 1)
            sets, units = to_one_unit(p, change, sets, units)
            factor = (common_change(p, change * units) / torch.where(p.active, units, 1)) ** self.degree
        new = torch.where(seen != 0, self.alpha * mean + (1 - self.alpha) * (w / factor), w / factor)
        kept = (torch.where(p.active, new, mean), torch.where(p.active, 1, seen))
        p.next_state = torch.cat([*kept, first, sets, units], -1)
        return new * factor

    def forward(self, G: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.chain() is not None:
            return weights_of(self, G, mask)
        rows, finite = present(G, mask)
        active = rows & finite.unsqueeze(-1)
        w = call_resolver(self.inner, _only(G, active), active, known_precision())
        states_of([self], tuple(w.shape[:-1]), w.shape[-1], w.device)
        assert self.state is not None
        k, state = G.shape[-1], self.state.view(-1, 5 * G.shape[-1])
        there = active.reshape(-1, k)
        p = Problem(_only(G, active).view(-1, k, k), there, torch.ones_like(state[:, 0]), state, None)
        smoothed = self.smooth(p, w.reshape(-1, k)).view(w.shape)
        assert p.next_state is not None
        state.copy_(torch.where(there.any(-1, keepdim=True), p.next_state, state))
        return torch.where(finite.unsqueeze(-1), torch.where(active, smoothed, 0), torch.where(rows, torch.nan, 0.0).to(w))

    def reset(self) -> None:
        super().reset()
        self.inner.reset()

    def extra_repr(self) -> str:
        return f"{self.inner!r}, alpha={self.alpha}"
