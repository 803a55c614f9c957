"""fork: one tensor feeds K branches, and their gradients are resolved into one on the way back.

Algorithm 1 of Javaloy, Meghdadi, Valera, "Mitigating modality collapse in multimodal VAEs via impartial optimization", ICML 2022.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol, overload

import torch
from torch import Tensor

from mmfast import contract
from mmfast.blocks import notices, transforms
from mmfast.ops import across
from mmfast.ops.across import Ranks
from mmfast.ops.lists import columns_of, used_tensors
from mmfast.ops.resolve import resolve, resolve_info
from mmfast.resolvers.base import Resolver, Rule
from mmfast.resolvers.elementwise import ElementwiseRule
from mmfast.resolvers.names import ResolverLike, instance_of, made_of
from mmfast.resolvers.solve import precision_of


class Recorder(Protocol):
    """Keeps what a backward pass saw."""

    def record(self, info: Tensor | None) -> None: ...

    def no_gradient_wanted(self) -> None: ...


class Plan(NamedTuple):
    """Everything about a fork that is known before its tensor."""

    k: int
    resolver: Resolver
    per: str
    preserve_norm: bool
    recorder: Recorder | None  # of the Gramian and the weights
    ranks: Ranks | None = None  # the processes whose parts of the batch are one problem


def refuse_double_backward(what: str) -> None:
    """Called in a backward pass: raises where its result is asked to be differentiable."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise transforms.no_second_derivative(what)


class mmfast_fork(torch.autograd.Function):
    """Its name stands in torch's error when an alias is changed in place."""

    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor, mask: Tensor | None, plan: Plan) -> tuple[Tensor, ...]:  # type: ignore[override]
        return (y,) * plan.k  # autograd makes a view of each

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, mask, ctx.plan = inputs
        ctx.seen = None  # the branches of an earlier backward pass
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(mask)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None]:  # type: ignore[override]
        if all(g is None for g in grads):
            return None, None, None
        refuse_double_backward("a fork")
        (mask,) = ctx.saved_tensors
        if not torch.compiler.is_compiling():
            if notices.taken_apart():
                return notices.plain_sum(grads), None, None
            notices.tell(ctx, ctx.plan.resolver, ctx.plan.per, notices.present_branches, grads)
        return resolved(ctx.plan, mask, *grads), None, None


class _TransformedFork(mmfast_fork):
    """For torch.func, which always asks for a gradient that has one itself; with a forward mode, which torch.compile would refuse."""

    @staticmethod
    def forward(y: Tensor, mask: Tensor | None, plan: Plan) -> tuple[Tensor, ...]:  # type: ignore[override]
        return tuple(y.clone() for _ in range(plan.k))  # nothing there refuses a change in place

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None]:  # type: ignore[override]
        if all(g is None for g in grads):
            return None, None, None
        (mask,) = ctx.saved_tensors
        return transforms.Opaque.apply(partial(resolved, ctx.plan), "a fork", mask, *grads), None, None

    @staticmethod
    def jvp(ctx: Any, t: Tensor, *_: None) -> tuple[Tensor, ...]:  # type: ignore[override]
        return tuple(transforms.Opaque.apply(torch.Tensor.view_as, "a fork", t, t) for _ in range(ctx.plan.k))


def resolved(plan: Plan, mask: Tensor | None, *grads: Tensor | None) -> Tensor:
    """The gradient of one tensor from those that K branches send."""
    _, resolver, per, preserve_norm, recorder, _ = plan
    if recorder is None:
        return resolve(grads, resolver, per, mask, preserve_norm=preserve_norm)
    out, info = resolve_info(grads, resolver, per, mask, preserve_norm=preserve_norm)
    recorder.record(info)
    return out


def check_plan(k: int, resolver: ResolverLike, per: str) -> Resolver:
    if not isinstance(k, int) or isinstance(k, bool):
        raise TypeError(f"k is a {type(k).__name__}, expected an int")
    if not 1 <= k <= contract.MAX_GRADS:
        raise ValueError(f"k is {k}, expected 1 to {contract.MAX_GRADS} branches")
    contract.per_code(per)
    resolver = made_of(resolver)
    if resolver.of_parameters:
        raise ValueError(
            f"resolver is {type(resolver).__name__}, which keeps what it saw of every element, and here each call brings other samples; "
            "expected one without such a state, or mf.backward(losses, resolver), which resolves the gradients of parameters"
        )
    resolver.check(k)
    return resolver


def _check_tensors(y: Tensor, mask: Tensor | None, plan: Plan, name: str = "y") -> None:
    if not isinstance(y, Tensor):
        raise TypeError(f"{name} is a {type(y).__name__}, expected a tensor")
    contract.check_dense(y, name)
    if y.dtype not in contract.DTYPES and y.dtype not in contract.COMPLEX:
        raise TypeError(f"{name} is {y.dtype}, expected one of {', '.join(map(str, contract.DTYPES + contract.COMPLEX))}")
    if y.dim() == 0:
        contract.check_per(plan.per, y.shape)
    if mask is not None:
        contract.check_mask(mask, plan.k, y.shape, y.device)


