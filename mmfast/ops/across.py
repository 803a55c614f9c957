"""One problem over the processes of a group: each holds a part of the batch, and all combine their parts with the same weights.

What goes around is the Gramian; gradients stay where they are. With it goes what the rule keeps, from the group's first rank: ranks that were seeded,
reset or restored apart agree at every problem, and none has to remember that they did. Every rank makes the same calls, whatever its gradients hold.
"""

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
from mmfast.resolvers.elementwise import ElementwiseRule, GradDrop, TrimmedMean
from mmfast.resolvers.norm import measured
from mmfast.resolvers.philox import advance
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

    def largest(self, x: Tensor) -> Tensor:
        """The largest of each number over the ranks, in place."""
        torch.distributed.all_reduce(x, torch.distributed.ReduceOp.MAX, group=self.group)
        return x


def kept_by(resolver: Resolver, k: int, device: torch.device) -> list[Tensor]:
    """The states and random streams of a resolver's rules; those of a chain are made where they are not there yet."""
    if isinstance(resolver, GradDrop):
        return [resolver.stream(device)]
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
    takers: Tensor | None = None,
) -> tuple[list[Tensor], Tensor]:
    """`lists.resolve` for per="batch" and "batch_sum" of the concatenation of all ranks' gradients; each gets the result for its own part.

    One all-reduce, of the Gramian (of the K batch sums); a second one of two numbers where the norm is preserved. takers, float64 [tensors, K], says which
    branches took a tensor on this rank: one that a single branch takes on all of them is no part of the problem, and its gradient passes. Then each tensor has
    its Gramian in the all-reduce.
    """
    device = columns[0].like.device
    resolver.check(k)
    kept = kept_by(resolver, k, device)
    functions = functions_of(choose(device, "auto", k), k)
    if per == "batch_sum":
        mine = [_batch_sums(c, k, mask) for c in columns]
    else:
        mine = [lists.gram(part, k, per, mask, "auto") for part in ([columns] if takers is None else [[c] for c in columns])]
    sizes = [x.numel() for x in mine]
    found = agree(torch.cat([*(x.flatten() for x in mine), *([] if takers is None else [takers.flatten()])]), kept, ranks)
    parts = [part.view(x.shape) for x, part in zip(mine, found[: sum(sizes)].split(sizes), strict=True)]
    shared = None if takers is None else (found[sum(sizes) :].view(takers.shape) > 0).sum(1) > 1  # bool [tensors]
    if shared is not None:
        parts = [torch.where(s, x, 0) for s, x in zip(shared, parts, strict=True)]
    if per == "batch_sum":
        sums = torch.cat(parts, -1)  # whole on every rank
        accumulator = torch.float64 if precision == precision_of(torch.float64) else torch.float32
        G = functions.gram(list(sums.to(accumulator).unbind(0)), (), None, "batch")
    else:
        G = _symmetric(torch.stack(parts).sum(0))
    w, norm = lists.solve(G, present_rows(G, None), resolver, functions, precision, preserve_norm, (), k)
    if norm is not None:
        if per == "batch_sum":
            lengths = torch.stack(functions.lengths(list(sums.unbind(0)), (), None, w, "batch"))
        else:
            each = [lists.lengths([c], functions, mask, w, per) for c in columns]
            each = each if shared is None else [torch.where(s, x, 0) for s, x in zip(shared, each, strict=True)]
            lengths = ranks.total(torch.stack(each).sum(0))
        w = (w * measured(norm, *lengths.unbind(0))).contiguous()
    out = lists.combined(columns, functions, mask, w, per)
    if shared is not None:
        alone = [c.result(functions.combine(c.grads, c.missing, None, torch.ones_like(w), per)) for c in columns]
        out = [torch.where(s, x, plain) for s, x, plain in zip(shared, out, alone, strict=True)]
    return out, torch.cat([w, G.flatten()])


def heads(
    delta: Tensor,
    weight: Tensor,
    head_of: Tensor,
    resolver: Resolver,
    k: int,
    per: str,
    mask: Tensor | None,
    preserve_norm: bool,
    ranks: Ranks,
) -> tuple[Tensor, Tensor]:
    """`reference.heads` for per="batch" and "batch_sum" of the concatenation of all ranks' delta; they hold the same weight.

    The all-reduces of `resolve`, but for per="batch_sum" it is delta that is summed, a number for each output.
    """
    resolver.check(k)
    precision, kept = precision_of(delta.dtype), kept_by(resolver, k, delta.device)
    functions = functions_of(choose(delta.device, "auto", k, "heads"))
    delta = reference.hide_branches(delta, head_of, mask)
    measures = delta
    if per == "batch_sum":
        measures = agree(delta.double().sum(0), kept, ranks)  # whole on every rank
        G = reference.heads_gram(measures.to(reference.wide(delta)), weight, head_of, k, "batch")
    else:
        G = _symmetric(agree(reference.heads_gram(delta, weight, head_of, k, per), kept, ranks))
    w, norm = lists.solve(G, present_rows(G, None), resolver, functions, precision, preserve_norm, (), k)
    if norm is not None:
        lengths = torch.stack(reference.heads_lengths(measures, weight, head_of, w, "batch"))
        plain, ours = (lengths if per == "batch_sum" else ranks.total(lengths)).unbind(0)
        w = (w * measured(norm, plain, ours)).contiguous()
    return reference.heads_combine(delta, weight, head_of, w, "batch"), torch.cat([w, G.flatten()])


