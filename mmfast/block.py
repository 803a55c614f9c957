"""The impartiality block: one tensor feeds K branches, and their gradients are resolved into one on the way back.

Algorithm 1 of Javaloy, Meghdadi, Valera, "Mitigating modality collapse in multimodal VAEs via impartial optimization", ICML 2022.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmfast import ops
from mmfast.ops import contract, transforms
from mmfast.resolvers import resolver as by_name
from mmfast.resolvers.base import Resolver, Rule
from mmfast.resolvers.elementwise import ElementwiseRule
from mmfast.scaling import LocalScale
from mmfast.stats import BlockStats

_NO_BACKWARD_YET = -1.0  # fills the record before the first backward pass; no squared norm is negative


class _Plan(NamedTuple):
    """Everything about a fork that is known before its tensor."""

    k: int
    resolver: Resolver
    per: str
    preserve_norm: bool
    block: "Impartial | None"  # which keeps the Gramian and the weights


def refuse_double_backward(what: str) -> None:
    """Called in a backward pass: raises where its result is asked to be differentiable."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise transforms.no_second_derivative(what)


class _Fork(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor, mask: Tensor | None, plan: _Plan) -> tuple[Tensor, ...]:  # type: ignore[override]
        return (y,) * plan.k  # autograd makes a view of each

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, mask, ctx.plan = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(mask)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None]:  # type: ignore[override]
        if all(g is None for g in grads):
            return None, None, None
        refuse_double_backward("a fork")
        (mask,) = ctx.saved_tensors
        return _resolved(ctx.plan, mask, *grads), None, None


