"""find_blocks: where in the graph of several loss terms gradients of different terms meet.

The detection of impartiality blocks of Javaloy, Meghdadi, Valera, "Mitigating modality collapse in multimodal VAEs via impartial optimization", ICML 2022.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any, TypeVar, overload

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from mmfast.blocks import notices
from mmfast.blocks.find_report import draw, table
from mmfast.ops.gram import gram

T = TypeVar("T")
Slot = tuple[Node, int]  # an output of a node: a tensor of the forward pass


@dataclass(frozen=True)
class FoundBlock:
    """A tensor at which gradients of different loss terms meet.

    Attributes:
        shape: of the tensor.
        producer: what made it: the operation, and the last module with parameters before it where a model was given; a parameter's name for a shared one.
        terms: names of the K terms whose gradients meet.
        cosines: [K, K] float64, between their gradients at the tensor; NaN for one that is zero.
        norms: [K] float64, lengths of the gradients.
        branches: names of the modules behind the tensor that `attach` would take, where they can be told apart; else empty.
    """

    shape: tuple[int, ...]
    producer: str
    terms: tuple[str, ...]
    cosines: Tensor
    norms: Tensor
    branches: tuple[str, ...] = ()

    def attach_line(self, model: str = "model") -> str | None:
        """The line of Python that puts a block there, or None where the branches cannot be told apart."""
        if not self.branches:
            return None
        modules = ", ".join(
            model
            + "".join(f".{part}" if part.isidentifier() else f"[{part}]" if part.isdigit() else f"[{part!r}]" for part in name.split("."))
            for name in self.branches
        )
        return f"mf.attach([{modules}], mf.UPGrad())"

    def __str__(self) -> str:
        return table([self])


class FoundBlocks(Sequence[FoundBlock]):
    """What `find_blocks` found, nearest to the losses first; printed as a table, `plot` draws it."""

    def __init__(self, blocks: Sequence[FoundBlock]) -> None:
        self._blocks = list(blocks)

    @overload
    def __getitem__(self, index: int) -> FoundBlock: ...
    @overload
    def __getitem__(self, index: slice) -> "FoundBlocks": ...
    def __getitem__(self, index: int | slice) -> "FoundBlock | FoundBlocks":
        return FoundBlocks(self._blocks[index]) if isinstance(index, slice) else self._blocks[index]

    def __len__(self) -> int:
        return len(self._blocks)

    def __iter__(self) -> Iterator[FoundBlock]:
        return iter(self._blocks)

    def __str__(self) -> str:
        return table(self._blocks)

    def plot(self, path: str | Path) -> None:
        """Draws the terms, the tensors where they meet and how their gradients point, into an image file; needs matplotlib."""
        draw(self._blocks, path)


@dataclass
class Graph:
    """The graph behind the terms: which terms reach a node, and through which nodes."""

    order: list[Node]  # from the losses on, consumers before what they consume
    terms: dict[Node, int]  # as bits
    arrivals: dict[Slot, list[tuple[Node | None, int]]] = field(
        default_factory=dict
    )  # of each tensor: who consumes it, and for which terms


def walk(roots: Sequence[Slot]) -> Graph:
    """Every node once, in time linear in the graph."""
    waiting: dict[Node, int] = {}
    seen = dict.fromkeys(node for node, _ in roots)  # in order: a set's differs from run to run, and sums over parameters with it
    stack = list(seen)
    while stack:
        for child, _ in stack.pop().next_functions:
            if child is not None:
                waiting[child] = waiting.get(child, 0) + 1
                if child not in seen:
                    seen[child] = None
                    stack.append(child)
    graph = Graph([], dict.fromkeys(seen, 0))
    slots_of: dict[Node, list[int]] = {}
    for bit, (node, slot) in enumerate(roots):
        graph.terms[node] |= 1 << bit
        if (node, slot) not in graph.arrivals:
            slots_of.setdefault(node, []).append(slot)
        graph.arrivals.setdefault((node, slot), []).append((None, 1 << bit))
    ready = deque(node for node in seen if not waiting.get(node))
    while ready:
        node = ready.popleft()
        graph.order.append(node)
        # of a node with several results, such as chunk or unbind, each may serve terms of its own
        slots = [[terms for _, terms in graph.arrivals[node, slot]] for slot in slots_of.get(node, ())]
        each = {reduce(or_, arrivals) for arrivals in slots}
        for i, (child, slot) in enumerate(node.next_functions):
            parts = set(slots[0]) if _is_heads(node) and i == 0 else each
            if child is None:
                continue
            graph.terms[child] |= graph.terms[node]
            if (child, slot) not in graph.arrivals:
                slots_of.setdefault(child, []).append(slot)
            graph.arrivals.setdefault((child, slot), []).extend((node, terms) for terms in parts)
            waiting[child] -= 1
            if not waiting[child]:
                ready.append(child)
    return graph


def by_name(losses: Mapping[str, T] | Sequence[T]) -> dict[str, T]:
    """The losses by their names; those of a list are "0", "1", ..."""
    if not isinstance(losses, Iterable) or (isinstance(losses, Tensor) and not losses.dim()):
        what = "one number" if isinstance(losses, Tensor) else f"a {type(losses).__name__}"
        raise TypeError(f"losses is {what}, expected a list or dict of the losses, not yet their sum")
    return dict(losses.items()) if isinstance(losses, Mapping) else {str(i): term for i, term in enumerate(losses)}


def graph_of(losses: Mapping[str, Tensor]) -> Graph:
    """The graph behind losses that are scalars with one; raises where they are not."""
    for name, term in losses.items():
        if not isinstance(term, Tensor):
            raise TypeError(f"losses[{name}] is a {type(term).__name__}, expected a tensor")
        if term.numel() != 1 or term.grad_fn is None:
            raise ValueError(
                f"losses[{name}] has shape {tuple(term.shape)} and {'a' if term.grad_fn else 'no'} graph, expected one number with a graph"
            )
    return walk([(term.grad_fn, term.output_nr) for term in losses.values()])  # type: ignore[misc]


def _is_heads(node: Node) -> bool:
    """Whether it is LinearHeads, whose one result holds the branches side by side: they meet at its first input, and each has weights of its own."""
    return node.name().startswith("_LinearHeads")


def meetings(graph: Graph) -> list[Slot]:
    """The tensors whose consumers serve different terms."""
    places = {node: i for i, node in enumerate(graph.order)}
    found = [slot for slot, arrivals in graph.arrivals.items() if len({terms for _, terms in arrivals}) > 1 and not _is_heads(slot[0])]
    return sorted(found, key=lambda slot: (places[slot[0]], slot[1]))


def _parameter(node: Node, names: Mapping[int, str]) -> str | None:
    """The name of the parameter whose gradient a node accumulates."""
    variable = getattr(node, "variable", None)
    return None if variable is None else names.get(id(variable))


def _producer(node: Node, names: Mapping[int, str]) -> str:
    own = _parameter(node, names)
    if own is not None:
        return f"parameter {own}"
    if hasattr(node, "variable"):
        return "a leaf tensor"
    operation, seen, queue = node.name().removesuffix("0").removesuffix("Backward"), {node}, deque([node])
    while queue and names:
        current = queue.popleft()
        children = [child for child, _ in current.next_functions if child is not None and child not in seen]
        if found := [name for child in children if (name := _parameter(child, names)) is not None]:
            return f"{found[0].rpartition('.')[0] or found[0]} ({operation})"
        seen.update(children)
        queue.extend(children)
    return operation


def _branches(graph: Graph, slot: Slot, names: Mapping[int, str], model: nn.Module | None) -> tuple[str, ...]:
    """The module behind each consumer of a tensor, by the parameters on the way to the terms; empty where they overlap or are unknown."""
    consumers: dict[Node, list[Node]] = {}
    for (child, _), arrivals in graph.arrivals.items():
        consumers.setdefault(child, []).extend(node for node, _ in arrivals if node is not None)
    by_terms: dict[int, set[str]] = {}
    for start, terms in graph.arrivals[slot]:
        used, seen, stack = by_terms.setdefault(terms, set()), {start}, [start]
        while stack:
            node = stack.pop()
            if node is None:
                continue
            used.update(
                name.rpartition(".")[0] for child, _ in node.next_functions if child is not None and (name := _parameter(child, names))
            )
            fresh = [n for n in consumers.get(node, ()) if n not in seen]
            seen.update(fresh)
            stack.extend(fresh)
    prefixes = [_called(_common(used), model) for used in by_terms.values()]
    apart = all(
        p and not any(q == p or f"{q}.".startswith(f"{p}.") for j, q in enumerate(prefixes) if j != i) for i, p in enumerate(prefixes)
    )
    # in the order of the losses, so that branch 0 of the line is the first loss's
    return tuple(prefix for _, prefix in sorted(zip(by_terms, prefixes, strict=True))) if apart and len(prefixes) > 1 else ()


def _common(names: set[str]) -> str:
    """The module that holds all of these."""
    parts = [name.split(".") for name in names if name]
    if not parts or len(parts) < len(names):
        return ""
    shared = []
    for column in zip(*parts, strict=False):
        if len(set(column)) > 1:
            break
        shared.append(column[0])
    return ".".join(shared)


def _called(name: str, model: nn.Module | None) -> str:
    """The module itself, or where it is a mere list or dict of modules, which nobody calls, the one that it belongs to."""
    while name and model is not None and has_no_forward(model.get_submodule(name)):
        name = name.rpartition(".")[0]
    return name


def has_no_forward(module: nn.Module) -> bool:
    """Whether it only holds others, as ModuleList and ModuleDict do."""
    return getattr(module.forward, "__func__", None) is nn.Module.forward


def find_blocks(losses: Mapping[str, Tensor] | Sequence[Tensor], model: nn.Module | None = None) -> FoundBlocks:
    """Finds the tensors of a forward pass at which gradients of different loss terms meet: where an impartiality block can stand.

    A tensor is found where those who consume it serve different terms: the latent that feeds several decoders, an earlier layer that a skip connection takes to
    one of them, weights that branches share. The terms are differentiated once each, down to these tensors; no gradient is left behind, but where a tensor on the
    way was told to retain_grad(), and the graph stays. Blocks on the way pass plain gradients on, and keep what they have recorded.
    Time is linear in the graph. Detection as described by Javaloy, Meghdadi, Valera, "Mitigating modality collapse in multimodal VAEs via impartial
    optimization", ICML 2022.

    Args:
        losses: the K loss terms, scalars with a graph, by name or in a list; not yet their sum.
        model: where the names of modules come from.

    Returns:
        A sequence of `FoundBlock`, nearest to the losses first; `print` shows a table with the line that would attach a block, `plot(path)` draws it.

    Raises:
        TypeError, ValueError: losses are not scalars with a graph. RuntimeError: reentrant activation checkpointing, which torch cannot differentiate so.

    Example:
        >>> model = nn.ModuleDict({"encoder": nn.Linear(4, 3), "image": nn.Linear(3, 2), "text": nn.Linear(3, 2)})
        >>> y = model["encoder"](torch.randn(8, 4))
        >>> found = mf.find_blocks({name: model[name](y).square().mean() for name in ("image", "text")}, model)
        >>> [(block.producer, block.shape, block.terms, block.branches) for block in found]
        [('encoder (Addmm)', (8, 3), ('image', 'text'), ('image', 'text'))]
    """
    named = by_name(losses)
    if not named:
        raise ValueError("losses is empty, expected the loss terms of at least two modalities")
    graph = graph_of(named)
    names = {} if model is None else {id(p): name for name, p in model.named_parameters()}
    slots = meetings(graph)
    rows = _gradients(named, graph, slots)
    found = []
    for slot, grads in zip(slots, rows, strict=True):
        if len(grads) < 2:  # the others never arrive: a detached path, or zeros that autograd knows of
            continue
        G = gram(list(grads.values()))
        norms = G.diagonal().clamp(min=0).sqrt()
        shape = tuple(next(iter(grads.values())).shape)
        found.append(
            FoundBlock(shape, _producer(slot[0], names), tuple(grads), G / norms.outer(norms), norms, _branches(graph, slot, names, model))
        )
    return FoundBlocks(found)


def _gradients(named: Mapping[str, Tensor], graph: Graph, slots: Sequence[Slot]) -> list[dict[str, Tensor]]:
    """For each tensor, the gradient of each term that reaches it."""
    rows: list[dict[str, Tensor]] = [{} for _ in slots]
    for bit, (name, term) in enumerate(named.items()):
        reached = [i for i, slot in enumerate(slots) if any(terms >> bit & 1 for _, terms in graph.arrivals[slot])]
        if not reached:
            continue
        edges: Any = [GradientEdge(*slots[i]) for i in reached]
        with notices.taking_apart():
            grads = torch.autograd.grad(term, edges, retain_graph=True, allow_unused=True)
        for i, g in zip(reached, grads, strict=True):
            if g is not None:
                rows[i][name] = g
    return rows
