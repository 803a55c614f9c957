"""DReG's two decodes in one: the likelihoods once, and backwards once for the decoder, once for z."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mmfast.blocks import notices

Heads = Callable[[Tensor], Tensor]


class _DecodedOnce(torch.autograd.Function):
    """Keeps the graph of one decode, and goes back through it by two ways: from the first result to the parameters, from the second to z."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        body: nn.Module,
        heads: tuple[Heads, Heads],
        log_likelihood: Callable[[Tensor], Tensor],
        n_body: int,
        z: Tensor,
        *params: Tensor,
    ) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            start = z.detach().requires_grad_()
            shared = body(start)
            branches = [shared.detach().requires_grad_() for _ in heads]
            raws = [of(y) for of, y in zip(heads, branches, strict=True)]
            raw = raws[0].detach().requires_grad_()
            log_x = log_likelihood(raw)
        ctx.graph, ctx.params, ctx.n_body = (start, shared, branches, raws, raw, log_x), params, n_body
        return log_x.detach(), log_x.detach().clone()

    @staticmethod
    def backward(ctx: Any, to_params: Tensor, to_z: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        start, shared, branches, raws, raw, log_x = ctx.graph
        keep = notices.goes_back_again()
        wanted = [p for p in ctx.params if p.requires_grad]
        of_body = [p for p in ctx.params[: ctx.n_body] if p.requires_grad]
        of_heads = [p for p in ctx.params[ctx.n_body :] if p.requires_grad]
        (delta,) = torch.autograd.grad(log_x, raw, to_params, retain_graph=True)
        back, *grads_of_heads = torch.autograd.grad(raws[0], [branches[0], *of_heads], delta, retain_graph=keep)
        grads_of_body = torch.autograd.grad(shared, of_body, back, retain_graph=True) if of_body else ()
        (delta,) = torch.autograd.grad(log_x, raw, to_z, retain_graph=keep)
        (back,) = torch.autograd.grad(raws[1], branches[1], delta, retain_graph=keep)
        (grad,) = torch.autograd.grad(shared, start, back, retain_graph=keep)
        found = dict(zip(map(id, wanted), [*grads_of_body, *grads_of_heads], strict=True))
        return (None, None, None, None, grad, *(found.get(id(p)) for p in ctx.params))


def decode_once(
    body: nn.Module,
    heads: tuple[nn.Module, nn.Module],
    apply: Callable[[nn.Module, Tensor], Tensor],
    log_likelihood: Callable[[Tensor], Tensor],
    z: Tensor,
) -> tuple[Tensor, Tensor]:
    """(log p(x | z) for the gradient of the decoder alone, the same for that of z alone), bit for bit those of two decodes; the heads share their parameters."""
    of_body = list(body.parameters())
    ways = tuple((lambda y, of=of: apply(of, y)) for of in heads)
    return _DecodedOnce.apply(body, ways, log_likelihood, len(of_body), z, *of_body, *heads[0].parameters())
