"""resolve: Gramian, weights and weighted sum of K gradients in one call."""

from collections.abc import Sequence
from typing import Any, cast, overload

import torch
from torch import Tensor

from mmfast import contract
from mmfast.backends import direct, library, reference
from mmfast.backends.choice import choose, functions_of
from mmfast.ops import lists
from mmfast.resolvers.base import Resolver, call_resolver
from mmfast.resolvers.chain import bind
from mmfast.resolvers.elementwise import ElementwiseRule
from mmfast.resolvers.names import ResolverLike, instance_of
from mmfast.resolvers.norm import measured
from mmfast.resolvers.solve import precision_of, present_rows, untold


@overload
def resolve(  # type: ignore[overload-overlap]  # of Nones alone there is nothing to resolve
    grads: Sequence[Tensor | None] | Tensor,
    resolver: ResolverLike,
    per: str = "batch",
    mask: Tensor | None = None,
    *,
    preserve_norm: bool = False,
    backend: str = "auto",
) -> Tensor: ...
@overload
def resolve(
    grads: Sequence[Sequence[Tensor | None] | None],
    resolver: ResolverLike,
    per: str = "batch",
    mask: Tensor | None = None,
    *,
    preserve_norm: bool = False,
    backend: str = "auto",
) -> list[Tensor]: ...
def resolve(
    grads: Any,
    resolver: ResolverLike,
    per: str = "batch",
    mask: Tensor | None = None,
    *,
    preserve_norm: bool = False,
    backend: str = "auto",
) -> Tensor | list[Tensor]:
    """One gradient from K conflicting ones: Gramian, weights and weighted sum in one call.

    Args:
        grads: as for `gram`; entries of a list that are None are missing modalities.
        resolver: how conflicts are resolved: an instance, or the name or class of a rule that needs no arguments and keeps no state.
        per: "batch" (one problem), "sample" (one problem per entry of the leading dimension) or "batch_sum" (one problem, of the
            gradients summed over the leading dimension).
        mask: bool [K], or [B, K]: False where a gradient (or a sample of it) is missing; what it holds is never read.
        preserve_norm: give the result the norm of the plain sum, as the impartial-optimisation code does.
            Beyond 256 gradients it costs a further reading of them.
        backend: as for `gram`; "auto" goes past torch's dispatcher where nobody could tell, "cpu" never does.

    Returns:
        A fresh contiguous tensor of the shape and dtype of one gradient, or a list of them where each gradient is one (a tensor that no gradient has is
        left out of the lists). The same inputs, resolver state and seed give the same
        bits on every run, thread count and instruction set. A non-finite gradient gives a non-finite result. No gradient flows back through it.

    >>> import torch, mmfast as mf
    >>> mf.resolve([torch.tensor([-3.0, 1.0, 1.0]), torch.tensor([5.0, 1.0, 1.0])], mf.MGDA())
    tensor([0., 1., 1.])
    """
    return resolve_info(grads, resolver, per, mask, preserve_norm=preserve_norm, backend=backend, with_info=False)[0]


def resolve_info(
    grads: Any,
    resolver: ResolverLike,
    per: str = "batch",
    mask: Tensor | None = None,
    *,
    preserve_norm: bool = False,
    backend: str = "auto",
    with_info: bool = True,
) -> tuple[Any, Tensor | None]:
    """`resolve`, with what it did: (result, info) with info float64 [K + K * K], or [B, K + K * K] per sample: weights, then Gramian.

    info is None for elementwise resolvers; without `with_info` it may be None, or lack what the result did not need.
    """
    grads = contract.as_rows(grads)
    if not isinstance(resolver, Resolver):
        resolver = instance_of(resolver, len(grads))
    if mask is None and per == "batch" and backend == "auto":
        found = direct.resolve(grads, resolver, preserve_norm, with_info)
        if found is not None:
            return found
    k = len(grads)
    if k > contract.MAX_GRADS:
        return _many(grads, resolver, k, per, mask, preserve_norm, backend)
    if lists.is_lists(grads):
        contract.per_code(per)
        columns = lists.columns_of(grads, per, mask)
        with torch.no_grad():
            if not isinstance(resolver, ElementwiseRule) and not torch.compiler.is_compiling():
                return lists.resolve(columns, k, resolver, per, mask, preserve_norm, backend)
            # a graph has one operator for one tensor, which its compiler fills without a copy
            shape = "sample" if mask is not None and mask.dim() == 2 else per  # which keeps the dimension that such a mask is for
            out, info = resolve_info(lists.joined(columns, k, shape), resolver, per, mask, preserve_norm=preserve_norm, backend=backend)
            return lists.split(out, columns, shape), info
    missing = tuple([i for i, g in enumerate(grads) if g is None])
    present = [g for g in grads if g is not None] if missing else cast(Sequence[Tensor], grads)
    arguments = (resolver, k, missing, per, mask, preserve_norm, with_info, backend)
    return contract.call_ordinary(_resolve, present, arguments, per, mask, k, _complex)


