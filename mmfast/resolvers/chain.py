"""A chain of rules as the operators take it: numbers, states side by side, one random stream."""

from typing import NamedTuple, cast

import torch
from torch import Tensor

from mmfast import contract
from mmfast.resolvers.base import Rule, check_not_capturing, on_device


class Bound(NamedTuple):
    """A chain of rules with what they keep for the problems at hand."""

    chain: list[Rule]
    states: list[Tensor | None]  # of each rule, [*problems, S]
    rng: Tensor | None  # seed and counter


def bind(chain: list[Rule], problems: tuple[int, ...], k: int, device: torch.device) -> Bound:
    """The chain with its states for these problems of k rows, made on first use, and its random stream."""
    return Bound(chain, states_of(chain, problems, k, device), stream_of(chain, device))


def steps_and_params(chain: list[Rule]) -> tuple[list[int], list[float]]:
    """(rule id, number of parameters) of each step one after the other, and all parameters."""
    if len(chain) == 1:
        params = chain[0].params()
        return [chain[0].method, len(params)], params
    parts = [(rule.method, rule.params()) for rule in chain]
    return [n for method, params in parts for n in (method, len(params))], [x for _, params in parts for x in params]


def states_of(chain: list[Rule], problems: tuple[int, ...], k: int, device: torch.device) -> list[Tensor | None]:
    """Each rule's state [*problems, S], made on first use."""
    states: list[Tensor | None] = []
    for rule in chain:
        rule.check(k)
        size = rule.state_size(k)
        if not size:
            states.append(None)
            continue
        state = rule._buffers["state"]  # as an attribute of a module it would cost a microsecond each time
        if state is None:
            check_not_capturing(device, f"the state of {type(rule).__name__}")
            rule.state = state = contract.plain(torch.zeros(*problems, size, dtype=torch.float64, device=device))
        if state.device != device:
            rule.state = state = on_device(state, device)
        if state.shape != (*problems, size):
            raise ValueError(
                f"{type(rule).__name__} keeps state of shape {tuple(state.shape)} from earlier calls, but these gradients need "
                f"{(*problems, size)}; use one resolver per block, call its reset() (also after a checkpoint of an earlier version)"
            )
        states.append(state)
    return states


def join(states: list[Tensor | None]) -> Tensor | None:
    """The states of a chain side by side: one's own storage, or a copy of several."""
    if len(states) == 1:
        return states[0]
    present = [s for s in states if s is not None]
    return None if not present else present[0] if len(present) == 1 else torch.cat(present, -1)


def write_back(states: list[Tensor | None], joined: Tensor | None) -> None:
    """Writes joined states back where they are a copy."""
    if joined is None or len(states) == 1:
        return
    present = [s for s in states if s is not None]
    if len(present) > 1:
        for state, after in zip(present, joined.split([s.shape[-1] for s in present], -1), strict=True):
            state.copy_(after)


def stream_of(chain: list[Rule], device: torch.device) -> Tensor | None:
    """The random stream of a chain: its first random rule's; the steps draw from different places of it."""
    for rule in chain:
        if rule.random:
            rng = cast(Tensor, rule._buffers["rng"])
            if rng.device != device:
                rule.rng = rng = on_device(rng, device)
            return rng
    return None
