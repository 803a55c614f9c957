"""From Gramians to weights in plain torch: leaves out missing rows, scales, runs a chain of rules, preserves the norm. Mirrors csrc/solvers/solve.h."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mmfast import contract
from mmfast.resolvers.base import EPS, Hold, Problem, Rule, cancelled
from mmfast.resolvers.norm import Norm, by_gramian, of_gramian, shifted
from mmfast.resolvers.philox import Draw, advance


def precision_of(dtype: torch.dtype) -> float:
    """Relative rounding of a Gramian of gradients of this dtype: float64's own, or that of the float32 it was summed in."""
    return EPS if dtype in (torch.float64, torch.complex128) else torch.finfo(torch.float32).eps


def _normalised(G: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    """(G / scale with identity rows where inactive, scale): scale is the power of four that brings the active trace into [1, 4)."""
    diagonal = G.diagonal(dim1=-2, dim2=-1)
    trace = torch.where(active, diagonal, 0).sum(-1)
    exponent = torch.frexp(trace).exponent - 1
    scale = torch.ldexp(torch.ones_like(trace), exponent - exponent % 2)
    pair = active.unsqueeze(-1) & active.unsqueeze(-2)
    identity = torch.eye(G.shape[-1], dtype=G.dtype, device=G.device)
    return torch.where(pair, G / scale.view(-1, 1, 1), identity), scale


def _lift(active: Tensor, precision: float, once: int | None) -> Tensor | float:
    """By how much, relative to the squared norms, the diagonal of a Gramian is raised for rules that follow its inverse, [B, 1].

    Entries known to `precision` make a Gramian that may have negative eigenvalues of up to K times that, relative to the squared norms. So
    raised it has none, and no weights make a vector longer than it says: as if each gradient had a small part of its own that no other one
    has. A float64 Gramian stays as it is: there the solvers know what rounding is. Problems after the first `once` are raised twice as
    much: they show what the precision makes of the weights, and the lift alone makes something, too.
    """
    if precision <= EPS:
        return 0.0
    times = 1 if once is None else 1 + (torch.arange(len(active), device=active.device) >= once).unsqueeze(-1)
    return times * active.sum(-1, keepdim=True) * precision


def present_rows(G: Tensor, mask: Tensor | None) -> Tensor:
    """The rows [..., K] that are neither masked nor all zero."""
    rows = G.diagonal(dim1=-2, dim2=-1) != 0
    return rows if mask is None else rows & mask


def present(G: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Which rows of each problem are there [..., K], and which problems are finite in those rows [...]."""
    rows = present_rows(G, mask)
    pair = rows.unsqueeze(-1) & rows.unsqueeze(-2)
    return rows, torch.where(pair, G, 0).isfinite().all(-1).all(-1)


def apply(A: Tensor, G: Tensor, active: Tensor, precision: float) -> tuple[Tensor, Tensor]:
    """The Gramian A G A' after a step that mapped the active rows, and the rows that are still active.

    A row of which only rounding errors are left is gone: a rule would take their direction for that of a gradient.
    """
    G_next = A @ G @ A.mT
    G_next = (G_next + G_next.mT) / 2
    reach = (A.abs() @ G.diagonal(dim1=-2, dim2=-1).sqrt().unsqueeze(-1)).squeeze(-1)
    active = active & ~(G_next.diagonal(dim1=-2, dim2=-1) <= cancelled(precision) * reach.square())
    return torch.where(active.unsqueeze(-1) & active.unsqueeze(-2), G_next, 0), active


def row_map(
    G: Tensor,
    mask: Tensor | None,
    chain: list[Rule],
    states: list[Tensor | None],
    rng: Tensor | None,
    precision: float = EPS,
    streams: int | None = None,
) -> tuple[Tensor, list[Tensor | None]]:
    """What a chain does to the rows, A [B, K, K] (row i becomes sum_j A[i, j] g_j, the weights are the column sums), and the next states.

    Zero in the rows and columns of missing gradients, and in problems that are not finite; these keep their state.
    """
    rows, finite = present(G, mask)
    active = rows & finite.unsqueeze(-1)
    current = torch.where(active.unsqueeze(-1) & active.unsqueeze(-2), G, 0)
    total: Tensor | None = None  # row map of the steps so far
    w = torch.zeros_like(G[..., 0])
    next_states: list[Tensor | None] = []
    for s, rule in enumerate(chain):
        scaled, scale = _normalised(current, active)
        draw = Draw(rng, G.shape[0], s, streams) if rule.random and rng is not None else None
        lift = _lift(active, precision, streams) if rule.lifts else 0.0
        raised = torch.where(active, scaled.diagonal(dim1=-2, dim2=-1), 0) * lift
        p = Problem(scaled + torch.diag_embed(raised), active, scale, states[s], draw, precision, lift)
        if rule.smooths:
            w = torch.where(active, rule.smooth(p, w), 0)  # type: ignore[operator]
            A = torch.diag_embed(w)
        elif rule.maps_rows:
            A = torch.where(active.unsqueeze(-1) & active.unsqueeze(-2), rule.rows(p), 0)
            w = A.sum(-2)
        else:
            w = torch.where(active, rule.rule(p), 0)
            A = torch.diag_embed(w)
        state = states[s]
        if state is not None and p.next_state is not None:
            moves = (finite & active.any(-1)).unsqueeze(-1)
            if s + 1 < len(chain) and isinstance(hold := chain[s + 1], Hold):  # a rule that the next step holds has not been asked
                moves = moves & hold.due(p, states[s + 1])  # type: ignore[arg-type]
            state = torch.where(moves, p.next_state, state)
        next_states.append(state)
        if s + 1 < len(chain) and chain[s + 1].smooths:
            continue
        total = A if total is None else A @ total
        current, active = apply(A, torch.where(active.unsqueeze(-1) & active.unsqueeze(-2), scaled, 0), active, precision)
        current = current * scale.view(-1, 1, 1)
    assert total is not None
    return total, next_states


def solve(
    G: Tensor,
    mask: Tensor | None,
    chain: list[Rule],
    states: list[Tensor | None],
    rng: Tensor | None,
    precision: float = EPS,
    streams: int | None = None,
) -> tuple[Tensor, list[Tensor | None]]:
    """Weights [B, K] of the Gramians G [B, K, K] float64, and the next state of each rule of the chain.

    mask is bool [B, K] or None. A missing row (masked, or all zero) is left out and gets weight 0; a problem with a
    non-finite number gets NaN weights and keeps its state. Only `streams` problems draw apart, the next ones, shifted
    forms of the same, draw as they do.
    """
    rows, finite = present(G, mask)
    A, next_states = row_map(G, mask, chain, states, rng, precision, streams)
    nan = torch.where(rows, torch.nan, 0.0).to(G.dtype)
    return torch.where(finite.unsqueeze(-1), A.sum(-2), nan), next_states


def _solve_twice(
    G: Tensor, mask: Tensor | None, chain: list[Rule], states: list[Tensor | None], rng: Tensor | None, precision: float
) -> tuple[Tensor, list[Tensor | None], Norm]:
    """`solve`, and what it says of the norm: the problems and the shifted ones are solved as one batch."""
    if any(rule.needs_gram for rule in chain):
        B = G.shape[0]
        both = torch.cat([G, shifted(G, precision)])
        masks = None if mask is None else torch.cat([mask, mask])
        w, after = solve(both, masks, chain, [None if s is None else torch.cat([s, s]) for s in states], rng, precision, B)
        w, moved, after = w[:B], w[B:], [None if s is None else s[:B] for s in after]
    else:
        w, after = solve(G, mask, chain, states, rng, precision)
        moved = w
    return w, after, norm_of(G, mask, w, moved, precision)


def norm_of(G: Tensor, mask: Tensor | None, w: Tensor, moved: Tensor, precision: float) -> Norm:
    """What Gramians G [B, K, K] say of the norm of their weights w [B, K], where `moved` are the weights of the shifted ones."""
    rows, finite = present(G, mask)
    scaled, scale = _normalised(G, rows & finite.unsqueeze(-1))
    norm = of_gramian(scaled, rows, w, moved, precision)
    return norm._replace(noise=norm.noise * scale.sqrt())


def advance_states(states: Sequence[Tensor | None], after: Sequence[Tensor | None], rng: Tensor | None) -> None:
    """Writes the next states of a chain over its states, and moves its random stream on by one call."""
    for state, next_state in zip(states, after, strict=True):
        if state is not None and next_state is not None:
            state.copy_(next_state.detach())
    if rng is not None:
        advance(rng)


def weights_and_norm(
    G: Tensor,
    mask: Tensor | None,
    chain: list[Rule],
    states: list[Tensor | None],
    rng: Tensor | None,
    preserve_norm: bool,
    precision: float = EPS,
) -> tuple[Tensor, Norm | None]:
    """Weights [..., K] of Gramians [..., K, K] and, where the norm is to be preserved, what they are to be multiplied by; states and stream advance."""
    contract.check_unmapped(G, rng, *states)
    problems, k = G.shape[:-2], G.shape[-1]
    flat_mask = None if mask is None else mask.expand(*problems, k).reshape(-1, k)
    flat_states = [None if s is None else s.view(problems.numel(), s.shape[-1]) for s in states]
    flat, norm = G.reshape(-1, k, k), None
    if preserve_norm:
        w, after, flat_norm = _solve_twice(flat, flat_mask, chain, flat_states, rng, precision)
        norm = Norm(*(x.view(problems) for x in flat_norm))
    else:
        w, after = solve(flat, flat_mask, chain, flat_states, rng, precision)
    advance_states(flat_states, after, rng)
    return w.view(*problems, k), norm


def weights(
    G: Tensor,
    mask: Tensor | None,
    chain: list[Rule],
    states: list[Tensor | None],
    rng: Tensor | None,
    preserve_norm: bool,
    precision: float = EPS,
) -> Tensor:
    """The same where only the Gramians are known, the norm in the weights."""
    w, _ = weights_and_norm(G, mask, chain, states, rng, False, precision)
    return preserved(G, present_rows(G, mask), w, precision) if preserve_norm else w


def untold(G: Tensor, rows: Tensor, w: Tensor, precision: float) -> Norm:
    """What the norm of weights from a resolver's own code is to be: it is not asked again for a shifted Gramian, so a direction must stand out of its precision."""
    norm = of_gramian(G, rows, w, w, precision)
    reach = (torch.where(rows, w, 0).abs() * G.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()).sum(-1)
    return norm._replace(noise=torch.where(norm.settled, 0, (16 * precision) ** 0.5 * reach))


def preserved(G: Tensor, rows: Tensor, w: Tensor, precision: float) -> Tensor:
    """w scaled so that sum_i w_i g_i has the norm of the plain sum over the rows that are there, as far as the Gramian tells."""
    k = G.shape[-1]
    rows = rows.expand(w.shape)
    scaled, _ = _normalised(G.reshape(-1, k, k), rows.reshape(-1, k))
    return w * by_gramian(scaled.view(G.shape), rows, w, precision).unsqueeze(-1)
