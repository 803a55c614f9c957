"""The operators through Triton's kernels, for at most 64 gradients, with the functions of every backend."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mmfast import contract
from mmfast.backends import reference
from mmfast.backends.triton import combine as combines
from mmfast.backends.triton import elementwise
from mmfast.backends.triton import gram as grams
from mmfast.backends.triton import lengths as measures
from mmfast.backends.triton import solve as solvers
from mmfast.backends.triton.rows import INTERPRETED, rows_of
from mmfast.resolvers.base import numbers
from mmfast.resolvers.chain import Bound
from mmfast.resolvers.elementwise import GradDrop, TrimmedMean
from mmfast.resolvers.norm import Norm, measured
from mmfast.resolvers.philox import advance
from mmfast.resolvers.solve import norm_of, precision_of, weights_and_norm

SAMPLE, BATCH_SUM = contract.PER["sample"], contract.PER["batch_sum"]
DEVICES = ("cpu",) if INTERPRETED else ("cuda", "xpu")  # of the tensors that the kernels take


def why_not() -> str | None:
    """Why the kernels can't run here, or None when they can."""
    if INTERPRETED or torch.cuda.is_available() or torch.xpu.is_available():
        return None
    return f"torch {torch.__version__} sees no GPU; with TRITON_INTERPRET=1 in the environment Triton interprets its kernels on the CPU"


def _gram(grads: list[Tensor], missing: list[int], mask: Tensor | None, per: int) -> Tensor:
    rows = rows_of(grads, missing)
    if per == BATCH_SUM:
        return grams.gram(rows_of(list(grams.batch_sums(rows, mask).unbind(0))), None, False)
    return grams.gram(rows, mask, per == SAMPLE)


def _presence(grads: list[Tensor], missing: list[int], mask: Tensor | None, per: int) -> Tensor:
    return torch.diag_embed(elementwise.presence(rows_of(grads, missing), mask, per == SAMPLE))


def _combine(grads: list[Tensor], missing: list[int], mask: Tensor | None, w: Tensor, per: int, skip: bool) -> Tensor:
    return combines.combine(rows_of(grads, missing), mask, w.resolve_neg().contiguous(), per == SAMPLE, skip)


def _combine_with_norm(
    grads: list[Tensor], missing: list[int], mask: Tensor | None, w: Tensor, norms: Tensor, per: int
) -> tuple[Tensor, Tensor]:
    rows, w = rows_of(grads, missing), w.contiguous()
    out, scaled = combines.combine_with_norm(rows, mask, w, per == SAMPLE, measures.measure(rows, mask, w, per, norms.contiguous()))
    return out, scaled.clone() if scaled is w else scaled  # an operator must not return its argument


def _lengths(grads: list[Tensor], missing: list[int], mask: Tensor | None, w: Tensor, per: int) -> Tensor:
    return measures.lengths(rows_of(grads, missing), mask, w.resolve_neg().contiguous(), per)


def _graddrop(grads: list[Tensor], missing: list[int], mask: Tensor | None, leak: list[float], rng: Tensor) -> Tensor:
    shares = numbers(grads[0].new_empty(0, dtype=torch.float64), leak)  # as arguments they would be rounded to float32
    return elementwise.graddrop(rows_of(grads, missing), mask, shares, rng)


def _trimmed_mean(grads: list[Tensor], missing: list[int], mask: Tensor | None, trim: int) -> Tensor:
    return elementwise.trimmed_mean(rows_of(grads, missing), mask, trim)


def _squares(grads: list[Tensor], missing: list[int], mask: Tensor | None, per: int) -> Tensor:
    k = len(grads) + len(missing)
    return grads[0].new_empty((*grads[0].shape[: per == SAMPLE], k, k), dtype=torch.float64)


def _like_one(grads: list[Tensor], *rest: object) -> Tensor:
    return grads[0].new_empty(grads[0].shape)


