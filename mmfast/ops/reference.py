"""Every operator in plain torch: any device, any dtype, no host synchronisation. The tests' oracle and the fallback."""

import torch
from torch import Tensor

from mmfast.resolvers.base import Problem, Rule
from mmfast.resolvers.philox import Draw


def _normalised(G: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    """(G / scale with identity rows where inactive, scale): scale is the power of four that brings the active trace into [1, 4)."""
    diagonal = G.diagonal(dim1=-2, dim2=-1)
    trace = torch.where(active, diagonal, 0).sum(-1)
    exponent = torch.frexp(trace).exponent - 1
    scale = torch.ldexp(torch.ones_like(trace), exponent - exponent % 2)
    pair = active.unsqueeze(-1) & active.unsqueeze(-2)
    identity = torch.eye(G.shape[-1], dtype=G.dtype, device=G.device)
    return torch.where(pair, G / scale.view(-1, 1, 1), identity), scale


def _norm_factor(G: Tensor, active: Tensor, w: Tensor) -> Tensor:
    pair = active.unsqueeze(-1) & active.unsqueeze(-2)
    plain = torch.where(pair, G, 0).sum((-1, -2)).clamp(min=0)
    ours = torch.where(pair, G * w.unsqueeze(-1) * w.unsqueeze(-2), 0).sum((-1, -2))
    reach = torch.where(active, w.abs() * G.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt(), 0).sum(-1)
    floor = 1e-20 * reach.square()  # below it d is rounding noise of its own summands
    return torch.where(reach > 0, (plain / torch.maximum(ours, floor)).sqrt(), 0)


def present(G: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Which rows of each problem are there [..., K] (neither masked nor all zero), and which problems are finite in those rows [...]."""
    diagonal = G.diagonal(dim1=-2, dim2=-1)
    rows = diagonal != 0 if mask is None else mask & (diagonal != 0)
    pair = rows.unsqueeze(-1) & rows.unsqueeze(-2)
    return rows, torch.where(pair, G, 0).isfinite().all(-1).all(-1)


def row_map(
    G: Tensor, mask: Tensor | None, chain: list[Rule], states: list[Tensor | None], rng: Tensor | None
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
        p = Problem(scaled, active, scale, states[s], draw)
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
        current = torch.where(active.unsqueeze(-1) & active.unsqueeze(-2), A @ scaled @ A.mT * scale.view(-1, 1, 1), 0)
        current = (current + current.mT) / 2
        active = active & (current.diagonal(dim1=-2, dim2=-1) != 0)
    assert total is not None
    return total, next_states


def solve(
    G: Tensor, mask: Tensor | None, chain: list[Rule], states: list[Tensor | None], rng: Tensor | None, preserve_norm: bool
) -> tuple[Tensor, list[Tensor | None]]:
    """Weights [B, K] of the Gramians G [B, K, K] float64, and the next state of each rule of the chain.

    mask is bool [B, K] or None. A missing row (masked, or all zero) is left out and gets weight 0; a problem with a
    non-finite number gets NaN weights and keeps its state.
    """
    rows, finite = present(G, mask)
    A, next_states = row_map(G, mask, chain, states, rng)
    w = A.sum(-2)
    if preserve_norm:
        active = rows & finite.unsqueeze(-1)
        scaled, _ = _normalised(torch.where(active.unsqueeze(-1) & active.unsqueeze(-2), G, 0), active)
        w = w * _norm_factor(scaled, active, w).unsqueeze(-1)
    nan = torch.where(rows, torch.nan, 0.0).to(G.dtype)
    return torch.where(finite.unsqueeze(-1), w, nan), next_states
