"""Gradients of several tensors at once: each is a list, all of them one problem with one Gramian over the whole list.

Nothing is flattened or copied: the Gramian is the sum of those of the single tensors, and the weights combine each tensor by itself; on the CPU by kernels
that pass over all tensors at once. Only elementwise rules, which have no Gramian, get each gradient as one tensor.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmfast import contract
from mmfast.backends import reference
from mmfast.backends.choice import choose, functions_of
from mmfast.resolvers.base import Resolver, call_resolver
from mmfast.resolvers.chain import Bound, bind
from mmfast.resolvers.norm import measured, shifted, told
from mmfast.resolvers.solve import norm_of, precision_of, present_rows, untold


@dataclass(frozen=True)
class Column:
    """What the K gradients hold for one tensor: those that are there, and the indices of the others."""

    grads: list[Tensor]  # dense and real
    missing: tuple[int, ...]
    complex: bool

    @property
    def rows(self) -> list[int]:
        """The places of those that are there among K."""
        places = range(len(self.grads) + len(self.missing))
        return [i for i in places if i not in self.missing] if self.missing else list(places)

    @property
    def like(self) -> Tensor:
        return self.grads[0]

    def result(self, x: Tensor) -> Tensor:
        """x as the gradients came."""
        return torch.view_as_complex(x) if self.complex else x


def is_lists(grads: Any) -> bool:
    """Whether the gradients are lists of tensors: what the first that is there is."""
    if not isinstance(grads, (list, tuple)):
        return False
    return isinstance(next((g for g in grads if g is not None), None), (list, tuple))


def used_tensors(table: Sequence[Sequence[Tensor | None] | None]) -> tuple[list[int], list[list[Tensor | None] | None]]:
    """Which tensors any of K lists has, and the lists of those alone, None where one has none of them."""
    size = max([0, *[len(row) for row in table if row is not None]])
    used = [t for t in range(size) if any(row is not None and row[t] is not None for row in table)]
    return used, [None if row is None or all(row[t] is None for t in used) else [row[t] for t in used] for row in table]


def columns_of(grads: Sequence[Sequence[Tensor | None] | None], per: str, mask: Tensor | None) -> list[Column]:
    """One column for each tensor; raises where the lists do not fit together."""
    k = len(grads)
    contract.check_count(k)
    for i, g in enumerate(grads):
        if g is not None and not isinstance(g, (list, tuple)):
            raise TypeError(f"grads[{i}] is a {type(g).__name__}, expected a list of tensors as the first gradient is, or None")
    there = [g for g in grads if g is not None]
    if not there:
        raise ValueError(f"all {k} gradients are missing")
    size = len(there[0])
    for i, g in enumerate(grads):
        if g is not None and len(g) != size:
            raise ValueError(f"grads[{i}] has {len(g)} tensors, expected {size} as the first gradient has")
    if not size:
        raise ValueError("grads holds lists without tensors, expected at least one in each")
    found = []
    for t in range(size):
        entries = [None if g is None else g[t] for g in grads]
        tensors = [x for x in entries if x is not None]
        if not tensors:
            raise ValueError(f"tensor {t} is None in every gradient, expected it in one at least; leave it out of the lists")
        try:
            dense = contract.ordinary(tensors, per, mask, k) or tensors
            contract.check(dense, per, mask, k)
        except (ValueError, TypeError) as error:
            raise type(error)(f"tensor {t} of the lists: {error}") from None
        found.append(Column(dense, tuple(i for i, x in enumerate(entries) if x is None), tensors[0].is_complex()))
    first = found[0].like
    for t, column in enumerate(found):
        if column.like.device != first.device:
            raise ValueError(f"tensor {t} of the lists is on {column.like.device}, expected {first.device} like the first")
        if per == "sample" and column.like.shape[0] != first.shape[0]:
            raise ValueError(f"tensor {t} of the lists has {column.like.shape[0]} samples, expected {first.shape[0]} like the first")
    return found


def gram(columns: Sequence[Column], k: int, per: str, mask: Tensor | None, backend: str) -> Tensor:
    """Float64 [K, K], or [B, K, K] per sample: the sum over the tensors."""
    functions = functions_of(choose(columns[0].like.device, backend, k), k)
    if _in_one_pass(columns, functions, per, mask):
        return functions.gram_lists([c.grads for c in columns], [c.rows for c in columns], k)
    parts = [functions.gram(c.grads, c.missing, mask, per) for c in columns]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def combine(columns: Sequence[Column], k: int, w: Tensor, per: str, backend: str) -> list[Tensor]:
    """sum_i w_i g_i of each tensor."""
    functions = functions_of(choose(columns[0].like.device, backend, k), k)
    return combined(columns, functions, None, w, per)


def combined(columns: Sequence[Column], functions: Any, mask: Tensor | None, w: Tensor, per: str) -> list[Tensor]:
    """The same by the functions of a backend."""
    if _in_one_pass(columns, functions, per, mask):
        out = functions.combine_lists([c.grads for c in columns], [c.rows for c in columns], w)
    else:
        out = [functions.combine(c.grads, c.missing, mask, w, per) for c in columns]
    return [c.result(x) for c, x in zip(columns, out, strict=True)]


def _in_one_pass(columns: Sequence[Column], functions: Any, per: str, mask: Tensor | None) -> bool:
    """Whether the backend goes over all tensors in one call: many are small, and each call costs what thousands of elements do."""
    one_problem = per == "batch" and mask is None and hasattr(functions, "gram_lists")
    plain = one_problem and not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active()
    return plain and all(type(g) in (Tensor, torch.nn.Parameter) for c in columns for g in c.grads)


def resolve(
    columns: Sequence[Column], k: int, resolver: Resolver, per: str, mask: Tensor | None, preserve_norm: bool, backend: str
) -> tuple[list[Tensor], Tensor]:
    """(a result for each tensor, weights | Gramian as of `resolve_info`) of one problem over all of them."""
    device = columns[0].like.device
    resolver.check(k)
    functions = functions_of(choose(device, backend, k), k)
    precision = max(precision_of(c.like.dtype) for c in columns)
    G = gram(columns, k, per, mask, backend)
    rows = present_rows(G, reference.problem_mask(mask, per))
    looks = reference.looks(G)
    problems = (columns[0].like.shape[0],) if per == "sample" else ()
    w, norm = solve(G, rows, resolver, functions, precision, preserve_norm, problems, k, looks)
    if norm is not None:
        plain, ours = lengths(columns, functions, mask, w, per).unbind(0)
        w = (w * measured(norm, plain, ours).unsqueeze(-1)).contiguous()
        if looks and not bool(norm.settled.all()):
            # what is left of the summands is as small as their rounding
            exact = [reference.combine_with_norm(c.grads, c.missing, mask, w, norm, per) for c in columns]
            return [c.result(x) for c, x in zip(columns, exact, strict=True)], torch.cat([w, G.flatten(-2)], -1)
    return combined(columns, functions, mask, w, per), torch.cat([w, G.flatten(-2)], -1)


def lengths(columns: Sequence[Column], functions: Any, mask: Tensor | None, w: Tensor, per: str) -> Tensor:
    """Squared lengths of the plain sum and of sum_i w_i g_i over all tensors, float64 [2] or [2, B]."""
    return torch.stack([torch.stack(functions.lengths(c.grads, c.missing, mask, w, per)) for c in columns]).sum(0)


def solve(
    G: Tensor,
    rows: Tensor,
    resolver: Resolver,
    functions: Any,
    precision: float,
    preserve_norm: bool,
    problems: tuple[int, ...],
    k: int,
    looks: bool = False,
) -> tuple[Tensor, Any]:
    """(weights, what the Gramian says of the norm); norm None where it is not asked for, or kept already: where it `looks` at numbers, which a GPU would be waited for,
    and the Gramian tells the lengths, no element is read for them."""
    chain = resolver.chain()
    if chain is None:
        w = call_resolver(resolver, G, rows, precision).contiguous()
        return w, untold(G, rows, w, precision) if preserve_norm else None
    bound = bind(chain, problems, k, G.device)
    rows = rows.contiguous()
    if not preserve_norm:
        return functions.weights(G, rows, bound, False, precision), None
    before = _copied(bound)
    if looks:
        w = functions.weights(G, rows, bound, True, precision)
        if bool(told(G, rows, w, precision).all()):
            return w, None
        bound = _copied(before)
    moved = functions.weights(shifted(G, precision).contiguous(), rows, before, False, precision)
    w = functions.weights(G, rows, bound, False, precision)
    flat_rows, shape = rows.reshape(-1, k), w.shape[:-1]
    norm = norm_of(G.reshape(-1, k, k), flat_rows, w.reshape(-1, k), moved.reshape(-1, k), precision)
    return w, type(norm)(*(x.reshape(shape) for x in norm))


def _copied(bound: Bound) -> Bound:
    return Bound(bound.chain, [None if s is None else s.clone() for s in bound.states], None if bound.rng is None else bound.rng.clone())


def joined(columns: Sequence[Column], k: int, per: str) -> list[Tensor | None]:
    """Each gradient as one tensor [n], or [B, n], with zeros for what it has not: for rules that look at elements, and at whether a gradient has any."""
    rows: list[list[Tensor]] = [[] for _ in range(k)]
    for c in columns:
        there = iter(c.grads)
        for i, row in enumerate(rows):
            row.append(_flat(torch.zeros_like(c.like) if i in c.missing else next(there), per))
    absent = [all(i in c.missing for c in columns) for i in range(k)]
    return [None if gone else torch.cat(row, -1) for gone, row in zip(absent, rows, strict=True)]


def _flat(x: Tensor, per: str) -> Tensor:
    kept = 0 if per == "batch" else 1
    return x.flatten(kept) if x.dim() > kept else x.unsqueeze(-1)


def split(out: Tensor, columns: Sequence[Column], per: str) -> list[Tensor]:
    """The result for each tensor from one for `joined` gradients."""
    sizes = [_flat(c.like, per).shape[-1] for c in columns]
    return [c.result(x.reshape(c.like.shape).to(c.like.dtype)) for c, x in zip(columns, out.split(sizes, -1), strict=True)]
