"""K linear branches and their impartiality block as one operator, which never forms the K gradients it resolves.

With eta_i = y W_i' + b_i and delta_i = dL/d eta_i, the gradient of branch i at y is delta_i W_i, so that <g_i, g_j> = <delta_i' delta_j, W_i W_j'>
and the resolved gradient is [w_1 delta_1 ... w_K delta_K] W: two small Gramians of matrix products instead of K tensors of y's size.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmfast import contract
from mmfast.backends import reference
from mmfast.blocks import notices, transforms
from mmfast.blocks.fork import check_traceable, refuse_double_backward
from mmfast.blocks.impartial import Impartial
from mmfast.blocks.scaling import LocalScale
from mmfast.ops import across
from mmfast.ops.heads import heads
from mmfast.resolvers.elementwise import ElementwiseRule
from mmfast.resolvers.names import ResolverLike


class _LinearHeads(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, module: "LinearHeads") -> Tensor:  # type: ignore[override]
        return F.linear(y, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        y, weight, bias, mask, ctx.module = inputs
        ctx.save_for_backward(y, weight, mask, ctx.module._head_of)
        ctx.has_bias = bias is not None
        ctx.seen = None  # the branches of an earlier backward pass

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        refuse_double_backward("LinearHeads")
        if torch.compiler.is_compiling():
            return _backward(ctx, delta, _resolved)
        if notices.taken_apart():
            return _backward(ctx, delta, lambda _module, delta, weight, *_: delta @ weight.to(delta.dtype))
        if ctx.needs_input_grad[0] and notices.looks(ctx):
            module = ctx.module
            notices.tell(
                ctx, module.resolver, module.per, notices.present_heads, delta, module._head_of, len(module.sizes), group=module.ranks
            )
        return _backward(ctx, delta, _resolved)


_apply = transforms.plain_apply(_LinearHeads)


class _TransformedHeads(_LinearHeads):
    """For torch.func, which always asks for a gradient that has one itself; with a forward mode, which torch.compile would refuse."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _LinearHeads.setup_context(ctx, inputs, output)
        y, weight, _, mask, module = inputs
        ctx.save_for_forward(y, weight, mask, module._head_of)  # the same: vmap keeps one list of dimensions for both

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return _backward(ctx, delta, lambda module, *args: transforms.Opaque.apply(partial(_resolved, module), "LinearHeads", *args))

    @staticmethod
    def jvp(ctx: Any, ty: Tensor | None, tw: Tensor | None, tb: Tensor | None, *_: None) -> Tensor:  # type: ignore[override]
        y, weight = ctx.saved_tensors[:2]
        parts = (None if ty is None else F.linear(ty, weight), None if tw is None else F.linear(y, tw), tb)
        t = sum(part for part in parts if part is not None)
        return transforms.Opaque.apply(lambda t: t.expand(*y.shape[:-1], -1), "LinearHeads", t)


def _backward(ctx: Any, delta: Tensor, resolve: Callable[..., Tensor]) -> tuple[Tensor | None, ...]:
    if not reference.autocasts(delta):
        return *_gradients(ctx, delta, resolve), None, None
    with torch.autocast(delta.device.type, enabled=False):  # a backward pass run inside autocast must not round the Gramian
        return *_gradients(ctx, delta, resolve), None, None