def resolve_elements(
    columns: Sequence[Column], k: int, rule: ElementwiseRule, mask: Tensor | None, preserve_norm: bool, ranks: Ranks
) -> list[Tensor]:
    """An elementwise rule on the concatenation of all ranks' gradients; each rank gets the result for its own elements.

    One all-reduce tells how many elements the others hold, for GradDrop's draws belong to places, and which rows are anywhere, for TrimmedMean takes in those
    alone; a second one of two numbers the whole length where it is preserved.
    """
    if not isinstance(rule, (GradDrop, TrimmedMean)):
        raise TypeError(f"resolver is {rule!r}, an elementwise rule of your own, which group= can't serve; resolve without group")
    device = columns[0].like.device
    rule.check(k)
    sizes = torch.zeros(len(columns), ranks.size, dtype=torch.float64, device=device)
    for t, c in enumerate(columns):
        sizes[t, ranks.rank] = c.like.numel()
    here = torch.stack([_present(c, k, mask) for c in columns]).any(0)
    found = agree(torch.cat([sizes.flatten(), here.double()]), kept_by(rule, k, device), ranks)
    ends = found[: sizes.numel()].cumsum(0).view(sizes.shape)
    firsts, there = (ends[:, ranks.rank] - sizes[:, ranks.rank]).long(), found[sizes.numel() :] > 0
    if isinstance(rule, GradDrop):
        out = [
            rule.combine(c.grads, reference.mask_of_present(mask, c.missing, k), c.missing, first)
            for c, first in zip(columns, firsts, strict=True)
        ]
        advance(rule.stream(device))
    else:
        functions = functions_of(choose(device, "auto", k, "elementwise"))
        out = [_trimmed(c, k, rule, functions, mask, there) for c in columns]
    if preserve_norm:
        plain = [reference.plain_sum(c.grads, c.missing, mask) for c in columns]
        lengths = [torch.stack([x.double().square().sum() for x in tensors]).sum() for tensors in (plain, out)]
        wanted, have = ranks.total(torch.stack(lengths)).sqrt().unbind(0)
        factor = reference.norm_factor(wanted, have)
        out = [(x.double() * factor).to(x.dtype) for x in out]
    return [c.result(x) for c, x in zip(columns, out, strict=True)]


def _present(column: Column, k: int, mask: Tensor | None) -> Tensor:
    """Which gradients hold an element that is neither zero nor masked, bool [K]."""
    hidden = reference.mask_of_present(mask, column.missing, k)
    nonzero = torch.stack([(reference.table(g) != 0).any(1) for g in column.grads], -1)
    return reference.pad_missing((nonzero if hidden is None else nonzero & hidden).any(0), column.missing, k)


def _trimmed(column: Column, k: int, rule: TrimmedMean, functions: Any, mask: Tensor | None, there: Tensor) -> Tensor:
    """TrimmedMean, with a further element in each row that says whether the row is there on any rank."""
    like = reference.table(column.like)
    given = iter(column.grads)
    rows = [torch.zeros_like(like) if i in column.missing else reference.table(next(given)) for i in range(k)]
    told = there.to(like.dtype).view(k, 1, 1).expand(k, like.shape[0], 1)
    wide = [torch.cat([row, one], 1) for row, one in zip(rows, told, strict=True)]
    return rule.through(functions, wide, (), mask)[:, :-1].reshape(column.like.shape)


def _symmetric(G: Tensor) -> Tensor:
    """A Gramian whose two halves were summed over the ranks each in an order of its own."""
    return (G + G.mT) / 2


def _batch_sums(column: Column, k: int, mask: Tensor | None) -> Tensor:
    """Each gradient summed over the leading dimension, float64 [K, M]; zero where it is missing."""
    x = reference.stacked(column.grads, reference.mask_of_present(mask, column.missing, k)).double()
    return reference.pad_missing(x.sum(1), column.missing, k, 0)
