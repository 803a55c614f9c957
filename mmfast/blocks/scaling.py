"""Local steps: the beta by which each branch's gradient is scaled before gradients are resolved.

The three of Javaloy, Meghdadi, Valera, "Mitigating modality collapse in multimodal VAEs via impartial optimization", ICML 2022, and of the
work it builds on. That paper's code obtains beta by rescaling the data or the log-likelihoods; here it is a plain vector.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

DISCRETE = ("count", "categorical", "binary", "ordinal")
CONTINUOUS = ("real", "positive")
LIPSCHITZ = ("real", "positive", "gamma", "exponential")


class LocalScale:
    """K positive numbers for the local step of a block, in `beta`, float64 [K]."""

    def __init__(self, beta: Sequence[float]) -> None:
        self.beta = torch.tensor(list(beta), dtype=torch.float64)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(beta=[{', '.join(f'{b:.4g}' for b in self.beta.tolist())}])"


def _columns(x: Any, types: Sequence[str], continuous: tuple[str, ...]) -> list[Tensor | None]:
    """The known cells of each continuous column in float64, None for a discrete one, checked."""
    x = torch.as_tensor(x, dtype=torch.float64, device="cpu").detach()
    if x.dim() != 2 or x.shape[1] != len(types):
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (rows, {len(types)}) for {len(types)} types")
    columns: list[Tensor | None] = []
    for d, kind in enumerate(types):
        if kind in DISCRETE:
            columns.append(None)
            continue
        if kind not in continuous:
            raise ValueError(f"types[{d}] is {kind!r}, expected one of {', '.join((*continuous, *DISCRETE))}")
        column = x[:, d]
        column = column[~column.isnan()]
        where = f"column {d} ({kind})"
        if column.isinf().any():
            raise ValueError(f"{where} has an infinite value, expected finite ones (NaN where missing)")
        if column.numel() < 2:
            raise ValueError(f"{where} has {column.numel()} known values, expected at least 2")
        if kind != "real" and (column <= 0).any():
            raise ValueError(f"{where} has the value {column.min().item():g}, expected positive ones")
        if (column == column[0]).all():
            raise ValueError(f"{where} is constant ({column[0].item():g}), so it has no scale; leave it out or pass beta yourself")
        columns.append(column)
    return columns


class StandardScale(LocalScale):
    """beta_d = 1 / standard deviation of continuous feature d over the training rows, 1 for discrete features.

    The paper's local step for tabular data; its code divides the data by the deviation instead.

    Args:
        x: training rows [N, D], NaN where a cell is missing.
        types: D of "real", "positive" (the deviation of the logarithm), "count", "categorical", "binary", "ordinal".

    Raises:
        ValueError: an unknown type, or a continuous column that is constant, not finite, or not positive where it should be.

    Example:
        >>> mf.StandardScale(torch.tensor([[0.0, 1.0], [2.0, 0.0], [4.0, 1.0]]), ["real", "binary"])
        StandardScale(beta=[0.5, 1])
    """

    def __init__(self, x: Any, types: Sequence[str]) -> None:
        columns = _columns(x, types, CONTINUOUS)
        values = [c if c is None or kind == "real" else c.log() for c, kind in zip(columns, types, strict=True)]
        super().__init__([1.0 if v is None else 1 / v.std().item() for v in values])


class DimRatio(LocalScale):
    """beta_d = largest size / size of modality d: every modality weighs as if it had as many values as the largest.

    The paper's local step for images and text; its code multiplies the log-likelihoods instead.

    Args:
        dims: K positive sizes, such as the number of pixels.

    Raises:
        ValueError: no size, or one that is not positive and finite.

    Example:
        >>> mf.DimRatio([784, 3072, 568])
        DimRatio(beta=[3.918, 1, 5.408])
    """

    def __init__(self, dims: Sequence[float]) -> None:
        sizes = [float(n) for n in dims]
        if not sizes:
            raise ValueError("dims is empty, expected one size per modality")
        for d, n in enumerate(sizes):
            if not (math.isfinite(n) and n > 0):
                raise ValueError(f"dims[{d}] is {n}, expected a positive finite size")
        super().__init__([max(sizes) / n for n in sizes])


def _gamma_fit(x: Tensor) -> tuple[float, float]:
    """Maximum-likelihood shape and rate of a Gamma distribution."""
    mean = x.mean()
    s = -(x / mean).log().mean()  # log of the mean minus mean of the logs
    k = (3 - s + ((s - 3).square() + 24 * s).sqrt()) / (12 * s)
    if s > 1e-4:  # below, this start is exact to 1e-12 and log k - digamma(k) would cancel
        for _ in range(50):
            k = k - (k.log() - torch.digamma(k) - s) / (1 / k - torch.polygamma(1, k))
    return k.item(), (k / mean).item()


def _smoothness(kind: str, x: Tensor) -> tuple[float, ...]:
    """Per natural parameter j: the 1-norm of row j of the Hessian of the mean log-likelihood, at the fit of the column.

    In an exponential family that Hessian is minus the covariance of the sufficient statistics, whatever the data.
    """
    if kind == "exponential":
        mean = x.mean().item()
        return (mean * mean,)
    if kind == "gamma":
        shape, rate = _gamma_fit(x)
        cross = 1 / rate
        return torch.polygamma(1, torch.tensor(shape, dtype=torch.float64)).item() + cross, cross + shape * cross * cross
    x = x.log() if kind == "positive" else x
    mean, variance = x.mean().item(), x.var(correction=0).item()
    cross = 2 * abs(mean) * variance  # of x and x^2
    return variance + cross, cross + 2 * variance * variance + 4 * mean * mean * variance


def _positive_root(terms: dict[int, float], goal: float) -> float:
    """The w > 0 with sum_p terms[p] w^p = goal, for positive terms, powers and goal."""
    # at the root no term exceeds the goal, and one has at least its share of it: a bracket of less than one octave
    high = min((goal / c) ** (1 / p) for p, c in terms.items())
    low = min((goal / len(terms) / c) ** (1 / p) for p, c in terms.items())
    for _ in range(60):
        middle = (low + high) / 2
        if sum(c * middle**p for p, c in terms.items()) < goal:
            low = middle
        else:
            high = middle
    return (low + high) / 2


class LipschitzScale(LocalScale):
    """beta_d that gives the log-likelihoods of all continuous features the same local smoothness, 1 for discrete features.

    Javaloy, Valera, "Lipschitz standardization for multivariate learning", arXiv 2002.11369. With L_j the smoothness in natural
    parameter j of a feature at its fit, and f_j(w) what scaling the data by w does to that parameter, beta solves
    sum_j f_j(w) L_j * sum_j f_j(w) = 1 / (lr * number of continuous features). The released code scales the data by it. The fit is that of
    maximum likelihood, so variances are divided by N, the number of known cells, and not by N - 1 as the deviations of `StandardScale` are.

    Args:
        x: training rows [N, D], NaN where a cell is missing.
        types: D of "real" (normal), "positive" (log-normal), "gamma", "exponential", "count", "categorical", "binary", "ordinal".
        lr: learning rate that the smoothness is to suit.

    Raises:
        ValueError: as for `StandardScale`, or a Gamma column too rough to be brought to the goal by scaling.

    Example:
        >>> mf.LipschitzScale(torch.tensor([[0.0, 1.0], [2.0, 0.0], [4.0, 1.0]]), ["real", "binary"])
        LipschitzScale(beta=[1.7, 1])
    """

    def __init__(self, x: Any, types: Sequence[str], lr: float = 1e-3) -> None:
        if not (math.isfinite(lr) and lr > 0):
            raise ValueError(f"lr is {lr}, expected a positive finite number")
        columns = _columns(x, types, LIPSCHITZ)
        goal = 1 / (lr * max(1, sum(c is not None for c in columns)))
        beta = []
        for d, (column, kind) in enumerate(zip(columns, types, strict=True)):
            if column is None:
                beta.append(1.0)
                continue
            L = _smoothness(kind, column)
            if not all(math.isfinite(v) and v > 0 for v in L):
                raise ValueError(f"column {d} ({kind}) is too far from unit scale: its smoothness is {L}; rescale it first")
            if kind == "gamma":
                if L[0] >= goal:
                    raise ValueError(f"column {d} (gamma) has smoothness {L[0]:.4g} at any scale, above the goal {goal:.4g}; lower lr")
                beta.append(_positive_root({1: L[0] + L[1], 2: L[1]}, goal - L[0]))
            elif kind == "exponential":
                beta.append(_positive_root({2: L[0]}, goal))
            else:
                beta.append(_positive_root({2: L[0], 3: L[0] + L[1], 4: L[1]}, goal))
        super().__init__(beta)
