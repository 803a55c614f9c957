"""combine: the weighted sum of K gradients."""

from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor

from mmfast import contract
from mmfast.backends.choice import choose, functions_of
from mmfast.ops import lists


@overload
def combine(grads: Sequence[Tensor] | Tensor, w: Tensor, per: str = "batch", *, backend: str = "auto") -> Tensor: ...
@overload
def combine(grads: Sequence[Sequence[Tensor | None] | None], w: Tensor, per: str = "batch", *, backend: str = "auto") -> list[Tensor]: ...
def combine(grads: Any, w: Tensor, per: str = "batch", *, backend: str = "auto") -> Tensor | list[Tensor]:
    """The weighted sum of the gradients, sum_i w_i g_i.

    Args:
        grads: as for `gram`.
        w: weights [K], or [B, K] for per="sample"; any floating dtype, used in single precision (double for float64 gradients).
        per: "batch", "sample" or "batch_sum" (the same as "batch" here).
        backend: as for `gram`.

    Returns:
        A fresh contiguous tensor of the shape and dtype of one gradient, or a list of them where each gradient is one; rows are added in order, 16-bit types are rounded once
        (beyond 256 gradients, sums of blocks).
        No gradient flows back through it.

    >>> import torch, mmfast as mf
    >>> mf.combine([torch.tensor([3.0, 4.0]), torch.tensor([1.0, 0.0])], torch.tensor([0.5, 1.0]))
    tensor([2.5000, 2.0000])
    """
    contract.per_code(per)
    grads = contract.as_rows(grads)
    k = len(grads)
    contract.check_count(k)
    if lists.is_lists(grads):
        columns = lists.columns_of(grads, per, None)
        with torch.no_grad():
            return lists.combine(columns, k, _checked(w, columns[0].like, per, k), per, backend)
    return contract.call_ordinary(_combine, grads, (w, per, k, backend), per, None, k, torch.view_as_complex)


def _combine(grads: Sequence[Tensor], w: Tensor, per: str, k: int, backend: str) -> Tensor:
    contract.check_grads(grads)
    contract.check_per(per, grads[0].shape)
    w = _checked(w, grads[0], per, k)
    return functions_of(choose(grads[0].device, backend, k), k).combine(grads, [], None, w, per)


def _checked(w: Tensor, first: Tensor, per: str, k: int) -> Tensor:
    """The weights as the backends take them."""
    expected = (first.shape[0], k) if per == "sample" else (k,)
    if not isinstance(w, Tensor) or tuple(w.shape) != expected:
        raise ValueError(f"w is {tuple(w.shape) if isinstance(w, Tensor) else type(w).__name__}, expected a tensor of shape {expected}")
    if not w.is_floating_point():
        raise TypeError(f"w is {w.dtype}, expected a floating-point tensor")
    return w.to(dtype=torch.float64, device=first.device).contiguous()
