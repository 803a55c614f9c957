"""combine: the weighted sum of K gradients."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mmfast import contract
from mmfast.backends.choice import choose, functions_of


def combine(grads: Sequence[Tensor] | Tensor, w: Tensor, per: str = "batch", *, backend: str = "auto") -> Tensor:
    """The weighted sum of the gradients, sum_i w_i g_i.

    Args:
        grads: as for `gram`.
        w: weights [K], or [B, K] for per="sample"; any floating dtype, used in single precision (double for float64 gradients).
        per: "batch", "sample" or "batch_sum" (the same as "batch" here).
        backend: as for `gram`.

    Returns:
        A fresh contiguous tensor of the shape and dtype of one gradient; rows are added in order, 16-bit types are rounded once.
        No gradient flows back through it.

    >>> import torch, mmfast as mf
    >>> mf.combine([torch.tensor([3.0, 4.0]), torch.tensor([1.0, 0.0])], torch.tensor([0.5, 1.0]))
    tensor([2.5000, 2.0000])
    """
    contract.per_code(per)
    grads = contract.as_rows(grads)
    k = len(grads)
    contract.check_count(k)
    return contract.call_ordinary(_combine, grads, (w, per, k, backend), per, None, k, torch.view_as_complex)


def _combine(grads: Sequence[Tensor], w: Tensor, per: str, k: int, backend: str) -> Tensor:
    contract.check_grads(grads)
    contract.check_per(per, grads[0].shape)
    expected = (grads[0].shape[0], k) if per == "sample" else (k,)
    if not isinstance(w, Tensor) or tuple(w.shape) != expected:
        raise ValueError(f"w is {tuple(w.shape) if isinstance(w, Tensor) else type(w).__name__}, expected a tensor of shape {expected}")
    if not w.is_floating_point():
        raise TypeError(f"w is {w.dtype}, expected a floating-point tensor")
    w = w.to(dtype=torch.float64, device=grads[0].device).contiguous()
    return functions_of(choose(grads[0].device, backend, k)).combine(grads, [], None, w, per)
