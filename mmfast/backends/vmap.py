"""torch.func.vmap: what it makes of each compiled operator.

Gradients that are mapped over are the samples of per="sample": one call of the same kernels, the bits of a loop over the calls.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmfast import contract
from mmfast.backends import library, reference

operators = torch.ops.mmfast
_BATCH, _SAMPLE, _BATCH_SUM = (contract.PER[per] for per in ("batch", "sample", "batch_sum"))


def _front(x: Tensor, dim: int | None, size: int) -> Tensor:
    """x with the mapped dimension first, repeated where it has none."""
    return x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)


def _all_in_front(
    info: Any, in_dims: Sequence[Any], grads: Sequence[Tensor], missing: Sequence[int], mask: Tensor | None, per: int
) -> tuple[list[Tensor], Tensor | None, tuple[int, ...]]:
    """Gradients [S, ...] and mask [S, K] for per="sample", or both with samples of all problems in one dimension where they were samples before;
    and what that dimension was made of."""
    size = info.batch_size
    grads = [_front(g, dim, size) for g, dim in zip(grads, in_dims[0], strict=True)]
    mask = None if mask is None else _front(mask, in_dims[2], size)
    if per == _SAMPLE:
        if mask is not None and mask.dim() == 2:
            mask = mask.unsqueeze(1).expand(size, grads[0].shape[1], mask.shape[-1])
        return [g.flatten(0, 1) for g in grads], None if mask is None else mask.flatten(0, 1), tuple(grads[0].shape[:2])
    if mask is not None and mask.dim() == 3:  # samples of a row that count as zero
        kept = [i for i in range(mask.shape[-1]) if i not in missing]
        there = [mask[..., i].reshape(*mask.shape[:2], *[1] * (grads[0].dim() - 2)) for i in kept]
        grads = [torch.where(m, g, 0) for m, g in zip(there, grads, strict=True)]
        mask = mask.any(1)
    return grads, mask, (size,)


def _gram(grads: Sequence[Tensor], missing: Sequence[int], mask: Tensor | None, per: int) -> Tensor:
    if per == _BATCH_SUM:
        grads = [g.double().sum(1).to(reference.wide(g)) for g in grads]
    return operators.gram(grads, missing, mask, _SAMPLE)


def map_gram(info: Any, in_dims: Any, grads: Any, missing: Any, mask: Any, per: int) -> tuple[Tensor, int]:
    grads, mask, problems = _all_in_front(info, in_dims, grads, missing, mask, per)
    return _gram(grads, missing, mask, per).unflatten(0, problems), 0


def map_combine(info: Any, in_dims: Any, grads: Any, missing: Any, mask: Any, w: Tensor, per: int) -> tuple[Tensor, int]:
    grads, mask, problems = _all_in_front(info, in_dims, grads, missing, mask, per)
    w = _front(w, in_dims[3], info.batch_size)
    w = w.flatten(0, 1) if per == _SAMPLE else w
    return operators.combine(grads, missing, mask, w.contiguous(), _SAMPLE).unflatten(0, problems), 0


def map_lengths(info: Any, in_dims: Any, grads: Any, missing: Any, mask: Any, w: Tensor, per: int) -> tuple[Tensor, int]:
    grads, mask, problems = _all_in_front(info, in_dims, grads, missing, mask, per)
    w = _front(w, in_dims[3], info.batch_size)
    w = w.flatten(0, 1) if per == _SAMPLE else w
    if per == _BATCH_SUM:
        grads = [g.double().sum(1) for g in grads]
    return operators.lengths(grads, missing, mask, w.contiguous(), _SAMPLE).unflatten(0, problems), 0


def map_weights(
    info: Any, in_dims: Any, gram: Tensor, mask: Any, steps: Any, params: Any, state: Any, rng: Any, preserve_norm: bool, precision: float
) -> tuple[Tensor, int]:
    contract.refuse_vmap(state, rng)
    gram = _front(gram, in_dims[0], info.batch_size).contiguous()
    if mask is not None:
        mask = _front(mask, in_dims[1], info.batch_size)
        if mask.dim() < gram.dim() - 1:
            mask = mask.view(len(mask), *[1] * (gram.dim() - 3), mask.shape[-1]).expand(gram.shape[:-1])
        mask = mask.contiguous()
    return operators.weights(gram, mask, steps, params, None, None, preserve_norm, precision), 0


def map_resolve(
    info: Any,
    in_dims: Any,
    grads: Any,
    missing: Any,
    mask: Any,
    steps: Any,
    params: Any,
    state: Any,
    rng: Any,
    per: int,
    preserve_norm: bool,
    with_gram: bool,
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    contract.refuse_vmap(state, rng)
    grads, mask, problems = _all_in_front(info, in_dims, grads, missing, mask, per)
    if per == _BATCH_SUM:  # resolved for the sums, then the weights for all
        sums = [g.double().sum(1).to(reference.wide(g)) for g in grads]
        _, seen = operators.resolve(sums, missing, mask, steps, params, None, None, _SAMPLE, preserve_norm, True)
        k = len(grads) + len(missing)
        return (operators.combine(grads, missing, mask, seen[:, :k].contiguous(), _SAMPLE), seen), (0, 0)
    out, seen = operators.resolve(grads, missing, mask, steps, params, None, None, _SAMPLE, preserve_norm, with_gram)
    return (out.unflatten(0, problems), seen.unflatten(0, problems)), (0, 0)


def map_heads(
    info: Any,
    in_dims: Any,
    delta: Tensor,
    weight: Tensor,
    head_of: Tensor,
    mask: Any,
    steps: Any,
    params: Any,
    state: Any,
    rng: Any,
    k: int,
    per: int,
    preserve_norm: bool,
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    contract.refuse_vmap(state, rng)
    if in_dims[2] is not None:  # a buffer that was stacked with the others: the same for all
        head_of = head_of.select(in_dims[2], 0)
    if per == _BATCH_SUM or in_dims[1] is not None:  # the kernel has no form for either
        delta, weight = _front(delta, in_dims[0], info.batch_size), _front(weight, in_dims[1], info.batch_size)
        masks = [None] * info.batch_size if mask is None else _front(mask, in_dims[3], info.batch_size)
        if not info.batch_size:
            samples = (delta.shape[1],) if per == _SAMPLE else ()
            seen = delta.new_empty(0, *samples, k + k * k, dtype=torch.float64)
            return (delta.new_empty(*delta.shape[:-1], weight.shape[-1]), seen), (0, 0)
        one = [
            operators.heads(d, w, head_of, m, steps, params, None, None, k, per, preserve_norm)
            for d, w, m in zip(delta, weight, masks, strict=True)
        ]
        return (torch.stack([out for out, _ in one]), torch.stack([seen for _, seen in one])), (0, 0)
    if mask is not None and per == _BATCH and mask.dim() - (in_dims[3] is not None) == 2:  # samples of a branch that count as zero
        delta, mask = _front(delta, in_dims[0], info.batch_size), _front(mask, in_dims[3], info.batch_size)
        there = mask.index_select(-1, head_of)
        delta = torch.where(there.view(*mask.shape[:2], *[1] * (delta.dim() - 3), there.shape[-1]), delta, 0)
        mask, in_dims = mask.any(1), (0, None, None, 0)
    (delta,), mask, problems = _all_in_front(info, ((in_dims[0],), None, in_dims[3]), [delta], [], mask, per)
    out, seen = operators.heads(delta, weight, head_of, mask, steps, params, None, None, k, _SAMPLE, preserve_norm)
    return (out.unflatten(0, problems), seen.unflatten(0, problems)), (0, 0)


def map_graddrop(info: Any, in_dims: Any, grads: Any, missing: Any, mask: Any, leak: list[float], rng: Tensor) -> None:
    contract.refuse_vmap(rng)


def map_trimmed_mean(info: Any, in_dims: Any, grads: Any, missing: Any, mask: Any, trim: int) -> tuple[Tensor, int]:
    size = info.batch_size
    if not size:
        return torch.empty_like(_front(grads[0], in_dims[0][0], 0)), 0
    problems = zip(*(_front(g, dim, size) for g, dim in zip(grads, in_dims[0], strict=True)), strict=True)
    masks = [None] * size if mask is None else _front(mask, in_dims[2], size)
    return torch.stack([operators.trimmed_mean(list(g), missing, m, trim) for g, m in zip(problems, masks, strict=True)]), 0


def map_log_prob(
    info: Any, in_dims: Any, raw: Tensor, x: Tensor, seen: Any, features: Tensor, w: Tensor, slopes: bool
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    size = info.batch_size
    if in_dims[3] is not None:  # a buffer that was stacked with the others: the same for all
        features = features.select(in_dims[3], 0)
    raw = _front(raw, in_dims[0], size)
    if all(dim is None for dim in (in_dims[1], in_dims[2], in_dims[4])):  # the rows of x go with those of raw in turn
        out, beside = operators.log_prob(raw, x, seen, features, w, slopes)
        return (out, beside if slopes else beside.expand(size, 0)), (0, 0)
    xs, ws = _front(x, in_dims[1], size), _front(w, in_dims[4], size)
    cells = [None] * size if seen is None else _front(seen, in_dims[2], size)
    if not size:
        return (raw.new_empty(*raw.shape[:-1], len(features)), raw.new_empty(raw.shape if slopes else (0, 0))), (0, 0)
    found = [operators.log_prob(r, x, s, features, w, slopes) for r, x, s, w in zip(raw, xs, cells, ws, strict=True)]
    return (torch.stack([out for out, _ in found]), torch.stack([beside for _, beside in found])), (0, 0)


def map_log_prob_backward(info: Any, in_dims: Any, grad: Tensor, slopes: Tensor, features: Tensor) -> tuple[Tensor, int]:
    if in_dims[2] is not None:
        features = features.select(in_dims[2], 0)
    grad, slopes = _front(grad, in_dims[0], info.batch_size), _front(slopes, in_dims[1], info.batch_size)
    return operators.log_prob_backward(grad, slopes.contiguous(), features), 0


def register() -> None:
    for name in [*library.OPERATORS, "log_prob", "log_prob_backward"]:
        torch.library.register_vmap(f"mmfast::{name}", globals()[f"map_{name}"])