def without_state(resolver: Resolver, k: int) -> list[Rule]:
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
    if without_state(resolver, k):
        raise RuntimeError("a compiled backward pass can't create a resolver's state: run one step without torch.compile first")


def fork_by(y: Tensor, mask: Tensor | None, plan: Plan) -> tuple[Tensor, ...]:
    _check_tensors(y, mask, plan)
    if y.is_complex():
        return tuple(map(torch.view_as_complex, _fork_real(torch.view_as_real(y.resolve_conj()), mask, plan)))
    return _fork_real(y, mask, plan)


def _fork_real(y: Tensor, mask: Tensor | None, plan: Plan) -> tuple[Tensor, ...]:
    if plan.ranks is not None:
        return tuple(alias for (alias,) in fork_several([y], mask, plan))
    if transforms.exporting():
        return tuple(y.view_as(y) for _ in range(plan.k))
    transforms.refuse_compiled(y, "a fork")
    if transforms.active():  # whether there is something to differentiate shows further below
        return _TransformedFork.apply(y, mask, plan)
    if transforms.wants_gradient(y):
        check_traceable(plan.resolver, plan.k)
        return transforms.apply(mmfast_fork, transforms.tracked(y), mask, plan)
    if plan.recorder is not None:
        plan.recorder.no_gradient_wanted()
    if torch.compiler.is_compiling():  # where nothing is recorded, nothing refuses a change in place; a copy that is not needed is not made
        return tuple(y.clone() for _ in range(plan.k))
    return tuple(y.view_as(y) for _ in range(plan.k))


