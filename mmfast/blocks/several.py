"""fork for several tensors: each branch gets an alias of every one of them, and one problem resolves the gradients of all."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmfast.blocks import notices, transforms
from mmfast.blocks.fork import Plan, check_traceable, refuse_double_backward
from mmfast.ops.resolve import resolve_info


class mmfast_fork_of_several(torch.autograd.Function):
    """Its name stands in torch's error when an alias is changed in place."""

    @staticmethod
    def forward(mask: Tensor | None, plan: Plan, *ys: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return ys * plan.k  # autograd makes a view of each

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        mask, ctx.plan, *ys = inputs
        ctx.count = len(ys)
        ctx.seen = None  # the branches of an earlier backward pass
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(mask)

    @staticmethod
    def backward(ctx: Any, *flat: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (mask,) = ctx.saved_tensors
        grads = [flat[i * ctx.count : (i + 1) * ctx.count] for i in range(ctx.plan.k)]
        if all(g is None for g in flat):
            return (None,) * (2 + ctx.count)
        refuse_double_backward("a fork")
        if notices.taken_apart:
            return (None, None, *(notices.plain_sum(column) for column in zip(*grads, strict=True)))
        if not torch.compiler.is_compiling():
            notices.tell(ctx, ctx.plan.resolver, ctx.plan.per, _present, grads)
        return (None, None, *resolved(ctx.plan, mask, grads))


def _present(grads: Sequence[Sequence[Tensor | None]]) -> Tensor:
    by_tensor = [column for column in zip(*grads, strict=True) if any(g is not None for g in column)]
    return torch.stack([notices.present_branches(column) for column in by_tensor]).any(0)


def resolved(plan: Plan, mask: Tensor | None, grads: Sequence[Sequence[Tensor | None]]) -> list[Tensor | None]:
    """The gradient of each tensor, None where no branch sends one."""
    reached = [t for t in range(len(grads[0])) if any(g[t] is not None for g in grads)]
    if len(reached) == 1:  # the usual case, in one call of the operator
        one, info = resolve_info([g[reached[0]] for g in grads], plan.resolver, plan.per, mask, preserve_norm=plan.preserve_norm)
        out = [one]
    else:
        rows = [[g[t] for t in reached] if any(g[t] is not None for t in reached) else None for g in grads]
        out, info = resolve_info(rows, plan.resolver, plan.per, mask, preserve_norm=plan.preserve_norm)
    if plan.recorder is not None:
        plan.recorder.record(info)
    by_tensor = dict(zip(reached, out, strict=True))
    return [by_tensor.get(t) for t in range(len(grads[0]))]


def fork_several(ys: Sequence[Tensor], mask: Tensor | None, plan: Plan) -> tuple[tuple[Tensor, ...], ...]:
    """plan.k tuples of aliases of the tensors; those that ask for no gradient take no part."""
    if transforms.active():
        raise RuntimeError(
            "several tensors can't be forked inside a transformation of torch.func; fork one tensor, or transform the loss outside"
        )
    wants = [transforms.wants_gradient(y) for y in ys]
    if not any(wants) or transforms.exporting():
        if plan.recorder is not None and not transforms.exporting():
            plan.recorder.no_gradient_wanted()
        return tuple(tuple(y.view_as(y) for y in ys) for _ in range(plan.k))
    check_traceable(plan.resolver, plan.k)
    differentiated = [y for y, wanted in zip(ys, wants, strict=True) if wanted]
    flat = transforms.apply(mmfast_fork_of_several, mask, plan, *differentiated)
    aliases = iter(flat)
    return tuple(tuple(next(aliases) if wanted else y.view_as(y) for y, wanted in zip(ys, wants, strict=True)) for _ in range(plan.k))
