"""gram: the Gramian of K gradients."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmfast import contract
from mmfast.backends import cpu, library
from mmfast.backends.choice import choose, functions_of
from mmfast.ops import lists


def gram(
    grads: Sequence[Any] | Tensor,
    per: str = "batch",
    *,
    others: Sequence[Any] | Tensor | None = None,
    mask: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Inner products of all pairs of gradients: the only pass that reads all data.

    Args:
        grads: 1 to 256 tensors of one shape, dtype and device, or one tensor [K, ...] with a gradient in each row ([K, B, ...] where `per`
            needs a batch). float16, bfloat16, float32 or float64, any strides; sparse ones are made dense, and of complex ones each number
            counts as the pair of its real and imaginary part. Or K lists of as many tensors each, one Gramian over all of them: None stands for
            a list, or a tensor in it, that is not there.
        per: "batch" takes each gradient as one vector; "sample" one Gramian per entry of the leading dimension;
            "batch_sum" the Gramian of the gradients summed over the leading dimension.
        others: a second list of K gradients like the first: the inner products are those of each of `grads` (rows) with each of these (columns), as
            rules for two independent batches take them (`MoDo`, `SDMGrad`). One pass reads both, each once, up to K = 128.
        mask: bool [K], or [B, K] for a mask per sample; False entries count as zero and are not read, in `others` neither.
        backend: "auto", "cpu" or "cuda" (compiled), "triton" (GPUs; more than 64 gradients run in plain torch), or "reference" (plain torch).
            "auto" is MMFAST_BACKEND where that is set, else "cpu" on the CPU, on a GPU what has proved itself there (`verify`), else "reference".

    Returns:
        float64 [K, K], or [B, K, K] per sample, freshly allocated; not symmetric with `others`. Products are summed in single precision over at most 4096
        elements (double for float64), then in double, in an order that depends on the number of elements alone: the same bits
        for every thread count and instruction set. No gradient flows back through it.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    >>> import torch, mmfast as mf
    >>> mf.gram([torch.tensor([3.0, 4.0]), torch.tensor([1.0, 0.0])])
    tensor([[25.,  3.],
            [ 3.,  1.]], dtype=torch.float64)
    >>> mf.gram([torch.tensor([3.0, 4.0]), torch.tensor([1.0, 0.0])], others=[torch.tensor([1.0, 1.0]), torch.tensor([0.0, 2.0])])
    tensor([[7., 8.],
            [1., 0.]], dtype=torch.float64)
    """
    contract.per_code(per)
    if others is not None:
        return _between(contract.as_rows(grads), contract.as_rows(others), per, mask, backend)
    grads = contract.as_rows(grads)
    k = len(grads)
    contract.check_count(k)
    if lists.is_lists(grads):
        with torch.no_grad():
            return lists.gram(lists.columns_of(grads, per, mask), k, per, mask, backend)
    return contract.call_ordinary(_gram, grads, (per, mask, k, backend), per, mask, k, lambda G: G)


def _gram(grads: Sequence[Tensor], per: str, mask: Tensor | None, k: int, backend: str) -> Tensor:
    first, functions = grads[0], cpu
    if backend != "auto" or not library.serves_cpu or torch.compiler.is_compiling() or not isinstance(first, Tensor) or not first.is_cpu:
        contract.check(grads, per, mask, k)
        functions = functions_of(choose(first.device, backend, k))
    try:
        return functions.gram(grads, [], mask, per)
    except (RuntimeError, TypeError):
        contract.check(grads, per, mask, k)  # says what is wrong in words for people, where it knows
        raise


def _between(grads: Sequence[Any], others: Sequence[Any], per: str, mask: Tensor | None, backend: str) -> Tensor:
    """Products of `grads` with `others`, [..., K, K]: blocks beside the diagonal of Gramians of both."""
    k = len(grads)
    contract.check_count(k)
    if len(others) != k:
        raise ValueError(f"others holds {len(others)} gradients, expected {k} as grads does")
    for i, (one, other) in enumerate(zip(grads, others, strict=True)):
        if isinstance(one, Tensor) and isinstance(other, Tensor) and one.shape != other.shape:
            raise ValueError(f"others[{i}] has shape {tuple(other.shape)}, expected {tuple(one.shape)} like grads[{i}]")
    if isinstance(mask, Tensor) and mask.shape[-1:] != (k,):
        raise ValueError(f"mask has shape {tuple(mask.shape)}, expected {(k,)}, or (batch, {k}), for {k} gradients")
    half = contract.MAX_GRADS // 2
    parts = [slice(i, min(i + half, k)) for i in range(0, k, half)]

    def block(rows: slice, columns: slice) -> Tensor:
        both = None if mask is None else torch.cat([mask[..., rows], mask[..., columns]], -1)
        n = rows.stop - rows.start
        return gram([*grads[rows], *others[columns]], per, mask=both, backend=backend)[..., :n, n:]

    return torch.cat([torch.cat([block(rows, columns) for columns in parts], -1) for rows in parts], -2)
