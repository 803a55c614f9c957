"""Junction: a block whose branches are not modules, but the places that one tensor, or a list of them, goes to."""

from collections.abc import Callable, Sequence
from typing import Any, cast

from torch import Tensor

from mmfast.blocks.fork import Plan, fork_by, fork_several
from mmfast.blocks.impartial import Impartial
from mmfast.resolvers.base import Resolver
from mmfast.resolvers.names import ResolverLike, made_of

Factory = Callable[[], ResolverLike] | str  # what makes the rule of each block


def rule_of(factory: Factory | None) -> ResolverLike:
    """The rule of one block."""
    if isinstance(factory, str):
        return factory
    if isinstance(factory, Resolver) or not callable(factory):
        raise TypeError(
            f"resolver is {factory!r}, expected a function that makes the rule of each block, such as a class or lambda: mf.CAGrad(c=0.4)"
        )
    return made_of(cast(ResolverLike, factory)) if isinstance(factory, type) else factory()


class Junction(Impartial):
    """Resolves the gradients that named places send back to a tensor, with the paper's norm preservation."""

    def __init__(self, names: Sequence[str], resolver: ResolverLike) -> None:
        super().__init__(len(names), resolver, None, "batch", True)
        self._names = tuple(names)

    @property
    def names(self) -> tuple[str, ...]:
        return self._names

    def forward(self, y: Tensor | list[Tensor]) -> tuple[Any, ...]:
        """An alias for each place, or a tuple of those of all tensors."""
        plan = Plan(len(self._names), self.resolver, self.per, self.preserve_norm, self, self.ranks)
        return fork_several(y, None, plan) if isinstance(y, list) else fork_by(y, None, plan)
