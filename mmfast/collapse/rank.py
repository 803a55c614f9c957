"""Ranks of features, gradients and weights: how many directions they have, counted in two ways."""

import torch
from torch import Tensor

TOL = 1e-3
_EXACT = 1e-6  # singular values below that share of the largest take the singular value decomposition itself to tell


def effective_rank(x: Tensor) -> Tensor:
    """Effective rank exp(-sum_i p_i log p_i), p_i = sigma_i / sum sigma of the singular values (Roy and Vetterli, "The effective rank", EUSIPCO 2007).

    k for a matrix with k equal singular values, near 1 where one of them is all there is. Columns are not centred: a mean counts as a direction.

    Args:
        x: [..., N, D], for instance N samples of D features, a gradient or a weight; any floating-point dtype, not changed.

    Returns:
        float64 [...] in [1, min(N, D)] on the device of x, with no gradient; 0 for a matrix of zeros, NaN for one with a number that is not finite.
        For float32 and below it is known to 1e-4 of itself, from the Gramian in float64 of the shorter side, in 2 N D min(N, D) operations; float64
        is decomposed.

    Raises:
        TypeError, ValueError: x is not as described.

    Example:
        >>> mf.collapse.effective_rank(torch.diag(torch.tensor([1.0, 1.0, 1.0, 0.0])))
        tensor(3.0000, dtype=torch.float64)
    """
    return effective(singular_values(x))


def numerical_rank(x: Tensor, tol: float = TOL) -> Tensor:
    """Number of singular values above `tol` times the largest.

    Args:
        x: [..., N, D] as for `effective_rank`.
        tol: in [0, 1).

    Returns:
        float64 [...], whole numbers, on the device of x, with no gradient; 0 for a matrix of zeros, NaN for one with a number that is not finite.

    Raises:
        TypeError, ValueError: an argument is not as described.

    Example:
        >>> mf.collapse.numerical_rank(torch.diag(torch.tensor([1.0, 0.1, 1e-4, 0.0])))
        tensor(2., dtype=torch.float64)
    """
    if not 0 <= tol < 1:
        raise ValueError(f"tol is {tol}, expected a number in [0, 1)")
    return numerical(singular_values(x, tol), tol)


def effective(sigma: Tensor) -> Tensor:
    """`effective_rank`, of singular values."""
    p = sigma / sigma.sum(-1, keepdim=True).clamp(min=torch.finfo(sigma.dtype).tiny)
    return torch.where((p == 0).all(-1), 0.0, torch.special.entr(p).sum(-1).exp())


def numerical(sigma: Tensor, tol: float) -> Tensor:
    """`numerical_rank`, of singular values."""
    largest = sigma.amax(-1, keepdim=True) if sigma.shape[-1] else sigma
    count = (sigma > tol * largest).sum(-1).double()
    return torch.where(sigma.isnan().any(-1), torch.nan, count)


def singular_values(x: Tensor, tol: float = 1.0) -> Tensor:
    """Singular values of [..., N, D], float64 [..., min(N, D)] in no order, right above `tol` times the largest; NaN of a matrix that is not finite."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x is {x.dtype if isinstance(x, Tensor) else f'a {type(x).__name__}'}, expected a floating-point tensor")
    if x.dim() < 2:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected [..., N, D]")
    wide, exact = x.detach().double(), x.dtype == torch.float64 or tol < _EXACT
    finite = wide.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
    wide = torch.where(finite, wide, 0.0)
    if exact:
        sigma = torch.linalg.svdvals(wide)
    else:
        # float32 knows its numbers to 6e-8, a Gramian in float64 its singular values to 1.5e-8 of the largest, in half to a fifth of the time
        gram = wide.mT @ wide if x.shape[-2] >= x.shape[-1] else wide @ wide.mT
        sigma = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    return torch.where(finite.squeeze(-1), sigma, torch.nan)
