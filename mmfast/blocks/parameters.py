"""backward: the gradients of several losses resolved at the parameters that they share."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmfast import contract
from mmfast.blocks import notices, rank_means, two_passes
from mmfast.blocks.find import by_name, graph_of
from mmfast.blocks.places import in_order
from mmfast.ops.across import Ranks
from mmfast.ops.lists import used_tensors
from mmfast.ops.resolve import resolve_info
from mmfast.resolvers.base import Resolver
from mmfast.resolvers.elementwise import ElementwiseRule
from mmfast.resolvers.names import ResolverLike, instance_of
from mmfast.stats import BlockStats


def backward(
    losses: Mapping[str, Tensor | None] | Sequence[Tensor | None],
    resolver: ResolverLike,
    params: Iterable[Tensor] | Iterable[Iterable[Tensor]] | None = None,
    *,
    retain_graph: bool = False,
    preserve_norm: bool = False,
    low_memory: bool = False,
    group: Any = None,
    heads: Iterable[Tensor] | None = None,
) -> BlockStats | None:
    """The backward pass of K losses at once: their gradients are resolved at the parameters that they share, all of them as one problem.

    In place of `sum(losses).backward()`: it writes, and adds to, the `.grad` of every leaf that the losses reach. What is not shared (heads) gets the plain
    sum. A loss that is None, or reaches none of the shared parameters, is a missing modality. Each loss is differentiated once; at most K + 1
    gradients of the shared parameters are in memory at a time. `.grad` is written last: an error leaves all of them as they were. Hooks that run when a gradient has been
    accumulated (DistributedDataParallel's) do not run; blocks on the way pass plain sums on. Losses that come one after the other: `collect`.

    Args:
        losses: K scalars with a graph, 1 to 4096, by name or in a list; scaled alike where a `GradScaler` is at work. By name they have the places of the rule's first
            call, in whatever order they come later.
        resolver: the rule, or its name or class; a rule that keeps state belongs to one place, and is kept between calls.
        params: the shared parameters; None takes those that two losses or more reach. Lists of parameters, such as one for each layer, are problems of
            their own, for a rule that keeps no state.
        retain_graph: keep the graph, for another backward pass.
        preserve_norm: give the shared gradient the length of the plain sum.
        low_memory: keep no more than about two gradients of the shared parameters at a time, or K of the largest tensor where that is more: the
            Gramian comes from some of the tensors at a time, for which the losses are differentiated again (at most 2 K + 1 times each), and the result
            from a backward pass of the weighted sum. The same to rounding; `preserve_norm` goes by the Gramian alone.
        group: a torch.distributed process group whose ranks hold the same parameters and parts of one batch: each loss's gradients are averaged over the
            ranks, heads' too, as if one process had the mean of the ranks' losses. It takes an all-reduce of the parameters' size for each loss, and
            waits for the device; no DistributedDataParallel beside it (docs/distributed.md). Needs `params` and `heads`, alike on every rank.
        heads: with `group`, the other parameters that the losses reach, on any rank.

    Returns:
        Norms, cosines and weights of the losses at the shared parameters, as of a block, with a leading dimension for lists of parameters; None for an
        elementwise rule, or where nothing is shared.

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
    k = len(named)
    if not 1 <= k <= contract.MAX_TILED:
        raise ValueError(f"losses holds {k} losses, expected 1 to {contract.MAX_TILED}")
    resolver = instance_of(resolver, k)
    resolver.check(k)
    if isinstance(losses, Mapping):
        named = {name: named[name] for name in in_order(tuple(named), resolver)}
    ranks = _ranks(group, params, low_memory)
    if ranks is None:
        notices.own_gradients(resolver)
    there = {name: loss for name, loss in named.items() if loss is not None}
    if not there and ranks is None:
        raise ValueError(f"losses holds {k} losses, all None, expected one at least")
    graph = graph_of(there)
    reached = {id(node.variable): (node.variable, terms) for node, terms in graph.terms.items() if hasattr(node, "variable")}
    problems = _shared(params, reached)
    if len(problems) > 1 and resolver.keeps_state(k):
        raise ValueError(f"resolver is {resolver!r}, which keeps state of one problem, but params holds {len(problems)} of them")
    shared = [p for problem in problems for p in problem]
    own = [(p, terms) for key, (p, terms) in reached.items() if key not in {id(p) for p in shared}]
    others = [] if ranks is None else _checked(() if heads is None else heads, "heads")
    if ranks is not None:
        rank_means.check_parameters(shared, others, [p for p, _ in own], tuple(named), ranks)
    if low_memory:
        written, infos = two_passes.backward(there, tuple(named), problems, [p for p, _ in own], resolver, preserve_norm, retain_graph)
    else:
        rows, written = _differentiate(there, shared, own, retain_graph)
        if ranks is not None:
            rows, written = rank_means.averaged(rows, tuple(named), written, shared, others, ranks)
            rank_means.agree_on_what_is_kept(resolver, k, shared, ranks)
        infos, begin = [], 0
        for problem in problems:
            table = [row and row[begin : begin + len(problem)] for row in map(rows.get, named)]
            found, info = resolved(problem, table, resolver, preserve_norm)
            written += found
            infos.append(info)
            begin += len(problem)
    _check_whole(written)
    for p, gradient in written:
        add(p, gradient)
    return stats_of(tuple(named), infos, resolver)


def _ranks(group: Any, params: object, low_memory: bool) -> Ranks | None:
    """The processes of a group, where there is one."""
    ranks = Ranks.of(group)
    if ranks is not None and params is None:
        raise ValueError(
            "with group=, params must name the shared parameters, in the same order on every rank: which are shared may look otherwise on each"
        )
    if ranks is not None and low_memory:
        raise ValueError(
            "low_memory keeps a Gramian only, and with group= each gradient must be averaged over the ranks; expected one of the two"
        )
    return ranks


def resolved(
    problem: Sequence[Tensor], table: Sequence[Sequence[Tensor | None] | None], resolver: Resolver, preserve_norm: bool
) -> tuple[list[tuple[Tensor, Tensor]], Tensor | None]:
    """(each parameter of a problem that a loss reaches with its gradient, info as of `resolve_info`) from K rows of gradients at the parameters."""
    used, grads = used_tensors(table)
    if not used:
        return [], None
    found, info = resolve_info(grads, resolver, preserve_norm=preserve_norm)
    return [(problem[t], gradient) for t, gradient in zip(used, found, strict=True)], info


def stats_of(names: tuple[str, ...], infos: Sequence[Tensor | None], resolver: Resolver) -> BlockStats | None:
    """What a block would say of one problem, or of several with a leading dimension."""
    there = [info for info in infos if info is not None]
    if not there or isinstance(resolver, ElementwiseRule):
        return None
    if len(infos) == 1:
        return BlockStats.of(names, there[0])
    return BlockStats.of(names, torch.stack([torch.zeros_like(there[0]) if info is None else info for info in infos]))


def _check_whole(written: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Raises where a parameter is what FSDP2 gathered for a while: its memory is gone by now, and nobody would look at its `.grad`."""
    gone = [p for p, _ in written if p.layout == torch.strided and p.numel() and not p.untyped_storage().nbytes()]
    if gone:
        raise RuntimeError(
            f"{len(gone)} of the parameters that the losses reach are sharded (fully_shard), and mmfast.backward writes .grad of whole ones; resolve at the "
            "tensor that the branches share: mmfast.ImpartialityBlock or mmfast.attach, with group="
        )


def _shared(params: Iterable[Tensor] | Iterable[Iterable[Tensor]] | None, reached: Mapping[int, tuple[Tensor, int]]) -> list[list[Tensor]]:
    """The shared parameters of each problem, in the order given, or those that two losses or more reach."""
    if params is None:
        return [[p for p, terms in reached.values() if terms & (terms - 1)]]
    if not isinstance(params, Iterable):
        raise TypeError(f"params is a {type(params).__name__}, expected a list of parameters, such as model.trunk.parameters()")
    given = [params] if isinstance(params, Tensor) else list(params)
    lists = any(isinstance(x, Iterable) and not isinstance(x, (Tensor, str)) for x in given)
    problems = [_checked(x, f"params[{i}]") for i, x in enumerate(given)] if lists else [_checked(given, "params")]
    if len({id(p) for problem in problems for p in problem}) < sum(map(len, problems)):
        raise ValueError("params holds a parameter twice, expected each once")
    return problems


def _checked(params: object, name: str) -> list[Tensor]:
    """The parameters of one problem."""
    if isinstance(params, Tensor) or not isinstance(params, Iterable):
        raise TypeError(f"{name} is a {type(params).__name__}, expected a list of parameters as the others are")
    problem = list(params)
    for i, p in enumerate(problem):
        if not isinstance(p, Tensor):
            raise TypeError(f"{name}[{i}] is a {type(p).__name__}, expected a tensor")
        if not (p.is_leaf and p.requires_grad):
            raise ValueError(f"{name}[{i}] is no leaf that asks for a gradient, expected a parameter")
    return problem


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
                sums[id(p)] = (p, g.clone() if id(p) not in sums else sums[id(p)][1] + g)  # g may be another parameter's too
    return rows, list(sums.values())


@torch.no_grad()
def add(p: Tensor, gradient: Tensor) -> None:
    """Adds to the parameter's `.grad`."""
    if p.grad is None:
        p.grad = gradient.to(p.dtype).detach()
    else:
        p.grad += gradient
