"""One problem over the processes of a group: each holds a part of the batch, and all combine their parts with the same weights.

What goes around is the Gramian; gradients stay where they are. With it goes what the rule keeps, from the group's first rank: ranks that were seeded,
reset or restored apart agree at every problem, and none has to remember that they did. Every rank makes the same calls, whatever its gradients hold.
"""

import math
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from mmfast.backends import reference
from mmfast.backends.choice import choose, functions_of
from mmfast.ops import lists
from mmfast.ops.lists import Column
from mmfast.resolvers.base import Resolver, Rule
from mmfast.resolvers.chain import bind
from mmfast.resolvers.norm import measured
from mmfast.resolvers.solve import precision_of, present_rows


class Ranks:
    """A process group, as a block keeps it."""

    def __init__(self, group: Any) -> None:
        if not torch.distributed.is_available():
            raise RuntimeError("group needs torch.distributed, which this torch was built without; leave group=None")
        if not isinstance(group, torch.distributed.ProcessGroup):
            mesh = "; of a DeviceMesh give mesh.get_group()" if type(group).__name__ == "DeviceMesh" else ""
            raise TypeError(f"group is a {type(group).__name__}, expected a torch.distributed.ProcessGroup that this process is in{mesh}")
        self.group = group
        self.rank, self.size = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)

    @classmethod
    def of(cls, group: Any) -> "Ranks | None":
        return None if group is None else cls(group)

    def __deepcopy__(self, memo: Any) -> "Ranks":
        return self  # a copy of a block works in the same group

    def __reduce__(self) -> NoReturn:
        raise TypeError("a block with group= can't be pickled, for a process group can't; save its state_dict() instead")

    def total(self, x: Tensor) -> Tensor:
        """The sum of x over the ranks, in place; the device waits for it, the host does not."""
        torch.distributed.all_reduce(x, group=self.group)
        return x


def _kept(resolver: Resolver, k: int, device: torch.device) -> list[Tensor]:
    """The states and random streams of a resolver's rules; those of a chain are made where they are not there yet."""
    chain = resolver.chain()
    if chain is not None:
        bound = bind(chain, (), k, device)
        return [x for x in (*bound.states, bound.rng) if x is not None]
    rules = [rule for rule in resolver.modules() if isinstance(rule, Rule)]
    return [x for rule in rules for x in (rule.state, rule.rng) if x is not None]


def agree(numbers: Tensor, kept: Sequence[Tensor], ranks: Ranks) -> Tensor:
    """The sum of float64 numbers over the ranks; in the same call what is kept (float64 or int64) becomes what the group's first rank keeps."""
    words = [x if x.is_floating_point() else x.view(torch.int32).double() for x in kept]  # float64 holds every 32-bit integer
    mine = words if ranks.rank == 0 else [torch.zeros_like(x) for x in words]
    flat = ranks.total(torch.cat([numbers.flatten(), *(x.flatten() for x in mine)]))
    found, *parts = flat.split([numbers.numel(), *(x.numel() for x in words)])
    for x, part in zip(kept, parts, strict=True):
        x.copy_(part.view(x.shape) if x.is_floating_point() else part.to(torch.int32).view(torch.int64).view(x.shape))
    return found.view(numbers.shape)


def resolve(
    columns: Sequence[Column],
    k: int,
    resolver: Resolver,
    per: str,
    mask: Tensor | None,
    preserve_norm: bool,
    precision: float,
    ranks: Ranks,
) -> tuple[list[Tensor], Tensor]:
    """`lists.resolve` for per="batch" and "batch_sum" of the concatenation of all ranks' gradients; each gets the result for its own part.

    One all-reduce, of the Gramian (of the K batch sums); a second one of two numbers where the norm is preserved.
    """
    device = columns[0].like.device
    resolver.check(k)
    kept = _kept(resolver, k, device)
    functions = functions_of(choose(device, "auto", k), k)
    measures, sums_mask = columns, mask
    if per == "batch_sum":
        sums = agree(torch.cat([_batch_sums(c, k, mask) for c in columns], -1), kept, ranks)
        measures, sums_mask = [Column(list(sums.unbind(0)), (), False)], None  # whole on every rank
        accumulator = torch.float64 if precision == precision_of(torch.float64) else torch.float32
        G = lists.gram([Column(list(sums.to(accumulator).unbind(0)), (), False)], k, "batch", None, "auto")
    else:
        G = agree(lists.gram(columns, k, per, mask, "auto"), kept, ranks)
    w, norm = lists.solve(G, present_rows(G, None), resolver, functions, precision, preserve_norm, (), k)
    if norm is not None:
        lengths = lists.lengths(measures, functions, sums_mask, w, "batch")
        plain, ours = (lengths if per == "batch_sum" else ranks.total(lengths)).unbind(0)
        w = (w * measured(norm, plain, ours)).contiguous()
    return lists.combined(columns, functions, mask, w, per), torch.cat([w, G.flatten()])


def _batch_sums(column: Column, k: int, mask: Tensor | None) -> Tensor:
    """Each gradient summed over the leading dimension, float64 [K, M]; zero where it is missing."""
    batch, size = column.like.shape[0], math.prod(column.like.shape[1:])
    x = torch.stack([g.reshape(batch, size) for g in column.grads]).double()
    hidden = reference.mask_of_present(mask, column.missing, k)
    if hidden is not None:
        x = torch.where((hidden.mT if hidden.dim() == 2 else hidden.unsqueeze(-1)).unsqueeze(-1), x, 0)
    return reference.pad_missing(x.sum(1), column.missing, k, 0)