class _TransformedFork(_Fork):
    """For torch.func, which always asks for a gradient that has one itself; with a forward mode, which torch.compile would refuse."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None]:  # type: ignore[override]
        if all(g is None for g in grads):
            return None, None, None
        (mask,) = ctx.saved_tensors
        return transforms.Opaque.apply(partial(_resolved, ctx.plan), "a fork", mask, *grads), None, None

    @staticmethod
    def jvp(ctx: Any, t: Tensor, *_: None) -> tuple[Tensor, ...]:  # type: ignore[override]
        return tuple(transforms.Opaque.apply(torch.Tensor.view_as, "a fork", t, t) for _ in range(ctx.plan.k))


def _resolved(plan: _Plan, mask: Tensor | None, *grads: Tensor | None) -> Tensor:
    _, resolver, per, preserve_norm, block = plan
    if block is None:
        return ops.resolve(grads, resolver, per, mask, preserve_norm=preserve_norm)
    out, info = ops.resolve_info(grads, resolver, per, mask, preserve_norm=preserve_norm)
    block._keep(info)
    return out


def _check_plan(k: int, resolver: Resolver | str, per: str) -> Resolver:
    if not isinstance(k, int) or isinstance(k, bool):
        raise TypeError(f"k is a {type(k).__name__}, expected an int")
    if not 1 <= k <= contract.MAX_GRADS:
        raise ValueError(f"k is {k}, expected 1 to {contract.MAX_GRADS} branches")
    contract.per_code(per)
    if isinstance(resolver, str):
        resolver = by_name(resolver)
    if not isinstance(resolver, Resolver):
        what = f"the class {resolver.__name__}" if isinstance(resolver, type) else f"a {type(resolver).__name__}"
        raise TypeError(f"resolver is {what}, expected an instance of mmfast.Resolver or the name of one")
    resolver.check(k)
    return resolver


def _check_tensors(y: Tensor, mask: Tensor | None, plan: _Plan) -> None:
    if not isinstance(y, Tensor):
        raise TypeError(f"y is a {type(y).__name__}, expected a tensor")
    if y.dtype not in contract.DTYPES:
        raise TypeError(f"y is {y.dtype}, expected one of {', '.join(map(str, contract.DTYPES))}")
    if y.dim() == 0:
        contract.check_per(plan.per, y.shape)
    if mask is not None:
        contract.check_mask(mask, plan.k, y.shape, y.device)


def _stateless(resolver: Resolver, k: int) -> list[Rule]:
    """The rules of a resolver that keep state and have none yet."""
    return [rule for rule in resolver.chain() or () if rule.state is None and rule.state_size(k)]


def check_traceable(resolver: Resolver, k: int) -> None:
    """Under torch.compile: raises where the backward pass could not be compiled."""
    if not torch.compiler.is_compiling():
        return
    if torch._dynamo.config.compiled_autograd:
        raise RuntimeError(
            "compiled autograd can't run a compiled backward pass that writes into a tensor, as that of a block does (its record, its rule's state); "
            "leave torch._dynamo.config.compiled_autograd off: the backward pass is compiled all the same"
        )
    if _stateless(resolver, k):
        raise RuntimeError("a compiled backward pass can't create a resolver's state: run one step without torch.compile first")


def _fork(y: Tensor, mask: Tensor | None, plan: _Plan) -> tuple[Tensor, ...]:
    _check_tensors(y, mask, plan)
    if transforms.exporting():
        return tuple(y.view_as(y) for _ in range(plan.k))
    transforms.refuse_compiled_vmap(y)
    if transforms.active():  # whether there is something to differentiate shows further below
        return _TransformedFork.apply(y, mask, plan)
    if y.requires_grad and torch.is_grad_enabled():
        check_traceable(plan.resolver, plan.k)
        return transforms.apply(_Fork, y, mask, plan)
    return tuple(y.view_as(y) for _ in range(plan.k))


def fork(
    y: Tensor, k: int, resolver: Resolver | str, *, per: str = "batch", mask: Tensor | None = None, preserve_norm: bool = True
) -> tuple[Tensor, ...]:
    """Splits a tensor into k aliases, one per branch, whose gradients are resolved into the tensor's gradient.

    Use each alias in exactly one branch. A branch that sends no gradient back is a missing modality and is left out of the problem.
    Based on Algorithm 1 of Javaloy, Meghdadi, Valera, "Mitigating modality collapse in multimodal VAEs via impartial optimization", ICML 2022.

    Args:
        y: floating-point tensor of any shape; the first dimension is the batch where `per` needs one.
        k: number of branches, 1 to 256.
        resolver: the rule, or its name. A rule that keeps state belongs to one fork: give every fork its own, and keep it between calls.
        per: "batch" resolves one problem, each gradient flattened; "sample" one for each index of the first dimension; "batch_sum" one,
            from the gradients summed over the first dimension.
        mask: bool [k], False where a branch is to be left out, or [B, k] to leave it out of some entries of the first dimension.
        preserve_norm: scales the result to the length of the plain sum of the gradients, as the paper does.

    Returns:
        k tensors that share y's memory; changing one in place is an error. The gradient is deterministic, up to the draws of a random rule.

    Raises:
        TypeError, ValueError: an argument is not as described; nothing was computed.
        RuntimeError: in the backward pass, where create_graph=True or a second derivative of torch.func asks to differentiate through it; under
            torch.compile, for a rule that keeps state and has none yet, and inside vmap; under vmap, for a rule that keeps state or draws.

    Example:
        >>> y = torch.tensor([1.0, 1.0], requires_grad=True)
        >>> a, b = mf.fork(y, 2, mf.Mean(), preserve_norm=False)
        >>> (3 * a + b).sum().backward()
        >>> y.grad
        tensor([2., 2.])
    """
    named = resolver if isinstance(resolver, str) else None
    resolver = _check_plan(k, resolver, per)
    if named and _stateless(resolver, k):
        raise ValueError(
            f"resolver is {named!r}, which keeps state from call to call; expected an instance made once, such as "
            f"mf.resolver({named!r}), or an ImpartialityBlock"
        )
    plan = _Plan(k, resolver, per, preserve_norm, None)
    return _fork(y, mask, plan)


class _Scale(torch.autograd.Function):
    """The identity, whose gradient is multiplied by beta."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, beta: float) -> Tensor:  # type: ignore[override]
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.beta = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad * ctx.beta, None


class _TransformedScale(_Scale):
    @staticmethod
    def jvp(ctx: Any, t: Tensor, _: None) -> Tensor:  # type: ignore[override]
        return t.view_as(t)


