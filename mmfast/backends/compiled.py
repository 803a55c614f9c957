"""The compiled operators, which serve CPU and CUDA tensors alike: torch's dispatcher finds the kernels of the device."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mmfast import contract
from mmfast.backends import library, vmap
from mmfast.resolvers import chain as chains
from mmfast.resolvers.chain import Bound
from mmfast.resolvers.elementwise import GradDrop, TrimmedMean

if library.available:
    vmap.register()
    _gram = torch.ops.mmfast.gram.default
    _combine = torch.ops.mmfast.combine.default
    _lengths = torch.ops.mmfast.lengths.default
    _weights = torch.ops.mmfast.weights.default
    _resolve = torch.ops.mmfast.resolve.default
    _graddrop = torch.ops.mmfast.graddrop.default
    _trimmed_mean = torch.ops.mmfast.trimmed_mean.default
    _heads = torch.ops.mmfast.heads.default


def gram(grads: Sequence[Tensor], missing: Sequence[int], mask: Tensor | None, per: str) -> Tensor:
    return _gram(grads, missing, mask, contract.PER[per])


def combine(grads: Sequence[Tensor], missing: Sequence[int], mask: Tensor | None, w: Tensor, per: str) -> Tensor:
    return _combine(grads, missing, mask, w, contract.PER[per])


def lengths(grads: Sequence[Tensor], missing: Sequence[int], mask: Tensor | None, w: Tensor, per: str) -> tuple[Tensor, Tensor]:
    found = _lengths(grads, missing, mask, w, contract.PER[per])
    return found[..., 0], found[..., 2]


def weights(
    G: Tensor,
    mask: Tensor | None,
    bound: Bound,
    preserve_norm: bool,
    precision: float,
) -> Tensor:
    state = chains.join(bound.states)
    w = _weights(G, mask, *chains.steps_and_params(bound.chain), state, bound.rng, preserve_norm, precision)
    chains.write_back(bound.states, state)
    return w


def resolve(
    grads: Sequence[Tensor],
    missing: Sequence[int],
    mask: Tensor | None,
    bound: Bound,
    per: str,
    preserve_norm: bool,
    with_gram: bool,
) -> tuple[Tensor, Tensor]:
    state = chains.join(bound.states)
    out, info = _resolve(
        grads, missing, mask, *chains.steps_and_params(bound.chain), state, bound.rng, contract.PER[per], preserve_norm, with_gram
    )
    chains.write_back(bound.states, state)
    return out, info


def graddrop(grads: Sequence[Tensor], missing: Sequence[int], mask: Tensor | None, rule: GradDrop) -> Tensor:
    return _graddrop(grads, missing, mask, rule.leaks, rule.stream(grads[0].device))


def trimmed_mean(grads: Sequence[Tensor], missing: Sequence[int], mask: Tensor | None, rule: TrimmedMean) -> Tensor:
    return _trimmed_mean(grads, missing, mask, rule.trim)


def heads(
    delta: Tensor,
    weight: Tensor,
    head_of: Tensor,
    mask: Tensor | None,
    bound: Bound,
    k: int,
    per: str,
    preserve_norm: bool,
) -> tuple[Tensor, Tensor]:
    state = chains.join(bound.states)
    steps, params = chains.steps_and_params(bound.chain)
    out, info = _heads(delta, weight, head_of, mask, steps, params, state, bound.rng, k, contract.PER[per], preserve_norm)
    chains.write_back(bound.states, state)
    return out, info
