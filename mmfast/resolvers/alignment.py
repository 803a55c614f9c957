"""Rules that align the gradients with one another: IMTLG, AlignedMTL, ConFIG. Mirrors csrc/solvers/alignment.h."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmfast.resolvers.base import PreferringRule, Problem, Rule
from mmfast.resolvers.linalg import cosines, eigh, kept, times

SCALES = ("min", "median", "rmse")
LENGTHS = ("projection", "min", "max", "harmonic", "arithmetic", "geometric")


def _choice(argument: str, value: Any, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ValueError(f"{argument} is {value!r}, expected one of {', '.join(map(repr, choices))}")
    return value


def _multiples(p: Problem, pref: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(norms, a, cosines of sum_i a_i g_i to the rows times its length, its squared length) for a = D^-1 C^+ pref.

    The squared length is 0 where the rows admit no such direction.
    """
    norm, C = cosines(p.G)
    values, V = eigh(C)
    keep = kept(values, p.active, p.precision)
    whole = torch.where(p.active, times(V.mT, pref), 0)
    part = torch.where(keep, whole, 0)
    x = part / torch.where(keep, values, 1)
    square = torch.where(part.square().sum(-1) > 1e-24 * whole.square().sum(-1), (x * part).sum(-1), 0)  # below it, part is rounding
    a = times(V, x) / norm
    return norm, a, times(V, part), square


class IMTLG(Rule):
    """Equal projections of the direction on all unit gradients, with weights that sum to 1 (Liu et al., "Towards impartial multi-task learning", ICLR 2021).

    The weights are D^-1 C^+ 1 divided by their sum, D the norms and C the cosines of the gradients: the published G^+ d where those exist, and as
    exact for badly scaled gradients. That sum can be negative; the direction then *opposes* every gradient, as published. ConFIG has
    the same direction with the sign always right. Where no direction has equal projections, or the sum vanishes, the weights are zero.
    """

    method = 13

    def rule(self, p: Problem) -> Tensor:
        _, a, _, square = _multiples(p, torch.ones_like(p.G[..., 0]))
        a = torch.where(p.active, a, 0)
        total, reach = a.sum(-1, keepdim=True), a.abs().sum(-1, keepdim=True)
        defined = (square.unsqueeze(-1) > 0) & (total.abs() > 1e-12 * reach)
        return torch.where(defined, a / torch.where(defined, total, 1), 0)


class AlignedMTL(PreferringRule):
    """Orthogonal gradients of equal norm in place of the given ones (Senushkin et al., "Independent component alignment", CVPR 2023).

    Args:
        scale: the common squared norm among the eigenvalues of the Gramian: "min", "median" (the lower one) or "rmse" (the mean).
        pref: K weights of the aligned gradients; None for 1 / K each.
    """

    method = 14

    def __init__(self, scale: str = "min", pref: Sequence[float] | None = None, *, every: int = 1) -> None:
        super().__init__(pref, every=every)
        self.scale = _choice("scale", scale, SCALES)

    def params(self) -> list[float]:
        return [float(SCALES.index(self.scale)), *super().params()]

    def rule(self, p: Problem) -> Tensor:
        values, V = eigh(p.G)
        keep = kept(values, p.active, p.precision)
        count = keep.sum(-1, keepdim=True)
        if self.scale == "rmse":
            sigma = torch.where(keep, values, 0).sum(-1, keepdim=True) / count
        else:
            ascending = torch.where(keep, values, torch.inf).sort(-1).values
            place = torch.zeros_like(count) if self.scale == "min" else (count - 1).clamp(min=0) // 2
            sigma = ascending.gather(-1, place)
        x = times(V.mT, self.preference(p, 1 / p.count.unsqueeze(-1)))
        factor = torch.where(keep, (sigma / torch.where(keep, values, 1)).sqrt(), 0)
        return times(V, factor * x)

    def extra_repr(self) -> str:
        return f"scale={self.scale!r}, pref={self.pref}"


class ConFIG(PreferringRule):
    """The direction with the preferred cosines to all gradients (Liu et al., "Towards conflict-free training of physics informed neural networks", ICLR 2025).

    Args:
        pref: K numbers to which the cosines are proportional; None for equal cosines.
        length: "projection" gives it the sum of the gradients' projections on it; "min", "max", "harmonic", "arithmetic" and "geometric" give it
            that mean of the gradients' norms times the sum of the cosines; a number i the norm of gradient i in that place (where it is missing, the
            arithmetic mean).
    """

    method = 15

    def __init__(self, pref: Sequence[float] | None = None, length: str | int = "projection", *, every: int = 1) -> None:
        super().__init__(pref, every=every)
        if isinstance(length, int) and not isinstance(length, bool) and length >= 0:
            self.length: str | int = length
        else:
            self.length = _choice("length", length, LENGTHS)

    def params(self) -> list[float]:
        kind = len(LENGTHS) + self.length if isinstance(self.length, int) else LENGTHS.index(self.length)
        return [float(kind), *super().params()]

    def check(self, k: int) -> None:
        super().check(k)
        if isinstance(self.length, int) and self.length >= k:
            raise ValueError(
                f"length is {self.length}, expected the number of one of {k} gradients, or one of {', '.join(map(repr, LENGTHS))}"
            )

    def rule(self, p: Problem) -> Tensor:
        norm, a, cosine, square = _multiples(p, self.preference(p, torch.ones_like(p.G[..., 0])))
        cosine = torch.where(p.active, cosine, 0)
        if self.length == "projection":
            along = (norm * cosine).sum(-1)
        else:
            along = self._tracked(norm, p.active) * cosine.sum(-1)
        defined = square > 0
        return torch.where(defined, along / torch.where(defined, square, 1), 0).unsqueeze(-1) * a

    def _tracked(self, norm: Tensor, active: Tensor) -> Tensor:
        count = active.sum(-1)
        if isinstance(self.length, int):
            mean = torch.where(active, norm, 0).sum(-1) / count
            return torch.where(active[..., self.length], norm[..., self.length], mean)
        if self.length == "min":
            return torch.where(active, norm, torch.inf).amin(-1)
        if self.length == "max":
            return torch.where(active, norm, 0).amax(-1)
        if self.length == "harmonic":
            return count / torch.where(active, 1 / norm, 0).sum(-1)
        if self.length == "arithmetic":
            return torch.where(active, norm, 0).sum(-1) / count
        return (torch.where(active, norm.log(), 0).sum(-1) / count).exp()

    def extra_repr(self) -> str:
        return f"pref={self.pref}, length={self.length!r}"