def _scale_outputs(output: Any, beta: float, name: str) -> Any:
    """The output of a branch, tensors in tuples, lists and dicts included, with gradients multiplied by beta."""
    if isinstance(output, Tensor):
        transforms.refuse_compiled_vmap(output)
        if transforms.active():
            return _TransformedScale.apply(output, beta)
        return transforms.apply(_Scale, output, beta) if output.requires_grad else output
    if isinstance(output, dict):
        scaled = output.copy()
        for key, value in output.items():
            scaled[key] = _scale_outputs(value, beta, name)
        return scaled
    if isinstance(output, (tuple, list)):
        values = [_scale_outputs(value, beta, name) for value in output]
        return type(output)(*values) if hasattr(output, "_fields") else type(output)(values)
    if output is None or isinstance(output, (bool, int, float, str)):
        return output
    raise TypeError(
        f"branch {name} returned a {type(output).__name__}, which the local step can't scale; return tensors, or tuples, lists and dicts of them"
    )


def _check_local(local: Any, k: int) -> tuple[float, ...]:
    values = local.beta if isinstance(local, LocalScale) else local
    try:
        beta = tuple(float(b) for b in values)
    except (TypeError, ValueError):
        raise TypeError(
            f"local is a {type(local).__name__}, expected {k} numbers, or a StandardScale, DimRatio or LipschitzScale"
        ) from None
    if len(beta) != k:
        raise ValueError(f"local has {len(beta)} numbers, expected {k}, one per branch")
    for i, b in enumerate(beta):
        if not (math.isfinite(b) and b > 0):
            raise ValueError(f"local[{i}] is {b}, expected a positive finite number")
    return beta


