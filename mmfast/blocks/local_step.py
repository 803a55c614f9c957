"""The local step: each branch's gradient multiplied by its beta, at the branch's output."""

import math
from typing import Any, Protocol

import torch
from torch import Tensor

from mmfast.backends import reference
from mmfast.blocks import transforms
from mmfast.blocks.scaling import LocalScale


class Follows(Protocol):
    """K numbers that may change from step to step."""

    def current(self, grad: Tensor) -> Tensor:
        """Those of this backward pass, float64 [K] on the gradient's device, or on the CPU."""


class mmfast_local_step(torch.autograd.Function):
    """The identity, whose gradient is multiplied by beta[i]; its name stands in torch's error when an output is changed in place."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, beta: Follows, i: int) -> Tensor:  # type: ignore[override]
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, ctx.beta, ctx.i = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        # a tensor would be rounded to 16 bits before it multiplies such a gradient
        wide = reference.wide(grad)
        scaled = (grad if grad.is_complex() else grad.to(wide)) * ctx.beta.current(grad)[ctx.i].to(wide)
        return scaled.to(grad.dtype), None, None


class _TransformedScale(mmfast_local_step):
    @staticmethod
    def jvp(ctx: Any, t: Tensor, *_: None) -> Tensor:  # type: ignore[override]
        return t.view_as(t)


def scale_outputs(output: Any, beta: Follows, i: int, name: str) -> Any:
    """The output of branch i, tensors in tuples, lists and dicts included, with gradients multiplied by beta[i]."""
    if isinstance(output, Tensor):
        transforms.refuse_compiled(output, "a local step")
        if transforms.active():
            return _TransformedScale.apply(output, beta, i)
        return transforms.apply(mmfast_local_step, transforms.tracked(output), beta, i) if transforms.wants_gradient(output) else output
    if isinstance(output, dict):
        scaled = output.copy()
        for key, value in output.items():
            scaled[key] = scale_outputs(value, beta, i, name)
        return scaled
    if isinstance(output, (tuple, list)):
        values = [scale_outputs(value, beta, i, name) for value in output]
        return type(output)(*values) if hasattr(output, "_fields") else type(output)(values)
    if output is None or isinstance(output, (bool, int, float, str)):
        return output
    raise TypeError(
        f"{name} returned a {type(output).__name__}, which the local step can't scale; return tensors, or tuples, lists and dicts of them"
    )


def check_local(local: Any, k: int) -> tuple[float, ...]:
    values = local.beta if isinstance(local, LocalScale) else local
    try:
        beta = tuple(float(b) for b in values)
    except (TypeError, ValueError):
        raise TypeError(
            f"local is a {type(local).__name__}, expected {k} numbers, or a StandardScale, DimRatio, LipschitzScale, OGM, AGM or CGGM"
        ) from None
    if len(beta) != k:
        raise ValueError(f"local has {len(beta)} numbers, expected {k}, one per branch")
    for i, b in enumerate(beta):
        if not (math.isfinite(b) and b > 0):
            raise ValueError(f"local[{i}] is {b}, expected a positive finite number")
    return beta
