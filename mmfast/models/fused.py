"""The likelihoods of all features by the compiled operator, as autograd, torch.compile and torch.func see it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmfast.blocks import transforms
from mmfast.ops import log_prob as ops

Plain = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class LogProb(torch.autograd.Function):
    """Keeps the derivatives that were computed beside the values; what is to be differentiated twice goes back through plain torch."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, raw: Tensor, x: Tensor, seen: Tensor | None, features: Tensor, w: Tensor, plain: Plain
    ) -> Tensor:
        out, ctx.slopes = ops.log_prob(raw, x, seen, features, w, True)
        ctx.inputs = x, seen, features, plain
        ctx.save_for_backward(raw)  # looked at for a second derivative only: it may have been changed since
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, seen, features, plain = ctx.inputs
        if torch.is_grad_enabled():
            (raw,) = ctx.saved_tensors
            (found,) = torch.autograd.grad(plain(raw, x, seen), raw, grad, create_graph=True)
        else:
            found = ops.log_prob_backward(grad, ctx.slopes, features)
        return found, None, None, None, None, None


class _TransformedLogProb(torch.autograd.Function):
    """For torch.compile and vmap, which differentiate once."""

    generate_vmap_rule = True

    @staticmethod
    def forward(  # type: ignore[override]
        raw: Tensor, x: Tensor, seen: Tensor | None, features: Tensor, w: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        return ops.log_prob(raw, x, seen, features, w, True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(inputs[3], output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        features, slopes = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise transforms.no_second_derivative("likelihoods inside vmap")
        return ops.log_prob_backward(grad, slopes, features), None, None, None, None


def log_prob(raw: Tensor, x: Tensor, seen: Tensor | None, features: Tensor, w: Tensor, plain: Plain) -> Tensor | None:
    """Log-likelihoods [..., K] of raw [..., outputs] and x [..., K], whose rows go with those of raw in turn; None where plain(raw, x, seen) must give them:
    on a GPU, in another precision, in a derivative of torch.func or by x."""
    if not ops.serves(raw, x, seen, w) or x.requires_grad or w.requires_grad or transforms.differentiating():
        return None
    if x.dim() > 2:
        x, seen = x.flatten(0, -2), None if seen is None else seen.flatten(0, -2)
    if not torch.is_grad_enabled():
        return ops.log_prob(raw, x, seen, features, w, False)[0]
    if torch.compiler.is_compiling() or transforms.active():  # what vmap maps over does not say whether it asks for a gradient
        return _TransformedLogProb.apply(raw, x, seen, features, w)[0]
    if raw.requires_grad:
        return transforms.apply(LogProb, raw, x, seen, features, w, plain)
    return ops.log_prob(raw, x, seen, features, w, False)[0]
