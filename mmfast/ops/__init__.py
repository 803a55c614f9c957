"""Operators: gram, weights, combine, resolve."""

import torch
from torch import Tensor

from mmfast.ops import native, reference
from mmfast.resolvers.base import Resolver, Rule


def _states(chain: list[Rule], batch_shape: torch.Size, k: int) -> list[Tensor | None]:
    """Each rule's state as [B, S], made on first use."""
    states: list[Tensor | None] = []
    for rule in chain:
        rule.check(k)
        size = rule.state_size(k)
        if size and rule.state is None:
            rule.state = torch.zeros(*batch_shape, size, dtype=torch.float64)
        if size and rule.state is not None and rule.state.shape != (*batch_shape, size):
            raise ValueError(
                f"{type(rule).__name__} keeps state of shape {tuple(rule.state.shape)} from earlier calls, but this Gramian needs "
                f"{(*batch_shape, size)}; use one resolver per block, or call reset()"
            )
        states.append(rule.state.view(-1, size) if size and rule.state is not None else None)
    return states


def weights(G: Tensor, resolver: Resolver, mask: Tensor | None = None, *, preserve_norm: bool = False, backend: str = "auto") -> Tensor:
    """Weights [..., K] float64 of the Gramians G [..., K, K]."""
    chain = resolver.chain()
    if chain is None:
        return resolver(G, mask)
    G = G.double().contiguous()
    batch_shape, k = G.shape[:-2], G.shape[-1]
    states = _states(chain, batch_shape, k)
    rng = next((rule.rng for rule in chain if rule.rng is not None), None)
    if native.available and backend != "reference" and G.device.type == "cpu":
        steps = [n for rule in chain for n in (rule.method, len(rule.params()))]
        params = [x for rule in chain for x in rule.params()]
        kept = [s for s in states if s is not None]
        w, state = native.weights(G, mask, steps, params, torch.cat(kept, -1) if kept else None, rng, preserve_norm)
        next_states: list[Tensor | None] = list(state.split([rule.state_size(k) for rule in chain], -1)) if kept else [None] * len(chain)
    else:
        flat_mask = None if mask is None else mask.expand(*batch_shape, k).reshape(-1, k)
        w, next_states = reference.solve(G.reshape(-1, k, k), flat_mask, chain, states, rng, preserve_norm)
        w = w.view(*batch_shape, k)
    for rule, state in zip(chain, next_states, strict=True):
        if rule.state is not None and state is not None:
            rule.state.copy_(state.view_as(rule.state))
    if rng is not None:
        rng[1] += 1
    return w
