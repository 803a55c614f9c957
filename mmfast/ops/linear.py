"""The operator of linear branches: the resolved gradient of their input, from the gradients of their outputs and their weights."""

from torch import Tensor

from mmfast import ops
from mmfast.ops import contract, direct, native, reference
from mmfast.resolvers.base import Resolver


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
    if chain is None or ops.serving(delta.device, backend, k) not in ("cpu", "cuda"):

        def solve(G: Tensor, row_mask: Tensor | None, precision: float) -> Tensor:
            return ops.solve(G, resolver, row_mask, preserve_norm, precision, backend)

        return reference.heads(delta, weight, head_of, mask, k, per, solve)
    states, rng = ops._states(chain, (delta.shape[0],) if per == "sample" else (), k, delta.device), ops._stream(chain, delta.device)
    steps, params = ops._steps(chain)
    state = ops._joined(states)
    out, info = native.heads(delta, weight, head_of, mask, steps, params, state, rng, k, contract.PER[per], preserve_norm)
    ops._keep(states, state)
    return out, info
