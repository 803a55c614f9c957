"""The average gradient outer product of a layer, streamed over batches."""

import math
from collections.abc import Iterator
from operator import index
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from mmfast import contract
from mmfast.blocks import notices, transforms
from mmfast.collapse.layers import checked, matrix_of, multiplies, rows_of
from mmfast.collapse.products import Products


class Agop:
    """Average gradient outer product of a layer: the mean over samples of J'J, J the derivative of a sample's outputs by the layer's input.

    What a layer's weights are said to become, up to a factor: W'W (Radhakrishnan et al., "Mechanism for feature learning in neural networks", Science
    2024); Theorem 2 of Chaudhuri et al., "A closer look at multimodal representation collapse", ICML 2025, bounds how far the weights that modalities
    share are from it. Call `add(outputs)` after each forward pass, before `loss.backward()`, then look at `matrix`.

    J is taken through the layer alone: what goes round it, as in a residual connection, does not count. Where a layer is applied at several
    positions, as to each token, or several times in a pass, J'J is the sum over them. For a linear layer or a convolution (its columns are those of
    its patches) everything comes from the gradient at its output, for any other module from that at its first argument, whose last dimension is then
    the features. The model's results, gradients, random numbers and
    checkpoints stay as they are, and blocks of mmfast pass plain gradients on; only a tensor on the way that was told to retain_grad(), and hooks of
    your own, see the passes of `add`. Memory is that of one batch's gradients, and of 2,048 of its rows. Products of float32 gradients are in
    float32, as torch is set (TF32), their totals in float64: against per-sample Jacobians in float64 within 1e-6 of M's norm and 1e-5 sqrt(M_ii M_jj)
    an element, at 1,024 columns behind a ReLU. A model in float64 is exact to float64.

    Args:
        layer: a module of the model; a compiled model is to be compiled after this.
        probes: None differentiates each output, one backward pass each, which is exact; a number takes that many passes whatever the number of
            outputs, each with an independent random sign per sample and output, drawn by a generator of its own that starts alike each time:
            unbiased, and exact for one output.

    Attributes:
        layer, probes: as given.
        samples: how many were added.

    Raises:
        TypeError, ValueError: an argument is not as described.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
        >>> with mf.collapse.Agop(model[0]) as agop:
        ...     for batch in torch.randn(10, 16, 4):
        ...         agop.add(model(batch))
        >>> agop.samples, agop.matrix.shape, agop.distance() < 2**0.5
        (160, torch.Size([4, 4]), tensor(True))
    """

    def __init__(self, layer: nn.Module, probes: int | None = None) -> None:
        self.layer, self.probes = checked(layer, "layer"), None if probes is None else index(probes)
        if self.probes is not None and self.probes < 1:
            raise ValueError(f"probes is {probes}, expected None or a positive number")
        self._multiplies = multiplies(layer)
        self._mark = object()  # in the graph; no reference back here, which Python's collector could not follow through torch's nodes
        self._told = False
        mark = self._mark
        leave, enter = (torch.compiler.disable(hook) for hook in (_leave, _enter))  # here, for it imports torch._dynamo
        if self._multiplies:
            self._hook = layer.register_forward_hook(lambda module, args, output: leave(layer, module, output, mark), prepend=True)
        else:
            self._hook = layer.register_forward_pre_hook(
                lambda module, args, kwargs: enter(layer, module, args, kwargs, mark), prepend=True, with_kwargs=True
            )
        self.reset()

    def reset(self) -> None:
        """Forgets all samples; the generator of signs starts again."""
        self.samples, self._kind = 0, "cpu"
        self._inputs = Products()  # of gradients at the layer's input
        self._outputs = Products()  # at its output, as long as the weight is this one
        self._weight: Tensor | None = None
        self._compared: Tensor | None = None  # what is known to be equal to it
        self._generator: torch.Generator | None = None

    def remove(self) -> None:
        """Takes the hook out of the model; what was added stays."""
        self._hook.remove()

    def __enter__(self) -> "Agop":  # noqa: PYI034 typing has Self from Python 3.11 on
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def add(self, outputs: Tensor) -> None:
        """Adds a batch, by backward passes from its outputs to the layer, which keep the graph.

        Args:
            outputs: [B, C], one row a sample, made by the forward pass just gone, in training or eval mode; [B] has one output a sample, and further
                dimensions are outputs too. Not changed. A batch norm in training mode on the way mixes the samples, which a warning says.

        Raises:
            TypeError, ValueError: outputs is not as described, or does not depend on a call of the layer while the hook was there. RuntimeError: its
            graph is gone, as after `loss.backward()`, or the weight was changed in place since, as by an optimizer's step.
        """
        calls = self._calls(outputs)
        self._kind = outputs.device.type
        with torch.no_grad(), torch.autocast(self._kind, enabled=False), notices.taking_apart():
            for signs in self._directions(outputs):
                grads = torch.autograd.grad(outputs, [edge for edge, _ in calls], signs, retain_graph=True, allow_unused=True)
                for g, (_, W) in zip(grads, calls, strict=True):
                    if g is not None:
                        self._take(g, W)
        self.samples += len(outputs)

    @property
    def matrix(self) -> Tensor:
        """M, float64 [in, in] on the device of the outputs: symmetric, no gradient, a new tensor. Raises a RuntimeError where nothing was added."""
        if not self.samples:
            raise RuntimeError("no sample was added yet; call add(outputs) after a forward pass")
        with torch.no_grad(), torch.autocast(self._kind, enabled=False):
            self._settle()
            return self._inputs.matrix() / (self.samples * (self.probes or 1))

    def distance(self) -> Tensor:
        """How far M is from W'W, both at Frobenius norm 1: float64 [] in [0, 2^.5], and 1 - distance^2 / 2 is their cosine; NaN where one of them is zero. W is the layer's weight as it is now."""
        weight = getattr(self.layer, "weight", None)
        M = self.matrix
        if not isinstance(weight, Tensor) or weight.dim() < 2 or matrix_of(weight).shape[1] != len(M):
            raise TypeError(f"layer is a {type(self.layer).__name__}, which has no weight [out, {len(M)}] to compare with")
        W = matrix_of(weight).double()
        WW = W.mT @ W
        return (M / M.norm() - WW / WW.norm()).norm()

    def __repr__(self) -> str:
        return f"Agop({type(self.layer).__name__}, probes={self.probes}, samples={self.samples})"

    def _directions(self, outputs: Tensor) -> Iterator[Tensor]:
        """What to differentiate: each output by itself, or random signs of all."""
        signs = torch.zeros(outputs.shape, dtype=outputs.dtype, device=outputs.device)
        columns = signs.view(len(outputs), math.prod(outputs.shape[1:]))
        if self.probes is None:
            for c in range(columns.shape[1]):
                columns[:, c] = 1
                yield signs
                columns[:, c] = 0
            return
        if self._generator is None:
            self._generator = torch.Generator(outputs.device).manual_seed(0)
        for _ in range(self.probes):
            yield signs.random_(2, generator=self._generator).mul_(2).sub_(1)

    def _calls(self, outputs: Tensor) -> list[tuple[GradientEdge, Tensor | None]]:
        """Where in the graph behind the outputs the layer was called, and its weight then, as [out, in]."""
        if not isinstance(outputs, Tensor) or not outputs.is_floating_point():
            what = outputs.dtype if isinstance(outputs, Tensor) else f"a {type(outputs).__name__}"
            raise TypeError(f"outputs is {what}, expected a floating-point tensor [B, C]")
        if not outputs.dim():
            raise ValueError("outputs is one number, expected [B, C]: a row for each sample, not their sum")
        if outputs.grad_fn is None:
            raise ValueError("outputs has no graph; call the model with gradients enabled")
        consumers: dict[Node, list[Node]] = {outputs.grad_fn: []}
        stack = [outputs.grad_fn]
        while stack:
            node = stack.pop()
            for child, _ in node.next_functions:
                if child is None:
                    continue
                if child not in consumers:
                    consumers[child] = []
                    stack.append(child)
                consumers[child].append(node)
        found = [(node, slot, *seen) for node in consumers for slot, seen in sorted(_marks(node).get(self._mark, {}).items())]
        if not found:
            raise ValueError(
                f"outputs does not come from a call of {type(self.layer).__name__} that could be seen: it was called elsewhere, before Agop, inside a model compiled before, or neither "
                "its input nor its weight wants a gradient (call requires_grad_() on one of them)"
            )
        if not self._told and _mixes(consumers, [node for node, *_ in found]):
            self._told = True
            contract.tell(
                "a batch norm in training mode between the layer and the outputs: a sample's outputs depend on the other samples, so what is averaged here are not its own derivatives; "
                "call model.eval() for Agop"
            )
        if any(W is not None and W._version != version for *_, W, version in found):
            raise RuntimeError(
                "the layer's weight was changed in place after the forward pass; call add(outputs) before the optimizer's step"
            )
        matrices = {W.data_ptr(): matrix_of(W) for *_, W, _ in found if W is not None}  # the same object for the same weight
        return [(GradientEdge(node, slot), None if W is None else matrices[W.data_ptr()]) for node, slot, W, _ in found]

    def _take(self, g: Tensor, W: Tensor | None) -> None:
        """Takes the gradient of one call in: that at its input, or with the weight that it had, that at its output."""
        if W is None:
            self._inputs.add(g.reshape(-1, g.shape[-1]))
        elif len(W) > 2 * W.shape[1]:  # narrower at the input, which pays for the product
            self._inputs.add(_times(rows_of(g, self.layer), W))
        else:  # J = g W, so the sum of J'J is W' (sum of g'g) W, for as long as the weight stays the same
            if W is not self._compared:
                if self._weight is None or not torch.equal(self._weight, W):
                    self._settle()
                    self._weight = W.clone()
                self._compared = W
            self._outputs.add(rows_of(g, self.layer))

    def _settle(self) -> None:
        """Takes the gradients at outputs into those at inputs."""
        if self._weight is None:
            return
        if self._outputs.total is None:  # few rows
            self._inputs.add(_times(self._outputs.waiting(), self._weight))
        else:
            self._inputs.add_product(self._weight.double(), self._outputs.matrix())
        self._outputs, self._weight = Products(), None


