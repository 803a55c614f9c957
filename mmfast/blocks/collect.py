"""collect: losses whose backward passes come one after the other, resolved at the parameters that they share."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from mmfast import contract
from mmfast.blocks import notices
from mmfast.blocks.parameters import add, resolved, stats_of
from mmfast.blocks.places import in_order
from mmfast.resolvers.base import Resolver
from mmfast.resolvers.names import ResolverLike, instance_of
from mmfast.stats import BlockStats

Row = list[Tensor | None]  # the gradients of one loss at the parameters


class Collected:
    """What `collect` gives: call it with a loss's name for the `with` in which that loss goes back."""

    stats: BlockStats | None = None  # of the resolved problem, once the `with` of `collect` has been left

    def __init__(self, names: tuple[str, ...], params: list[Tensor]) -> None:
        self._names, self._params = names, params
        self._rows: dict[str, Row] = {}
        self._inside: str | None = None

    @contextlib.contextmanager
    def __call__(self, name: str | int) -> Iterator[None]:
        """What is accumulated in `.grad` inside is this loss's, not the parameters'; a pass that fails counts as not made."""
        name = str(name)
        if name not in self._names:
            raise ValueError(f"name is {name!r}, expected one of {contract.shortened(self._names)}")
        if self._inside is not None:
            raise RuntimeError(f"loss {name!r} inside that of {self._inside!r}: leave one `with` before the next")
        before, self._inside = self._take([None] * len(self._params)), name
        found = None
        try:
            with notices.taking_apart():
                yield
            found = self._rows.get(name), self._take(before)
        finally:
            self._inside = None
            if found is None:
                self._take(before)
        self._rows[name] = _sum(*found)

    def _take(self, instead: Row) -> Row:
        """The `.grad` of the parameters, with others in their place."""
        found = [p.grad for p in self._params]
        for p, gradient in zip(self._params, instead, strict=True):
            p.grad = gradient
        return found

    def _resolve(self, resolver: Resolver, preserve_norm: bool) -> None:
        table = [self._rows.get(name) for name in self._names]
        counts = [sum(row is not None and row[t] is not None for row in table) for t in range(len(self._params))]
        shared = [t for t, count in enumerate(counts) if count > 1]
        found, info = resolved(
            [self._params[t] for t in shared], [row and [row[t] for t in shared] for row in table], resolver, preserve_norm
        )
        for t, count in enumerate(counts):
            found += [(self._params[t], row[t]) for row in table if count == 1 and row is not None and row[t] is not None]  # type: ignore[misc]
        self._rows.clear()
        for p, gradient in found:
            add(p, gradient)
        self.stats = stats_of(self._names, [info], resolver)


@torch.no_grad()
def _sum(row: Row | None, more: Row) -> Row:
    """The gradients of several backward passes of one loss, in memory of their own: the next pass may write into that of `.grad` (DDP's buckets)."""
    if row is None:
        row = [None] * len(more)
    return [a if b is None else b.clone() if a is None else a + b for a, b in zip(row, more, strict=True)]


@contextlib.contextmanager
def collect(
    losses: Sequence[str] | int, resolver: ResolverLike, params: Iterable[Tensor], *, preserve_norm: bool = False
) -> Iterator[Collected]:
    """For a loop that calls `backward()` for each loss: their gradients are kept apart, and resolved when the `with` is left.

    The parameters that two losses or more have reached are one problem, as of `backward`, what only one has reached gets its plain gradient; both are added to `.grad`, which
    inside the `with` is as it was before. Each loss may have a forward pass, samples and micro-batches of its own (a second `with` of one name adds to its gradient), and its
    graph is freed when it has gone back. A loss that does not come is a missing modality. An error leaves `.grad` as it was. Blocks on the way pass plain sums on, hooks run as
    in any backward pass. K + 1 gradients of the parameters are in memory at a time, K + 2 with micro-batches.

    Args:
        losses: the names of all K losses, or K for "0", "1", ..., whether they come or not.
        resolver: the rule, or its name or class; a rule that keeps state belongs to one place, and is kept between steps.
        params: all parameters that the losses reach, such as `model.parameters()`. Any that are left out accumulate in `.grad` as always.
        preserve_norm: give the shared gradient the length of the plain sum.

    Returns:
        A context manager that gives a function: `with collected("image"):` around all that goes back for that loss. Its `stats` are as of `backward`, once all is resolved.

    Raises:
        TypeError, ValueError: an argument is not as described.

    Example:
        >>> trunk, heads = nn.Linear(4, 3), nn.ModuleDict({"image": nn.Linear(3, 1), "text": nn.Linear(3, 2)})
        >>> with mf.collect(["image", "text"], mf.UPGrad(), [*trunk.parameters(), *heads.parameters()]) as collected:
        ...     for name, head in heads.items():
        ...         with collected(name):
        ...             head(trunk(torch.randn(8, 4))).square().mean().backward()
        >>> collected.stats.weights.shape, trunk.weight.grad.shape
        (torch.Size([2]), torch.Size([3, 4]))
    """
    names = tuple(map(str, range(losses) if isinstance(losses, int) else losses))
    if not 1 <= len(names) <= contract.MAX_TILED or len(set(names)) < len(names):
        raise ValueError(f"losses is {contract.shortened(names)}, expected 1 to {contract.MAX_TILED} names, each once")
    given = [params] if isinstance(params, Tensor) else list(params)
    for i, p in enumerate(given):
        if not isinstance(p, Tensor) or not p.is_leaf:
            raise TypeError(f"params[{i}] is {'no leaf' if isinstance(p, Tensor) else f'a {type(p).__name__}'}, expected a parameter")
    resolver = instance_of(resolver, len(names))
    resolver.check(len(names))
    if not isinstance(losses, int):
        names = in_order(names, resolver)
    collected = Collected(names, list({id(p): p for p in given}.values()))
    yield collected
    collected._resolve(resolver, preserve_norm)