class Impartial(nn.Module):
    """What a module that resolves the gradients of k branches keeps: the rule, the local step, and what the last backward pass saw."""

    beta: Tensor | None
    _info: Tensor | None  # K weights and the Gramian, [K + K*K] or [B, K + K*K]; None from a resolver without a Gramian

    def __init__(
        self, k: int, resolver: Resolver | str, local: LocalScale | Sequence[float] | Tensor | None, per: str, preserve_norm: bool
    ) -> None:
        super().__init__()
        self.resolver = _check_plan(k, resolver, per)
        self.per = per
        self.preserve_norm = preserve_norm
        self._beta = None if local is None else _check_local(local, k)
        self.register_buffer("beta", None if self._beta is None else torch.tensor(self._beta, dtype=torch.float64))
        # no buffer: DistributedDataParallel would send it around at every step
        self._info = torch.full((k + k * k,), _NO_BACKWARD_YET, dtype=torch.float64)
        for rule in _stateless(self.resolver, k) if per != "sample" else ():
            rule.state = torch.zeros(rule.state_size(k), dtype=torch.float64)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the branches."""
        raise NotImplementedError

    def stats(self) -> BlockStats:
        """What the last backward pass through this block saw; the one method that waits for the device.

        Where the block was called more than once in a forward pass, it is the call whose gradient was computed last. Under
        torch.compile with per="sample", they are kept for the batch size of the last backward pass that was not compiled.

        Returns:
            A `BlockStats` of float64 tensors on the CPU, with a leading B for per="sample".

        Raises:
            RuntimeError: no backward pass yet, or the resolver works elementwise and has neither weights nor Gramian.
        """
        info = self._info
        if info is None or isinstance(self.resolver, ElementwiseRule):
            raise RuntimeError(
                f"{type(self.resolver).__name__} works on each element by itself and has neither weights nor Gramian; "
                "call mmfast.gram on the gradients to see how they conflict"
            )
        if (info == _NO_BACKWARD_YET).all():
            raise RuntimeError("no backward pass has reached this block yet; call loss.backward() before stats()")
        return BlockStats.of(self.names, info)

    def _keep(self, info: Tensor | None) -> None:
        if not torch.compiler.is_compiling():
            self.__dict__["_info"] = info if info is None else contract.plain(info)
        elif torch._C._are_functorch_transforms_active():
            pass  # which may not write into a tensor that is not their own
        elif info is not None and self._info is not None and self._info.shape == info.shape:
            self._info.copy_(info)  # a graph can write into a tensor of ours, not bind a name

    def _apply(self, fn: Any, recurse: bool = True) -> "Impartial":
        super()._apply(fn, recurse)
        if self.beta is not None:  # stays float64 in a model that changes its dtype
            self.beta = torch.tensor(self._beta, dtype=torch.float64, device=self.beta.device)
        if self._info is not None:
            device = fn(self._info).device
            self._info = torch.full_like(self._info, _NO_BACKWARD_YET, device=device) if self._info.is_meta else self._info.to(device)
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if self.beta is not None and prefix + "beta" in state_dict:
            self._beta = tuple(self.beta.tolist())

    def extra_repr(self) -> str:
        local = "" if self._beta is None else f", local=[{', '.join(f'{b:.4g}' for b in self._beta)}]"
        return f"per={self.per!r}, preserve_norm={self.preserve_norm}{local}"


class ImpartialityBlock(Impartial):
    """Runs K branches on one tensor and resolves their gradients there, so that no branch is trained at the others' expense.

    Javaloy, Meghdadi, Valera, "Mitigating modality collapse in multimodal VAEs via impartial optimization", ICML 2022, Algorithm 1.

    Args:
        branches: K modules, in a list, an `nn.ModuleList`, or an `nn.ModuleDict`.
        resolver: the rule of the global step, or its name; each block needs its own.
        local: the local step beta: K positive numbers, or a `StandardScale`, `DimRatio` or `LipschitzScale`. Branch i receives the gradient
            of its output times beta_i, so its parameters' gradients carry beta_i too; the resolver acts on the shared tensor alone.
        per: "batch", "sample" or "batch_sum", see `fork`.
        preserve_norm: scales the resolved gradient to the length of the plain sum of the gradients, as the paper does.

    Raises:
        TypeError, ValueError: an argument is not as described.

    Example:
        >>> block = mf.ImpartialityBlock([nn.Linear(4, 1), nn.Linear(4, 2)], mf.Mean(), local=[1.0, 0.5])
        >>> one, two = block(torch.randn(8, 4, requires_grad=True))
        >>> (one.sum() + two.sum()).backward()
        >>> block.stats().weights.shape
        torch.Size([2])
    """

    def __init__(
        self,
        branches: Sequence[nn.Module] | nn.ModuleList | nn.ModuleDict,
        resolver: Resolver | str,
        *,
        local: LocalScale | Sequence[float] | Tensor | None = None,
        per: str = "batch",
        preserve_norm: bool = True,
    ) -> None:
        if not isinstance(branches, (nn.ModuleList, nn.ModuleDict)):
            if isinstance(branches, nn.Module) or not isinstance(branches, Sequence):
                raise TypeError(f"branches is a {type(branches).__name__}, expected a list of modules, a ModuleList or a ModuleDict")
            for i, branch in enumerate(branches):
                if not isinstance(branch, nn.Module):
                    raise TypeError(f"branches[{i}] is a {type(branch).__name__}, expected an nn.Module")
            branches = nn.ModuleList(branches)
        k = len(branches)
        if not 1 <= k <= contract.MAX_GRADS:
            raise ValueError(f"branches has {k} modules, expected 1 to {contract.MAX_GRADS}")
        super().__init__(k, resolver, local, per, preserve_norm)
        self.branches = branches

    @property
    def names(self) -> tuple[str, ...]:
        """Of the branches: the keys of a ModuleDict, or "0", "1", ..."""
        return tuple(self.branches._modules)

    def forward(self, y: Tensor, mask: Tensor | None = None, **kwargs: Any) -> tuple[Any, ...] | dict[str, Any]:
        """Every branch's output for the shared tensor.

        Args:
            y: floating-point tensor; what each branch takes as its first argument.
            mask: bool [K] or [B, K], False where a branch's gradient is to be left out, see `fork`.
            kwargs: handed to every branch.

        Returns:
            The branches' outputs in a tuple, or in a dict for a ModuleDict.
        """
        branches = self.branches._modules
        aliases = _fork(y, mask, _Plan(len(branches), self.resolver, self.per, self.preserve_norm, self))
        outputs = {name: branch(alias, **kwargs) for alias, (name, branch) in zip(aliases, branches.items(), strict=True)}  # type: ignore[misc]
        if self._beta is not None and not transforms.exporting():
            outputs = {name: _scale_outputs(out, beta, name) for beta, (name, out) in zip(self._beta, outputs.items(), strict=True)}
        return outputs if isinstance(self.branches, nn.ModuleDict) else tuple(outputs.values())
