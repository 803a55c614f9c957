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
    mask: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Inner products of all pairs of gradients: the only pass that reads all data.

    Args:
        grads: 1 to 4096 tensors of one shape, dtype and device, or one tensor [K, ...] with a gradient in each row ([K, B, ...] where `per`
            needs a batch). float16, bfloat16, float32 or float64, any strides; sparse ones are made dense, and of complex ones each number
            counts as the pair of its real and imaginary part. Or K lists of as many tensors each, one Gramian over all of them: None stands for
            a list, or a tensor in it, that is not there.
        per: "batch" takes each gradient as one vector; "sample" one Gramian per entry of the leading dimension;
            "batch_sum" the Gramian of the gradients summed over the leading dimension.
        mask: bool [K], or [B, K] for a mask per sample; False entries count as zero and are not read.
        backend: "auto", "cpu" or "cuda" (compiled), "triton" (GPUs; more than 64 gradients run in plain torch), or "reference" (plain torch).
            "auto" is MMFAST_BACKEND where that is set, else "cpu" on the CPU, on a GPU what has proved itself there (`verify`), else "reference".

    Returns:
        float64 [K, K], or [B, K, K] per sample, freshly allocated. Products are summed in single precision over at most 4096
        elements (double for float64), then in double, in an order that depends on the number of elements alone: the same bits
        for every thread count and instruction set. Beyond 256 gradients it is made in blocks. No gradient flows back through it.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    >>> import torch, mmfast as mf
    >>> mf.gram([torch.tensor([3.0, 4.0]), torch.tensor([1.0, 0.0])])
    tensor([[25.,  3.],
            [ 3.,  1.]], dtype=torch.float64)
    """
    contract.per_code(per)
    grads = contract.as_rows(grads)
    k = len(grads)
    contract.check_count(k)
    if lists.is_lists(grads):
        with torch.no_grad():
            return lists.gram(lists.columns_of(grads, per, mask), k, per, mask, backend)
    return contract.call_ordinary(_gram, grads, (per, mask, k, backend), per, mask, k, lambda G: G)


def _gram(grads: Sequence[Tensor], per: str, mask: Tensor | None, k: int, backend: str) -> Tensor:
    first, functions = grads[0], cpu
    if (
        backend != "auto"
        or not library.serves_cpu
        or torch.compiler.is_compiling()
        or not isinstance(first, Tensor)
        or not first.is_cpu
        or k > contract.MAX_GRADS
    ):
        contract.check(grads, per, mask, k)
        functions = functions_of(choose(first.device, backend, k), k)
    try:
        return functions.gram(grads, [], mask, per)
    except (RuntimeError, TypeError):
        contract.check(grads, per, mask, k)  # says what is wrong in words for people, where it knows
        raise