class mmfast_fork_of_several(torch.autograd.Function):
    """Its name stands in torch's error when an alias is changed in place."""

    @staticmethod
    def forward(mask: Tensor | None, plan: Plan, *ys: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return ys * plan.k  # autograd makes a view of each

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        mask, ctx.plan, *ys = inputs
        ctx.count = len(ys)
        ctx.kinds = None if ctx.plan.ranks is None else [(y.shape, y.dtype, y.device) for y in ys]
        ctx.seen = None  # the branches of an earlier backward pass
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(mask)

    @staticmethod
    def backward(ctx: Any, *flat: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (mask,) = ctx.saved_tensors
        grads = [flat[i * ctx.count : (i + 1) * ctx.count] for i in range(ctx.plan.k)]
        across_ranks = ctx.plan.ranks is not None and ctx.plan.per != "sample"
        if not across_ranks and all(g is None for g in flat):
            return (None,) * (2 + ctx.count)
        refuse_double_backward("a fork")
        if not torch.compiler.is_compiling():
            if notices.taken_apart():
                return (None, None, *(notices.plain_sum(column) for column in zip(*grads, strict=True)))
            notices.tell(ctx, ctx.plan.resolver, ctx.plan.per, present_in_lists, grads, group=ctx.plan.ranks)
        if across_ranks:
            return (None, None, *resolved_across(ctx.plan, mask, grads, ctx.kinds))
        return (None, None, *resolved_lists(ctx.plan, mask, grads))


def present_in_lists(grads: Sequence[Sequence[Tensor | None]]) -> Tensor:
    """Which of K lists of gradients hold one that is not all zero, bool [K]."""
    by_tensor = [column for column in zip(*grads, strict=True) if any(g is not None for g in column)]
    return torch.stack([notices.present_branches(column) for column in by_tensor]).any(0)


def resolved_lists(plan: Plan, mask: Tensor | None, grads: Sequence[Sequence[Tensor | None]]) -> list[Tensor | None]:
    """The gradient of each tensor, None where no branch sends one."""
    used, rows = used_tensors(grads)
    if len(used) == 1:  # the usual case, in one call of the operator
        one, info = resolve_info([g[used[0]] for g in grads], plan.resolver, plan.per, mask, preserve_norm=plan.preserve_norm)
        out = [one]
    else:
        out, info = resolve_info(rows, plan.resolver, plan.per, mask, preserve_norm=plan.preserve_norm)
    if plan.recorder is not None:
        plan.recorder.record(info)
    by_tensor = dict(zip(used, out, strict=True))
    return [by_tensor.get(t) for t in range(len(grads[0]))]


Kind = tuple[torch.Size, torch.dtype, torch.device]  # of a tensor that may get no gradient


def resolved_across(
    plan: Plan,
    mask: Tensor | None,
    grads: Sequence[Sequence[Tensor | None]],
    kinds: Sequence[Kind],
    takers: Sequence[set[int]] | None = None,
) -> list[Tensor]:
    """`resolved_lists` where other ranks hold the rest of the batch, whatever this one's branches send; takers are the branches that took each tensor here."""
    assert plan.ranks is not None
    used, _ = used_tensors(grads)
    zeros = [None if t in used else torch.zeros(shape, dtype=dtype, device=device) for t, (shape, dtype, device) in enumerate(kinds)]
    columns = columns_of([[z if g is None else g for z, g in zip(zeros, grads[0], strict=True)], *grads[1:]], plan.per, mask)
    info: Tensor | None = None
    with torch.no_grad():
        if isinstance(plan.resolver, ElementwiseRule):
            out = across.resolve_elements(columns, plan.k, plan.resolver, mask, plan.preserve_norm, plan.ranks)
        else:
            precision = max(precision_of(dtype) for _, dtype, _ in kinds)
            problem = (plan.resolver, plan.per, mask, plan.preserve_norm, precision, plan.ranks, _table(takers, plan.k, kinds[0][2]))
            out, info = across.resolve(columns, plan.k, *problem)
    if plan.recorder is not None:
        plan.recorder.record(info)
    return out


def _table(takers: Sequence[set[int]] | None, k: int, device: torch.device) -> Tensor | None:
    """Float64 [tensors, K], 1 where a branch took a tensor; by fills, for a copy from the host would wait for the device."""
    if takers is None:
        return None
    table = torch.zeros(len(takers), k, dtype=torch.float64, device=device)
    for t, branches in enumerate(takers):
        for i in branches:
            table[t, i].fill_(1)
    return table


def fork_several(ys: Sequence[Tensor], mask: Tensor | None, plan: Plan) -> tuple[tuple[Tensor, ...], ...]:
    """plan.k tuples of aliases of the tensors; those that ask for no gradient take no part."""
    if plan.ranks is not None:
        transforms.refuse_group("a fork")
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


@overload
def fork(
    y: Tensor,
    k: int,
    resolver: ResolverLike,
    *,
    per: str = "batch",
    mask: Tensor | None = None,
    preserve_norm: bool = True,
    group: Any = None,
) -> tuple[Tensor, ...]: ...
@overload
def fork(
    y: Sequence[Tensor],
    k: int,
    resolver: ResolverLike,
    *,
    per: str = "batch",
    mask: Tensor | None = None,
    preserve_norm: bool = True,
    group: Any = None,
) -> tuple[tuple[Tensor, ...], ...]: ...
def fork(
    y: Any,
    k: int,
    resolver: ResolverLike,
    *,
    per: str = "batch",
    mask: Tensor | None = None,
    preserve_norm: bool = True,
    group: Any = None,
) -> Any:
    """Splits a tensor into k aliases, one per branch, whose gradients are resolved into the tensor's gradient.

    Use each alias in exactly one branch. A branch that sends no gradient back is a missing modality and is left out of the problem.
    Go back once, by `sum(losses).backward()`: of one backward call for each loss every one has a single branch, and nothing is resolved (a warning
    says so). Without `group` each process resolves its own part of the batch.
    Based on Algorithm 1 of Javaloy, Meghdadi, Valera, "Mitigating modality collapse in multimodal VAEs via impartial optimization", ICML 2022.

    Args:
        y: floating-point or complex tensor of any shape, of which each complex number counts as a pair of real ones; the first dimension is the batch where `per` needs one.
            Or a list of such tensors, which each branch gets an alias of: one problem resolves the gradients of all (not inside torch.func).
        k: number of branches, 1 to 256.
        resolver: the rule, or its name or class. A rule that keeps state belongs to one fork: give every fork its own, and keep it between calls.
        per: "batch" resolves one problem, each gradient flattened; "sample" one for each index of the first dimension; "batch_sum" one,
            from the gradients summed over the first dimension.
        mask: bool [k], False where a branch is to be left out, or [B, k] to leave it out of some entries of the first dimension.
        preserve_norm: scales the result to the length of the plain sum of the gradients, as the paper does.
        group: a torch.distributed process group whose ranks hold parts of one batch: the gradients are resolved as those of the whole batch in one process
            would be (docs/distributed.md). Every rank of it must go forward and back through the fork.

    Returns:
        k tensors, or k tuples of tensors, that share y's memory; changing one in place is an error where a gradient is recorded, and shows in all where none is:
        clone() it first. The gradient is deterministic, up to the draws of a random rule.

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
    plan = Plan(k, check_plan(k, instance_of(resolver, k), per), per, preserve_norm, None, Ranks.of(group))
    if isinstance(y, (list, tuple)):
        if not y:
            raise ValueError("y is an empty list, expected one tensor at least")
        for i, one in enumerate(y):
            _check_tensors(one, mask, plan, f"y[{i}]")
        return fork_several(y, mask, plan)
    return fork_by(y, mask, plan)
