"""From Gramians to weights in plain torch: leaves out missing rows, scales, runs a chain of rules, preserves the norm. Mirrors csrc/solvers/solve.h."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mmfast import contract
from mmfast.resolvers.base import EPS, Problem, Rule
from mmfast.resolvers.philox import Draw, advance


def precision_of(dtype: torch.dtype) -> float:
    """Relative rounding of a Gramian of gradients of this dtype: float64's own, or that of the float32 it was summed in."""
    return EPS if dtype == torch.float64 else torch.finfo(torch.float32).eps


def _normalised(G: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    """(G / scale with identity rows where inactive, scale): scale is the power of four that brings the active trace into [1, 4)."""
    diagonal = G.diagonal(dim1=-2, dim2=-1)
    trace = torch.where(active, diagonal, 0).sum(-1)
    exponent = torch.frexp(trace).exponent - 1
    scale = torch.ldexp(torch.ones_like(trace), exponent - exponent % 2)
    pair = active.unsqueeze(-1) & active.unsqueeze(-2)
    identity = torch.eye(G.shape[-1], dtype=G.dtype, device=G.device)
    return torch.where(pair, G / scale.view(-1, 1, 1), identity), scale


def _norm_factor(G: Tensor, active: Tensor, w: Tensor, precision: float) -> Tensor:
    pair = active.unsqueeze(-1) & active.unsqueeze(-2)
    plain = torch.where(pair, G, 0).sum((-1, -2)).clamp(min=0)
    ours = torch.where(pair, G * w.unsqueeze(-1) * w.unsqueeze(-2), 0).sum((-1, -2))
    reach = torch.where(active, w.abs() * G.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt(), 0).sum(-1)
    floor = 16 * precision * reach.square()  # below it the length of d is rounding of G: not to be blown up
    return torch.where(reach > 0, (plain / torch.maximum(ours, floor)).sqrt(), 0)


def present_rows(G: Tensor, mask: Tensor | None) -> Tensor:
    """The rows [..., K] that are neither masked nor all zero."""
    rows = G.diagonal(dim1=-2, dim2=-1) != 0
    return rows if mask is None else rows & mask


def present(G: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Which rows of each problem are there [..., K], and which problems are finite in those rows [...]."""
    rows = present_rows(G, mask)
    pair = rows.unsqueeze(-1) & rows.unsqueeze(-2)
    return rows, torch.where(pair, G, 0).isfinite().all(-1).all(-1)


def apply(A: Tensor, G: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    """The Gramian A G A' after a step that mapped the active rows, and the rows that are still active.

    A row of which only rounding errors are left is gone: a rule would take their direction for that of a gradient.
    """
    G_next = A @ G @ A.mT
    G_next = (G_next + G_next.mT) / 2
    reach = (A.abs() @ G.diagonal(dim1=-2, dim2=-1).sqrt().unsqueeze(-1)).squeeze(-1)
    active = active & ~(G_next.diagonal(dim1=-2, dim2=-1) <= 1e-14 * reach.square())
    return torch.where(active.unsqueeze(-1) & active.unsqueeze(-2), G_next, 0), active


def row_map(
    G: Tensor,
    mask: Tensor | None,
    chain: list[Rule],
    states: list[Tensor | None],
    rng: Tensor | None,
    precision: float = EPS,
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
        draw = Draw(rng, G.shape[0], s) if rule.random and rng is not None else None
        p = Problem(scaled, active, scale, states[s], draw, precision)
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
            state = torch.where((finite & active.any(-1)).unsqueeze(-1), p.next_state, state)
        next_states.append(state)
        if s + 1 < len(chain) and chain[s + 1].smooths:
            continue
        total = A if total is None else A @ total
        current, active = apply(A, torch.where(active.unsqueeze(-1) & active.unsqueeze(-2), scaled, 0), active)
        current = current * scale.view(-1, 1, 1)
    assert total is not None
    return total, next_states


def solve(
    G: Tensor,
    mask: Tensor | None,
    chain: list[Rule],
    states: list[Tensor | None],
    rng: Tensor | None,
    preserve_norm: bool,
    precision: float = EPS,
) -> tuple[Tensor, list[Tensor | None]]:
    """Weights [B, K] of the Gramians G [B, K, K] float64, and the next state of each rule of the chain.

    mask is bool [B, K] or None. A missing row (masked, or all zero) is left out and gets weight 0; a problem with a
    non-finite number gets NaN weights and keeps its state.
    """
    rows, finite = present(G, mask)
    A, next_states = row_map(G, mask, chain, states, rng, precision)
    w = A.sum(-2)
    if preserve_norm:
        active = rows & finite.unsqueeze(-1)
        scaled, _ = _normalised(torch.where(active.unsqueeze(-1) & active.unsqueeze(-2), G, 0), active)
        w = w * _norm_factor(scaled, active, w, precision).unsqueeze(-1)
    nan = torch.where(rows, torch.nan, 0.0).to(G.dtype)
    return torch.where(finite.unsqueeze(-1), w, nan), next_states


def advance_states(states: Sequence[Tensor | None], after: Sequence[Tensor | None], rng: Tensor | None) -> None:
    """Writes the next states of a chain over its states, and moves its random stream on by one call."""
    for state, next_state in zip(states, after, strict=True):
        if state is not None and next_state is not None:
            state.copy_(next_state.detach())
    if rng is not None:
        advance(rng)


def weights(
    G: Tensor,
    mask: Tensor | None,
    chain: list[Rule],
    states: list[Tensor | None],
    rng: Tensor | None,
    preserve_norm: bool,
    precision: float = EPS,
) -> Tensor:
    """Weights [..., K] of Gramians [..., K, K]; the states of the chain and its random stream advance in place."""
    contract.check_unmapped(G, rng, *states)
    problems, k = G.shape[:-2], G.shape[-1]
    flat_mask = None if mask is None else mask.expand(*problems, k).reshape(-1, k)
    flat_states = [None if s is None else s.view(problems.numel(), s.shape[-1]) for s in states]
    w, after = solve(G.reshape(-1, k, k), flat_mask, chain, flat_states, rng, preserve_norm, precision)
    advance_states(flat_states, after, rng)
    return w.view(*problems, k)


def preserved(G: Tensor, rows: Tensor, w: Tensor, precision: float) -> Tensor:
    """w scaled so that sum_i w_i g_i has the norm of the plain sum over the rows that are there."""
    return w * _norm_factor(G, rows, w, precision).unsqueeze(-1)
