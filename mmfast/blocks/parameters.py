"""backward: the gradients of several losses resolved at the parameters that they share."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from mmfast.blocks import notices
from mmfast.blocks.find import by_name, graph_of
from mmfast.blocks.fork import check_plan
from mmfast.ops.resolve import resolve_info
from mmfast.resolvers.elementwise import ElementwiseRule
from mmfast.resolvers.names import ResolverLike, instance_of
from mmfast.stats import BlockStats


def backward(
    losses: Mapping[str, Tensor | None] | Sequence[Tensor | None],
    resolver: ResolverLike,
    params: Iterable[Tensor] | None = None,
    *,
    retain_graph: bool = False,
    preserve_norm: bool = False,
) -> BlockStats | None:
    """The backward pass of K losses at once: their gradients are resolved at the parameters that they share, all of them as one problem.

    In place of `sum(losses).backward()`: it writes, and adds to, the `.grad` of every leaf that the losses reach. What is not shared (heads) gets the plain
    sum. A loss that is None, or reaches none of the shared parameters, is a missing modality. Each loss is differentiated once; at most K + 1
    gradients of the shared parameters are in memory at a time. `.grad` is written last: an error leaves all of them as they were. Hooks that run when a gradient has been
    accumulated (DistributedDataParallel's) do not run; blocks on the way pass plain sums on.

    Args:
        losses: K scalars with a graph, by name or in a list; scaled alike where a `GradScaler` is at work.
        resolver: the rule, or its name or class; a rule that keeps state belongs to one place, and is kept between calls.
        params: the shared parameters; None takes those that two losses or more reach.
        retain_graph: keep the graph, for another backward pass.
        preserve_norm: give the shared gradient the length of the plain sum.

    Returns:
        Norms, cosines and weights of the losses at the shared parameters, as of a block; None for an elementwise rule, or where nothing is shared.

    Raises:
        TypeError, ValueError: an argument is not as described; nothing was written.

    Example:
        >>> trunk, heads = nn.Linear(4, 3), [nn.Linear(3, 1), nn.Linear(3, 2)]
        >>> y = trunk(torch.randn(8, 4))
        >>> stats = mf.backward([head(y).square().mean() for head in heads], mf.UPGrad())
        >>> stats.weights.shape, trunk.weight.grad.shape
        (torch.Size([2]), torch.Size([3, 4]))
    """
    named = by_name(losses)
    resolver = check_plan(len(named), instance_of(resolver, len(named)), "batch", at_parameters=True)
    there = {name: loss for name, loss in named.items() if loss is not None}
    if not there:
        raise ValueError(f"losses holds {len(named)} losses, all None, expected one at least")
    graph = graph_of(there)
    reached = {id(node.variable): (node.variable, terms) for node, terms in graph.terms.items() if hasattr(node, "variable")}
    shared = _shared(params, reached)
    own = [(p, terms) for key, (p, terms) in reached.items() if key not in {id(p) for p in shared}]
    rows, sums = _differentiate(there, shared, own, retain_graph)
    table = [rows.get(name) for name in named]
    stats: BlockStats | None = None
    resolved: list[Tensor] = []
    used = [t for t in range(len(shared)) if any(row is not None and row[t] is not None for row in table)]
    if used:
        grads = [None if row is None or all(row[t] is None for t in used) else [row[t] for t in used] for row in table]
        resolved, info = resolve_info(grads, resolver, preserve_norm=preserve_norm)
        stats = None if info is None or isinstance(resolver, ElementwiseRule) else BlockStats.of(tuple(named), info)
    for t, gradient in zip(used, resolved, strict=True):
        _add(shared[t], gradient)
    for p, gradient in sums:
        _add(p, gradient)
    return stats


def _shared(params: Iterable[Tensor] | None, reached: Mapping[int, tuple[Tensor, int]]) -> list[Tensor]:
    """The shared parameters, in the order given, or those that two losses or more reach."""
    if params is None:
        return [p for p, terms in reached.values() if terms & (terms - 1)]
    given = [params] if isinstance(params, Tensor) else list(params)
    for i, p in enumerate(given):
        if not isinstance(p, Tensor):
            raise TypeError(f"params[{i}] is a {type(p).__name__}, expected a tensor")
        if not (p.is_leaf and p.requires_grad):
            raise ValueError(f"params[{i}] is no leaf that asks for a gradient, expected a parameter")
    if len({id(p) for p in given}) < len(given):
        raise ValueError("params holds a parameter twice, expected each once")
    return given


def _differentiate(
    losses: Mapping[str, Tensor], shared: Sequence[Tensor], own: Sequence[tuple[Tensor, int]], retain_graph: bool
) -> tuple[dict[str, list[Tensor | None]], list[tuple[Tensor, Tensor]]]:
    """Each loss's gradients at the shared parameters, and the sums at the others."""
    rows: dict[str, list[Tensor | None]] = {}
    sums: dict[int, tuple[Tensor, Tensor]] = {}
    for bit, (name, loss) in enumerate(losses.items()):
        mine = [p for p, terms in own if terms >> bit & 1]
        inputs = [*shared, *mine]
        if not inputs:
            continue
        keep = retain_graph or bit < len(losses) - 1
        with notices.taking_apart():
            grads = torch.autograd.grad(loss, inputs, torch.ones_like(loss), retain_graph=keep, allow_unused=True)
        rows[name] = list(grads[: len(shared)])
        for p, g in zip(mine, grads[len(shared) :], strict=True):
            if g is not None:
                sums[id(p)] = (p, g if id(p) not in sums else sums[id(p)][1] + g)
    return rows, list(sums.values())


@torch.no_grad()
def _add(p: Tensor, gradient: Tensor) -> None:
    if p.grad is None:
        p.grad = gradient.to(p.dtype).detach()
    else:
        p.grad += gradient