def _many(
    grads: Sequence[Any], resolver: Resolver, k: int, per: str, mask: Tensor | None, preserve_norm: bool, backend: str
) -> tuple[Any, Tensor]:
    """More gradients than a kernel takes: each as a list, which goes by tiles."""
    contract.check_count(k)
    contract.per_code(per)
    if isinstance(resolver, ElementwiseRule):
        raise ValueError(  # noqa: TRY004 it is the number that does not fit
            f"grads holds {k} gradients, expected 1 to {contract.MAX_GRADS} for {resolver!r}, which looks at every element of all"
        )
    several = lists.is_lists(grads)
    try:
        columns = lists.columns_of(grads if several else [None if g is None else [g] for g in grads], per, mask)
    except (ValueError, TypeError) as error:
        if several:
            raise
        raise type(error)(str(error).removeprefix("tensor 0 of the lists: ")) from None
    with torch.no_grad():
        out, info = lists.resolve(columns, k, resolver, per, mask, preserve_norm, backend)
    return (out if several else out[0]), info


def _complex(found: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
    return torch.view_as_complex(found[0]), found[1]


def _resolve(
    grads: Sequence[Tensor],
    resolver: Resolver,
    k: int,
    missing: tuple[int, ...],
    per: str,
    mask: Tensor | None,
    preserve_norm: bool,
    with_info: bool,
    backend: str,
) -> tuple[Tensor, Tensor | None]:
    contract.per_code(per)
    first = grads[0] if grads else None
    name = "cpu" if library.serves_cpu and backend == "auto" and isinstance(first, Tensor) and first.is_cpu else ""
    if not name or torch.compiler.is_compiling():  # else the compiled operator checks, and only what it refuses is looked at here
        contract.check(grads, per, mask, k)
        name = choose(grads[0].device, backend, k, "elementwise" if isinstance(resolver, ElementwiseRule) else "two_pass")
    first, functions = grads[0], functions_of(name)
    chain = resolver.chain()
    if chain is None:
        resolver.check(k)
        if isinstance(resolver, ElementwiseRule):
            return _elementwise(grads, resolver, k, missing, per, mask, preserve_norm, functions), None
        contract.check(grads, per, mask, k)
        return _with_forward(grads, resolver, k, missing, per, mask, preserve_norm, functions)
    problems = (first.shape[0],) if per == "sample" and first.dim() else ()
    bound = bind(chain, problems, k, first.device)
    with_gram = with_info or preserve_norm or chain[0].needs_gram or any(rule.needs_gram for rule in chain)
    try:
        return functions.resolve(grads, missing, mask, bound, per, preserve_norm, with_gram)
    except (RuntimeError, TypeError):
        contract.check(grads, per, mask, k)  # says what is wrong in words for people, where it knows
        raise


def _with_forward(
    grads: Sequence[Tensor],
    resolver: Resolver,
    k: int,
    missing: tuple[int, ...],
    per: str,
    mask: Tensor | None,
    preserve_norm: bool,
    functions: Any,
) -> tuple[Tensor, Tensor]:
    """A resolver that is no chain of built-in rules: its own code between the backend's two passes."""
    G = functions.gram(grads, missing, mask, per)
    rows = reference.problem_mask(mask, per)
    if missing:
        there = reference.pad_missing(torch.ones(len(grads), dtype=torch.bool, device=G.device), missing, k)
        rows = there if rows is None else rows & there
    rows = present_rows(G, rows)
    precision = precision_of(grads[0].dtype)
    w = call_resolver(resolver, G, rows, precision)
    if preserve_norm:
        norm = untold(G, rows, w, precision)
        w = w * measured(norm, *functions.lengths(grads, missing, mask, w.contiguous(), per)).unsqueeze(-1)
    w = w.contiguous()
    return functions.combine(grads, missing, mask, w, per), torch.cat([w, G.flatten(-2)], -1)


def _elementwise(
    grads: Sequence[Tensor],
    rule: ElementwiseRule,
    k: int,
    missing: tuple[int, ...],
    per: str,
    mask: Tensor | None,
    preserve_norm: bool,
    functions: Any,
) -> Tensor:
    if per != "batch":
        contract.check(grads, per, mask, k)
    if per == "sample" and rule.of_parameters:
        raise ValueError(
            f"per is 'sample', but {type(rule).__name__} resolves gradients of parameters, which have no samples; expected 'batch'"
        )
    if per == "sample":  # a sample that is all zero is missing, as it is where a Gramian tells
        found = torch.stack([(g != 0).reshape(g.shape[0], g.numel() // max(g.shape[0], 1)).any(1) for g in grads], 1)
        rows = reference.pad_missing(found, missing, k)
        mask = rows if mask is None else rows & mask
    try:
        out = rule.through(functions, grads, missing, mask)
    except (RuntimeError, TypeError):
        contract.check(grads, "batch", mask, k)
        raise
    return reference.with_norm(out, grads, missing, mask, per) if preserve_norm else out
