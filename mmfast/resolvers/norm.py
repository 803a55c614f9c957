"""Giving sum_i w_i g_i the norm of the plain sum, as the impartial-optimisation code does. Mirrors csrc/solvers/norm.h.

A Gramian that is known to `precision` knows the squared length of a sum to that times the square of its summands' lengths added up. Where
the summands cancel and little more is left, lengths are measured on the elements, and a direction that a change of the Gramian within its
precision would turn is not blown up to full length.
"""

from typing import NamedTuple

import torch
from torch import Tensor

MEASURED = 8192  # times the precision: a squared length below it, relative to its summands', is measured; above it is known to 1e-4
KNOWN = 64  # times K times the precision: a squared length above it has a direction that the Gramian tells
MARGIN = 8  # of a direction over what a change within the precision makes of it
LARGEST = 16  # factor that is always taken: what it makes of rounding is still rounding


class Norm(NamedTuple):
    """What the Gramian says of one factor for each problem."""

    factor: Tensor  # [...]
    settled: Tensor  # [...] bool: factor is good; else the lengths are to be measured
    noise: Tensor  # [...] length of the resolved gradient below which its direction is not known, and its length falls off with the square


def _length(G: Tensor, rows: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """(squared length of sum_i w_i g_i, the lengths of its summands [..., K])."""
    x = torch.where(rows, w, 0)
    pair = rows.unsqueeze(-1) & rows.unsqueeze(-2)
    square = torch.where(pair, G * x.unsqueeze(-1) * x.unsqueeze(-2), 0).sum((-1, -2))
    return square, x.abs() * torch.where(rows, G.diagonal(dim1=-2, dim2=-1), 0).clamp(min=0).sqrt()


def shifted(G: Tensor, precision: float) -> Tensor:
    """G with every entry changed by its precision, up or down by a fixed pattern (Hadamard's)."""
    index = torch.arange(G.shape[-1], device=G.device)
    both = index.unsqueeze(-1) & index
    odd = torch.zeros_like(both)
    for bit in range(12):  # of up to 4096 rows
        odd = odd ^ (both >> bit & 1)
    norm = G.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    return G + precision * (1 - 2 * odd) * norm.unsqueeze(-1) * norm.unsqueeze(-2)


def _unit(w: Tensor) -> Tensor:
    """A power of two near the largest weight [...]: weights that follow the gradients' lengths may have squares that no number holds."""
    largest = w.abs().amax(-1)
    usable = (largest > 0) & largest.isfinite()
    return torch.ldexp(torch.ones_like(largest), torch.frexp(torch.where(usable, largest, 1)).exponent - 1)


def of_gramian(G: Tensor, rows: Tensor, w: Tensor, shifted_w: Tensor, precision: float) -> Norm:
    """The factor of the weights w, and how far to trust it; shifted_w are the weights that `shifted` has."""
    plain, parts = _length(G, rows, torch.ones_like(w))
    unit = _unit(torch.where(rows, w, 0))
    w, shifted_w = w / unit.unsqueeze(-1), shifted_w / unit.unsqueeze(-1)
    ours, ours_parts = _length(G, rows, w)
    plain_reach, reach = parts.sum(-1).square(), ours_parts.sum(-1).square()
    settled = (plain >= MEASURED * precision * plain_reach) & (ours >= MEASURED * precision * reach)
    lift = rows.sum(-1) * precision
    change, change_parts = _length(G, rows, w - shifted_w)
    moved = (change + lift * change_parts.square().sum(-1)).clamp(min=0).sqrt()
    noise = torch.where(ours < KNOWN * lift * reach, MARGIN * moved, 0)
    finite = plain.isfinite() & ours.isfinite()  # what is not is settled: there is nothing to measure
    factor = torch.where(ours > 0, plain.clamp(min=0) / torch.where(ours > 0, ours, 1), 0).sqrt()
    return Norm(torch.where(finite, factor / unit, torch.nan), settled | ~finite, noise * unit)


def told(G: Tensor, rows: Tensor, w: Tensor, precision: float) -> Tensor:
    """Whether a Gramian tells both lengths, that of the plain sum and that of the weights w in any unit: bool [...], False where something is no number."""
    both = torch.stack([rows.to(G.dtype), w], -2)
    square = ((both @ G) * both).sum(-1)
    reach = (both.abs() @ G.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt().unsqueeze(-1)).squeeze(-1).square()
    return (square >= MEASURED * precision * reach).all(-1)


def measured(norm: Norm, plain: Tensor, ours: Tensor) -> Tensor:
    """The factor, from the squared lengths of the plain sum and of the resolved gradient where they had to be measured."""
    length, wanted = ours.sqrt(), plain.sqrt()
    trust = torch.where(norm.noise > length, length / norm.noise, 1)
    factor = torch.where(length > 0, torch.minimum(wanted / length, (wanted / length * trust.square()).clamp(min=LARGEST)), 0)
    return torch.where(norm.settled, norm.factor, torch.where((plain + ours).isfinite(), factor, torch.nan))


def by_gramian(G: Tensor, rows: Tensor, w: Tensor, precision: float) -> Tensor:
    """The factor where there are no elements to measure: below the precision of the Gramian it is bounded."""
    plain, _ = _length(G, rows, torch.ones_like(w))
    unit = _unit(torch.where(rows, w, 0))
    ours, parts = _length(G, rows, w / unit.unsqueeze(-1))
    reach = parts.sum(-1).square()
    return torch.where(reach > 0, (plain.clamp(min=0) / torch.maximum(ours, 16 * precision * reach)).sqrt() / unit, 0)
