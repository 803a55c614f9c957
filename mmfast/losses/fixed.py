"""Functions of K losses without anything learned or kept."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmfast.precision import Keeping, wide_dtype

SMALL = 1e-12  # under a root whose derivative would be infinite


def check_losses(losses: Tensor, k: int | None = None) -> None:
    """Raises where they are not K numbers."""
    if not isinstance(losses, Tensor):
        raise TypeError(f"losses is a {type(losses).__name__}, expected a tensor [K]; torch.stack makes one of a list of scalars")
    if losses.dim() != 1 or not losses.is_floating_point() or not len(losses) or len(losses) != (k or len(losses)):
        raise ValueError(f"losses is {losses.dtype} {tuple(losses.shape)}, expected a floating-point tensor [{k or 'K'}]")


def check_k(k: int) -> None:
    if k < 1:
        raise ValueError(f"k is {k}, expected the number of losses, at least 1")


def as_row(values: Sequence[float] | Tensor, name: str) -> Tensor:
    """A preference or a reference point as a buffer [K]."""
    row = torch.as_tensor(values, dtype=wide_dtype()).detach().clone()
    if row.dim() != 1 or not len(row) or not bool(row.isfinite().all()):
        raise ValueError(f"{name} is {values!r}, expected K finite numbers")
    return row


class GeometricMean(nn.Module):
    """The geometric mean of the losses, whose gradient does not depend on their scales (Chennupati et al., "MultiNet++", CVPR workshops 2019; GLS).

    `forward(losses)` takes [K], none negative (a negative one gives NaN), and returns (prod_i l_i)^(1/K); nothing is kept.

        >>> mf.losses.GeometricMean()(torch.tensor([1.0, 4.0]))
        tensor(2.)
    """

    def forward(self, losses: Tensor) -> Tensor:
        check_losses(losses)
        return losses.log().mean().exp()


GLS = GeometricMean


class _Preferring(Keeping):
    """Weights [K], and a reference point that is taken off the losses."""

    weights: Tensor | None
    reference: Tensor | None

    def __init__(self, weights: Sequence[float] | Tensor | None, reference: Sequence[float] | Tensor | None) -> None:
        super().__init__()
        self.register_buffer("weights", None if weights is None else as_row(weights, "weights"))
        self.register_buffer("reference", None if reference is None else as_row(reference, "reference"))
        if self.weights is not None and (bool((self.weights < 0).any()) or not bool(self.weights.any())):
            raise ValueError(f"weights is {weights!r}, expected K numbers, none negative, not all zero")
        if self.weights is not None and self.reference is not None and len(self.weights) != len(self.reference):
            raise ValueError(f"reference has {len(self.reference)} numbers, expected {len(self.weights)} as weights has")
        self._given = {name: None if row is None else row.tolist() for name, row in self._buffers.items()}

    def reset_parameters(self) -> None:
        """Weights and reference as they were given, after `to_empty`."""
        for name, row in self._buffers.items():
            if row is not None:
                row.copy_(torch.tensor(self._given[name], dtype=row.dtype))

    def shifted(self, losses: Tensor) -> Tensor:
        given = self.weights if self.weights is not None else self.reference
        check_losses(losses, None if given is None else len(given))
        return losses if self.reference is None else losses - self.reference


class STCH(_Preferring):
    """Smooth Tchebycheff: a smooth form of the largest weighted loss (Lin et al., "Smooth Tchebycheff scalarization", ICML 2024).

    `forward(losses)` takes [K] and returns mu log sum_i exp(weights_i (l_i - reference_i) / mu).

    Args:
        mu: how smooth; towards 0 it is the maximum itself.
        weights: K numbers, none negative; 1/K each by default.
        reference: the ideal point, K numbers; 0 by default.

        >>> mf.losses.STCH(0.1)(torch.tensor([1.0, 3.0]))
        tensor(1.5000)
    """

    def __init__(
        self, mu: float, weights: Sequence[float] | Tensor | None = None, reference: Sequence[float] | Tensor | None = None
    ) -> None:
        super().__init__(weights, reference)
        if not mu > 0:
            raise ValueError(f"mu is {mu}, expected a positive number")
        self.mu = float(mu)

    def forward(self, losses: Tensor) -> Tensor:
        shifted = self.shifted(losses)
        weighted = shifted / len(losses) if self.weights is None else self.weights * shifted
        return self.mu * torch.logsumexp(weighted / self.mu, 0)

    def extra_repr(self) -> str:
        return f"mu={self.mu}"


class COSMOS(_Preferring):
    """The weighted sum less how well the losses point along the weights (Ruchte and Grabocka, "Scalable Pareto front approximation", ICDM 2021).

    `forward(losses)` takes [K] and returns sum_i weights_i l_i - penalty cos(weights, l).

    Args:
        penalty: the method's lambda, at least 0.
        weights: K numbers, none negative.

        >>> mf.losses.COSMOS(1.0, [1.0, 1.0])(torch.tensor([2.0, 2.0]))
        tensor(3.)
    """

    weights: Tensor

    def __init__(self, penalty: float, weights: Sequence[float] | Tensor) -> None:
        super().__init__(weights, None)
        if not penalty >= 0:
            raise ValueError(f"penalty is {penalty}, expected a number of at least 0")
        self.penalty = float(penalty)

    def forward(self, losses: Tensor) -> Tensor:
        shifted = self.shifted(losses)
        return (self.weights * shifted).sum() - self.penalty * nn.functional.cosine_similarity(self.weights, shifted, 0)

    def extra_repr(self) -> str:
        return f"penalty={self.penalty}"


class PBI(_Preferring):
    """Penalty-based boundary intersection: how far along a direction, and theta times how far from it (Zhang and Li, "MOEA/D", IEEE TEVC 2007).

    `forward(losses)` takes [K] and returns d1 + theta d2: with u = weights / |weights| and f = l - reference, d1 = <f, u> and d2 = |f - d1 u|.

    Args:
        theta: at least 0.
        weights: the direction, K numbers, none negative.
        reference: K numbers; 0 by default.

        >>> mf.losses.PBI(1.0, [1.0, 0.0])(torch.tensor([3.0, 4.0]))
        tensor(7.)
    """

    weights: Tensor

    def __init__(self, theta: float, weights: Sequence[float] | Tensor, reference: Sequence[float] | Tensor | None = None) -> None:
        super().__init__(weights, reference)
        if not theta >= 0:
            raise ValueError(f"theta is {theta}, expected a number of at least 0")
        self.theta = float(theta)

    def forward(self, losses: Tensor) -> Tensor:
        shifted = self.shifted(losses)
        direction = self.weights / self.weights.norm()
        along = (shifted * direction).sum()  # no product of matrices, which autocast would round
        return along + self.theta * ((shifted - along * direction).square().sum() + SMALL).sqrt()

    def extra_repr(self) -> str:
        return f"theta={self.theta}"
