"""One row per rule: how to make it, what it promises, and how far given weights are from its own optimality conditions."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mmfast.resolvers import simple
from mmfast.resolvers.base import Resolver

# The two-row example every multi-task library is checked on: J and the golden weights of it.
GOLDEN_J = torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]], dtype=torch.float64)


@dataclass(frozen=True)
class Row:
    """What a rule promises.

    residual(G, w) is the worst violation of the rule's own optimality conditions, relative to the problem's size, for
    one full problem G [K, K] without missing rows; it must not call the rule's own code.
    """

    make: Callable[[int], Resolver]  # K -> a fresh resolver
    residual: Callable[[Tensor, Tensor], float] | None = None
    power: float | None = 0.0  # w(s G) = s^power w(G); None where no such law holds
    equivariant: bool = True  # permuting the rows permutes the weights
    nonconflicting: bool = False  # G w >= 0
    golden: tuple[float, ...] | None = None  # weights on GOLDEN_J
    golden_tolerance: float = 1e-4
    torchjd: Callable[[], object] | None = None  # the peer's aggregator that computes the same
    tolerance: float = 1e-8  # of residual
    min_k: int = 1


RULES: dict[str, Row] = {
    "Sum": Row(lambda k: simple.Sum(), golden=(1, 1)),
    "Mean": Row(lambda k: simple.Mean(), golden=(0.5, 0.5)),
    "Constant": Row(lambda k: simple.Constant([float(i + 1) for i in range(k)]), equivariant=False, golden=(1, 2)),
    "Random": Row(lambda k: simple.Random(), equivariant=False),
}
