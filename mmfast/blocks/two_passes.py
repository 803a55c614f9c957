"""backward in little memory: the Gramian from the gradients of a few parameters at a time, then a backward pass of the weighted sum."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from mmfast.blocks import notices
from mmfast.ops.gram import gram
from mmfast.ops.lists import used_tensors
from mmfast.ops.weights import solve_checked
from mmfast.resolvers.base import Resolver
from mmfast.resolvers.elementwise import ElementwiseRule
from mmfast.resolvers.solve import precision_of


def backward(
    losses: Mapping[str, Tensor],
    names: Sequence[str],
    problems: Sequence[Sequence[Tensor]],
    own: Sequence[Tensor],
    resolver: Resolver,
    preserve_norm: bool,
    retain_graph: bool,
) -> tuple[list[tuple[Tensor, Tensor]], list[Tensor | None]]:
    """(each parameter with its gradient, info of each problem as of `resolve_info`); names are those of all losses, the missing ones too."""
    if isinstance(resolver, ElementwiseRule):
        raise TypeError(
            f"low_memory keeps a Gramian only, and {resolver!r} looks at the elements of the gradients; expected a Resolver of Gramians"
        )
    infos = [_info(losses, names, problem, resolver, preserve_norm) for problem in problems]
    passes: list[tuple[Sequence[Tensor], list[Tensor]]] = []  # parameters, and the weights of the losses at them
    for problem, info in zip(problems, infos, strict=True):
        if info is not None:
            passes.append((problem, [info[i] for i, name in enumerate(names) if name in losses]))
    if own:
        passes.append((own, [torch.ones_like(loss) for loss in losses.values()]))
    written = []
    for i, (params, weights) in enumerate(passes):
        keep = retain_graph or i < len(passes) - 1
        grads = _gradients(list(losses.values()), weights, params, keep)
        written += [(p, g.clone()) for p, g in zip(params, grads, strict=True) if g is not None]  # g may be another parameter's too
    return written, infos


def _info(
    losses: Mapping[str, Tensor], names: Sequence[str], problem: Sequence[Tensor], resolver: Resolver, preserve_norm: bool
) -> Tensor | None:
    """Weights, then Gramian [K + K * K] of the losses at the parameters; None where none reaches them."""
    G: Tensor | None = None
    precision = 0.0
    for part in _parts(problem, len(names)):
        rows = {name: _gradients([loss], [torch.ones_like(loss)], part, True) for name, loss in losses.items()}
        used, grads = used_tensors([rows.get(name) for name in names])
        if not used:
            continue
        G_part = gram(grads)
        G = G_part if G is None else G + G_part
        precision = max(precision, *(precision_of(part[t].dtype) for t in used))
    return None if G is None else torch.cat([solve_checked(G, resolver, None, preserve_norm, precision), G.flatten()])


def _parts(params: Sequence[Tensor], k: int) -> Iterator[list[Tensor]]:
    """The parameters in parts, neighbours together: K gradients of a part take no more than one of all, where no single tensor is larger than that."""
    most = sum(p.numel() for p in params) / k
    part: list[Tensor] = []
    size = 0
    for p in params:
        if part and size + p.numel() > most:
            yield part
            part, size = [], 0
        part.append(p)
        size += p.numel()
    if part:
        yield part


def _gradients(losses: Sequence[Tensor], weights: Sequence[Tensor], params: Sequence[Tensor], keep: bool) -> tuple[Tensor | None, ...]:
    """The gradients of the weighted sum of the losses."""
    factors = [torch.ones_like(loss) * w.to(loss) for loss, w in zip(losses, weights, strict=True)]
    with notices.taking_apart():
        return torch.autograd.grad(losses, params, factors, retain_graph=keep, allow_unused=True)