def _like_one_and_weights(grads: list[Tensor], missing: list[int], mask: Tensor | None, w: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    return grads[0].new_empty(grads[0].shape), w.new_empty(w.shape)


def _two(grads: list[Tensor], missing: list[int], mask: Tensor | None, w: Tensor, per: int) -> Tensor:
    return w.new_empty((*w.shape[:-1], 2))


# torch.compile can't follow a launch that reads addresses: it sees these, plain calls go past the dispatcher
_OPERATORS = {}
for _function, _fake in (
    (_gram, _squares),
    (_presence, _squares),
    (_combine, _like_one),
    (_combine_with_norm, _like_one_and_weights),
    (_lengths, _two),
    (_graddrop, _like_one),
    (_trimmed_mean, _like_one),
):
    _OPERATORS[_function] = torch.library.custom_op(f"mmfast::triton{_function.__name__}", _function, mutates_args=())
    _OPERATORS[_function].register_fake(_fake)


def _plain(grads: Sequence[Tensor]) -> bool:
    return not torch.compiler.is_compiling() and all(type(g) in (Tensor, torch.nn.Parameter) for g in grads)


def _call(function, grads: Sequence[Tensor], missing: Sequence[int], *rest):
    return (function if _plain(grads) else _OPERATORS[function])(list(grads), list(missing), *rest)


def gram(grads: Sequence[Tensor], missing: Sequence[int], mask: Tensor | None, per: str) -> Tensor:
    """Gramian float64 [K, K], or [B, K, K] per sample, zero in the rows and columns of missing gradients; mask [K] or [B, K] over all K."""
    return _call(_gram, grads, missing, mask, contract.PER[per])


def combine(grads: Sequence[Tensor], missing: Sequence[int], mask: Tensor | None, w: Tensor, per: str, skip: bool = False) -> Tensor:
    """sum_i w_i g_i; w float64 [K], or [B, K] per sample, over all K; rows of weight zero are not read where `skip`."""
    return _call(_combine, grads, missing, mask, w, contract.PER[per], skip)


def lengths(grads: Sequence[Tensor], missing: Sequence[int], mask: Tensor | None, w: Tensor, per: str) -> tuple[Tensor, Tensor]:
    """Squared lengths of the plain sum and of sum_i w_i g_i, float64 [] (per="sample": [B]), of the elements; per="batch_sum": of their batch sums."""
    found = _call(_lengths, grads, missing, mask, w, contract.PER[per])
    return found[..., 0], found[..., 1]


def graddrop(grads: Sequence[Tensor], missing: Sequence[int], mask: Tensor | None, rule: GradDrop) -> Tensor:
    """GradDrop; the random stream moves on by one call."""
    rng = rule.stream(grads[0].device)
    out = _call(_graddrop, grads, missing, mask, rule.leaks, rng)
    advance(rng)
    return out


def trimmed_mean(grads: Sequence[Tensor], missing: Sequence[int], mask: Tensor | None, rule: TrimmedMean) -> Tensor:
    """TrimmedMean."""
    return _call(_trimmed_mean, grads, missing, mask, rule.trim)


has_solver = solvers.has_kernel


def weights(
    G: Tensor,
    mask: Tensor | None,
    bound: Bound,
    preserve_norm: bool,
    precision: float,
) -> Tensor:
    """Weights [..., K]; the states of the chain and its random stream advance in place. In one launch where the chain has a kernel."""
    plain = not torch.compiler.is_compiling() and type(G) is Tensor and not G.is_neg()  # torch.compile makes few launches of the reference
    w = solvers.solve(G, mask, *bound, preserve_norm, precision) if plain else None
    return reference.weights(G, mask, bound, preserve_norm, precision) if w is None else w


def resolve(
    grads: Sequence[Tensor],
    missing: Sequence[int],
    mask: Tensor | None,
    bound: Bound,
    per: str,
    preserve_norm: bool,
    with_gram: bool,
) -> tuple[Tensor, Tensor]:
    """(result, weights | Gramian), as `reference.resolve`: the gradients are read once for the Gramian and once for the sum."""
    code = contract.PER[per]
    with_gram = with_gram or code == BATCH_SUM  # there a row is missing when its batch sum is zero
    G = _call(_gram if with_gram else _presence, grads, missing, mask, code)
    rows, precision = reference.problem_mask(mask, per), precision_of(grads[0].dtype)
    if preserve_norm:
        out, w = _with_norm(grads, missing, mask, bound, code, G, rows, precision)
    else:
        w = weights(G, rows, bound, False, precision)
        out = _call(_combine, grads, missing, mask, w, code, with_gram)
    return out, torch.cat([w, G.flatten(-2)], -1)


def _with_norm(
    grads: Sequence[Tensor],
    missing: Sequence[int],
    mask: Tensor | None,
    bound: Bound,
    per: int,
    G: Tensor,
    rows: Tensor | None,
    precision: float,
) -> tuple[Tensor, Tensor]:
    """(result, weights) with the norm of the plain sum, of the gradients with Gramian G and the rows that a mask leaves in it."""
    both = solvers.solve_twice(G, rows, *bound, precision) if _plain([*grads, G]) else None
    if both is None:
        w, norm = weights_and_norm(G, rows, *bound, True, precision)
        assert norm is not None
        norms = torch.stack([norm.factor, norm.settled.double(), norm.noise], -1)
        return _call(_combine_with_norm, grads, missing, mask, w, norms, per)
    held = rows_of(grads, missing)
    return combines.combine_with_norm(held, mask, both[0], per == SAMPLE, measures.measure_by_gramian(held, mask, G, both, per, precision))


def _weights_and_norm(G: Tensor, rows: Tensor | None, bound: Bound, precision: float) -> tuple[Tensor, Norm]:
    """`solve.weights_and_norm` for a norm that is to be preserved, its weights by the kernel where the chain has one."""
    both = solvers.solve_twice(G, rows, *bound, precision) if _plain([G]) else None
    if both is None:
        w, norm = weights_and_norm(G, rows, *bound, True, precision)
        assert norm is not None
        return w, norm
    k = G.shape[-1]
    norm = norm_of(G.view(-1, k, k), rows, both[0].view(-1, k), both[-1].view(-1, k), precision)
    return both[0], Norm(*(x.view(G.shape[:-2]) for x in norm))


def heads(
    delta: Tensor,
    weight: Tensor,
    head_of: Tensor,
    mask: Tensor | None,
    bound: Bound,
    k: int,
    per: str,
    preserve_norm: bool,
) -> tuple[Tensor, Tensor]:
    """As `reference.heads`: its matrix products are torch's own."""
    delta = reference.hide_branches(delta, head_of, mask)
    G = reference.heads_gram(delta, weight, head_of, k, per)
    rows, precision = reference.problem_mask(mask, per), precision_of(delta.dtype)
    if preserve_norm:
        w, norm = _weights_and_norm(G, rows, bound, precision)
        w = w * measured(norm, *reference.heads_lengths(delta, weight, head_of, w, per)).unsqueeze(-1)
    else:
        w = weights(G, rows, bound, False, precision)
    return reference.heads_combine(delta, weight, head_of, w, per), torch.cat([w, G.flatten(-2)], -1)