def _gradients(ctx: Any, delta: Tensor, resolve: Callable[..., Tensor]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    y, weight, mask, head_of = ctx.saved_tensors
    module = ctx.module
    beta = module.beta if module.modulation is None else module.modulation.current(delta)
    if beta is not None:
        wide = reference.wide(delta)
        delta = (delta.to(wide) * beta.to(wide)[head_of]).to(delta.dtype)
    flat = _rows(delta)
    wants_y, wants_weight, wants_bias = ctx.needs_input_grad[:3]
    if torch._C._are_functorch_transforms_active() and torch.compiler.is_compiling():
        wants_y = wants_weight = wants_bias = True  # a trace does not know what functional_call has put in the parameters' place
    return (
        resolve(module, delta, weight, mask, head_of) if wants_y else None,
        flat.mT @ _rows(y) if wants_weight else None,
        flat.sum(0) if ctx.has_bias and wants_bias else None,
    )


def _rows(x: Tensor) -> Tensor:
    """x as a matrix."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _resolved(module: "LinearHeads", delta: Tensor, weight: Tensor, mask: Tensor | None, head_of: Tensor) -> Tensor:
    """The resolved gradient of the shared tensor, [..., in_features]."""
    problem = (module.resolver, module._k, module.per, mask, module.preserve_norm)
    if module.ranks is None or module.per == "sample":
        out, info = heads(delta, weight, head_of, *problem)
    else:
        with torch.no_grad():
            out, info = across.heads(delta, weight, head_of, *problem, module.ranks)
    module.record(info)
    return out


def _lowered(x: Tensor) -> Tensor:
    """x as autocast gives it to nn.Linear, which leaves float64 alone."""
    return x if x.dtype == torch.float64 else x.to(torch.get_autocast_dtype(x.device.type))


class LinearHeads(Impartial):
    """K linear branches on one tensor and the block that resolves their gradients, at about the cost of one linear layer.

    The same as an `ImpartialityBlock` over K `nn.Linear`, up to rounding: the Gramian is formed from products of the branches' output gradients
    and weights, in float32 (float64 for float64), so where the parts of a branch's gradient cancel it is known less exactly. A branch whose output
    gradient is zero everywhere is a missing modality. Go back once, by `sum(losses).backward()`, see `fork`. Block: Javaloy, Meghdadi, Valera, "Mitigating modality collapse in multimodal VAEs via
    impartial optimization", ICML 2022.

    Args:
        in_features: size of the last dimension of the shared tensor.
        out_features: K sizes, one per branch.
        resolver: the rule of the global step, or its name or class: any that works on Gramians; each module needs its own.
        bias: whether the branches add a bias.
        local: the local step beta, see `ImpartialityBlock`.
        per: "batch", "sample" or "batch_sum", see `fork`.
        preserve_norm: scales the resolved gradient to the length of the plain sum of the gradients, as the paper does.
        group: process group whose ranks hold parts of one batch, see `fork`; half of the work is then done in plain torch.

    `load_state_dict` also takes the checkpoint of an `ImpartialityBlock` over a list of `nn.Linear` of these sizes, or of their plain ModuleList.

    Attributes:
        weight: [sum of out_features, in_features], branch after branch.
        bias: [sum of out_features] or None.

    Raises:
        TypeError, ValueError: an argument is not as described; the resolver is elementwise (GradDrop, TrimmedMean).
        RuntimeError: in the backward pass, where create_graph=True asks to differentiate through it.

    Example:
        >>> heads = mf.LinearHeads(4, [3, 1, 7], mf.IMTLG())
        >>> a, b, c = heads(torch.randn(8, 4, requires_grad=True))
        >>> (a.sum() + b.sum() + c.sum()).backward()
        >>> c.shape, heads.stats().weights.shape
        (torch.Size([8, 7]), torch.Size([3]))
    """

    _head_of: Tensor  # [sum of out_features], the branch of each output

    def __init__(
        self,
        in_features: int,
        out_features: Sequence[int],
        resolver: ResolverLike,
        *,
        bias: bool = True,
        local: LocalScale | Sequence[float] | Tensor | None = None,
        per: str = "batch",
        preserve_norm: bool = True,
        group: Any = None,
    ) -> None:
        if not isinstance(in_features, int) or in_features < 1:
            raise ValueError(f"in_features is {in_features!r}, expected a whole number of at least 1")
        if not isinstance(out_features, Sequence):
            raise TypeError(f"out_features is {out_features!r}, expected a list of 1 to {contract.MAX_GRADS} sizes, one per branch")
        if not 1 <= len(out_features) <= contract.MAX_GRADS:
            raise ValueError(f"out_features is {contract.shortened(out_features)}, expected 1 to {contract.MAX_GRADS} sizes")
        for i, size in enumerate(out_features):
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"out_features[{i}] is {size!r}, expected a whole number of at least 1")
        super().__init__(len(out_features), resolver, local, per, preserve_norm, group)
        if isinstance(self.resolver, ElementwiseRule):
            raise TypeError(
                f"resolver is {self.resolver!r}, which needs each gradient's elements, and LinearHeads never forms them; "
                "use an ImpartialityBlock over nn.Linear branches"
            )
        self.sizes = tuple(out_features)
        total = sum(self.sizes)
        self.weight = nn.Parameter(torch.empty(total, in_features))
        self.bias = nn.Parameter(torch.empty(total)) if bias else None
        self.register_buffer("_head_of", None, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws weights and biases as K `nn.Linear` do, and makes anew what else memory of `to_empty` held."""
        super().reset_parameters()
        self._index(self.weight.device)
        bound = 1 / math.sqrt(self.weight.shape[1])
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the branches: "0", "1", ..."""
        return tuple(map(str, range(len(self.sizes))))

    def forward(self, y: Tensor, mask: Tensor | None = None) -> tuple[Tensor, ...]:
        """Every branch's output, [..., out_features[i]]: parts of one tensor, which may be changed in place.

        Args:
            y: floating-point tensor [..., in_features]; the first dimension is the batch.
            mask: bool [K] or [B, K], False where a branch's gradient is to be left out at y (its parameters get it all the same).
        """
        joint = self.joint(y, mask)
        if torch._C._are_functorch_transforms_active():  # vmap has no rule for the other
            return joint.split(self.sizes, -1)
        return tuple(torch.unsafe_split_with_sizes(joint, self.sizes, -1))  # nobody sees the whole, so parts may be changed in place

    def joint(self, y: Tensor, mask: Tensor | None = None) -> Tensor:
        """All branches' outputs side by side, [..., sum of out_features]; the faster form where one computation takes them together."""
        if not isinstance(y, Tensor):
            raise TypeError(f"y is a {type(y).__name__}, expected a tensor")
        contract.check_dense(y, "y")
        if y.is_complex():
            raise TypeError(f"y is {y.dtype}, expected a floating-point tensor; use an ImpartialityBlock over complex nn.Linear branches")
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        if y.dim() == 0 or y.shape[-1] != weight.shape[1]:
            raise ValueError(f"y has shape {tuple(y.shape)}, expected [..., {weight.shape[1]}]")
        if self.per != "batch" and y.dim() < 2:
            raise ValueError(f"per={self.per!r} needs a leading batch dimension, but y has shape {tuple(y.shape)}")
        if mask is not None:
            contract.check_mask(mask, len(self.sizes), y.shape if y.dim() > 1 else torch.Size(), y.device)
        if reference.autocasts(y):
            y, weight, bias = _lowered(y), _lowered(weight), None if bias is None else _lowered(bias)
        if not transforms.alone():
            return self._transformed(y, weight, bias, mask)
        local = self.local_step()
        if not transforms.wants_gradient(y):
            self.no_gradient_wanted()
            if local is None:
                return F.linear(y, weight, bias)
        return _apply(y, weight, bias, mask, self)

    def _transformed(self, y: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None) -> Tensor:
        """`joint` where torch.compile, torch.export or torch.func is at work."""
        if transforms.exporting():
            return F.linear(y, weight, bias)
        transforms.refuse_compiled(y, "LinearHeads")
        if self.ranks is not None:
            transforms.refuse_group("LinearHeads")
        if transforms.active():
            return _TransformedHeads.apply(y, weight, bias, mask, self)
        local = self.local_step()
        if transforms.wants_gradient(y):
            y = transforms.tracked(y)
        else:
            self.no_gradient_wanted()
            if local is None:
                return F.linear(y, weight, bias)
        check_traceable(self.resolver, len(self.sizes))
        return _LinearHeads.apply(y, weight, bias, mask, self)

    def _index(self, device: torch.device) -> None:
        """Makes what follows from the sizes alone."""
        total, k = sum(self.sizes), len(self.sizes)
        places = torch.arange(k, device=device)
        self._head_of = torch.repeat_interleave(places, torch.tensor(self.sizes, device=device), output_size=total)

    def _apply(self, fn: Any, recurse: bool = True) -> "LinearHeads":
        super()._apply(fn, recurse)
        self._index(self.weight.device)
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        for form in ("branches.", ""):
            names = [f"{prefix}{form}{i}." for i in range(len(self.sizes))]
            parts = [state_dict.get(name + "weight") for name in names]
            if prefix + "weight" in state_dict or any(w is None or w.shape[:1] != (n,) for w, n in zip(parts, self.sizes, strict=True)):
                continue
            for what in ("weight", "bias") if all(name + "bias" in state_dict for name in names) else ("weight",):
                state_dict[prefix + what] = torch.cat([state_dict.pop(name + what) for name in names])
            if not form:
                self._keep_own(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if self._head_of.device != self.weight.device:  # assigned to a module on the meta device
            self._index(self.weight.device)

    def extra_repr(self) -> str:
        sizes = ", ".join(map(str, self.sizes))
        return f"{self.weight.shape[1]}, [{sizes}], bias={self.bias is not None}, {super().extra_repr()}"
