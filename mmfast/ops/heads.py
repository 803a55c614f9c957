"""The operator of linear branches: the resolved gradient of their input, from the gradients of their outputs and their weights."""

import torch
from torch import Tensor

from mmfast.backends import direct, reference
from mmfast.backends.choice import choose, functions_of
from mmfast.ops.weights import solve_checked
from mmfast.resolvers.base import Resolver
from mmfast.resolvers.chain import bind
from mmfast.resolvers.norm import measured
from mmfast.resolvers.solve import precision_of, present_rows, untold


def heads(
    delta: Tensor,
    weight: Tensor,
    head_of: Tensor,
    resolver: Resolver,
    k: int,
    per: str,
    mask: Tensor | None,
    preserve_norm: bool,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(resolved gradient [..., H], info float64 [K + K * K] or [B, K + K * K]: weights, then Gramian), see `reference.heads`.

    The Gramian comes from delta' delta and W W', in float32 (float64 for float64), summed over branches in float64; a resolver of the user
    runs between plain-torch forms of both halves.
    """
    if mask is None and per == "batch" and backend == "auto":
        found = direct.heads(delta, weight, head_of, k, resolver, preserve_norm)
        if found is not None:
            return found
    chain = resolver.chain()
    if chain is None:
        return _with_forward(delta, weight, head_of, resolver, k, per, mask, preserve_norm)
    bound = bind(chain, (delta.shape[0],) if per == "sample" else (), k, delta.device)
    return functions_of(choose(delta.device, backend, k, "heads")).heads(delta, weight, head_of, mask, bound, k, per, preserve_norm)


def _with_forward(
    delta: Tensor, weight: Tensor, head_of: Tensor, resolver: Resolver, k: int, per: str, mask: Tensor | None, preserve_norm: bool
) -> tuple[Tensor, Tensor]:
    """A resolver that is no chain of built-in rules: its own code between plain-torch forms of both halves."""
    delta = reference.hide_branches(delta, head_of, mask)
    G = reference.heads_gram(delta, weight, head_of, k, per)
    rows, precision = reference.problem_mask(mask, per), precision_of(delta.dtype)
    w = solve_checked(G, resolver, rows, False, precision)
    if preserve_norm:
        norm = untold(G, present_rows(G, rows), w, precision)
        w = w * measured(norm, *reference.heads_lengths(delta, weight, head_of, w, per)).unsqueeze(-1)
    return reference.heads_combine(delta, weight, head_of, w, per), torch.cat([w, G.flatten(-2)], -1)