def _times(rows: Tensor, W: Tensor) -> Tensor:
    """In float32 at least."""
    dtype = torch.promote_types(torch.promote_types(rows.dtype, W.dtype), torch.float32)
    return rows.to(dtype) @ W.to(dtype)


def _leave(layer: nn.Module, module: nn.Module, output: Any, mark: object) -> None:
    """Marks the call at the layer's output; a deep copy of the model has the hook too, and is not the layer."""
    if module is layer and isinstance(output, Tensor):
        _marked(output, mark, module.weight.detach())  # type: ignore[operator]


def _enter(layer: nn.Module, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], mark: object) -> tuple[Any, Any] | None:
    """Gives the layer an alias of its input, and marks that."""
    if module is not layer or not torch.is_grad_enabled():
        return None
    key = next(iter(kwargs), "")
    x = args[0] if args else kwargs.get(key)
    if not isinstance(x, Tensor):
        raise TypeError(f"the layer of Agop is called with a {type(x).__name__} first, expected a tensor; choose a layer that takes one")
    if not x.requires_grad or transforms.active():
        return None
    alias = x.view_as(x)
    _marked(alias, mark)
    return ((alias, *args[1:]), kwargs) if args else (args, {**kwargs, key: alias})


def _marked(y: Tensor, mark: object, weight: Tensor | None = None) -> None:
    if not y.requires_grad or y.is_leaf or transforms.active():
        return
    edge = get_gradient_edge(y)
    _marks(edge.node).setdefault(mark, {})[edge.output_nr] = weight, 0 if weight is None else weight._version


def _marks(node: Node) -> dict[Any, Any]:
    """What a node of the graph keeps for Python, as long as it lives."""
    return node.metadata  # type: ignore[return-value]  # a property that torch declares as a method


def _mixes(consumers: dict[Node, list[Node]], calls: list[Node]) -> bool:
    """Whether a batch norm with the statistics of several samples lies between calls and outputs."""
    seen, stack = set(calls), list(calls)
    while stack:
        for node in consumers[stack.pop()]:
            if node not in seen:
                seen.add(node)
                stack.append(node)
                # instance norm is one of a single sample
                if "BatchNorm" in node.name() and getattr(node, "_saved_training", True) and node._input_metadata[0].shape[0] > 1:
                    return True
    return False
