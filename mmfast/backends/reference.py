"""Every operator in plain torch: any device, any dtype, no host synchronisation. The tests' oracle and the fallback."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mmfast import contract
from mmfast.resolvers import solve
from mmfast.resolvers.chain import Bound
from mmfast.resolvers.elementwise import GradDrop, TrimmedMean
from mmfast.resolvers.norm import Norm, measured
from mmfast.resolvers.philox import advance


def why_not() -> None:
    """Plain torch runs everywhere."""


def wide(x: Tensor) -> torch.dtype:
    """What numbers of x are summed in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


_CHUNK = 4096  # elements whose products are rounded once, as sums of the kernels' are; chunks are summed in double
_AT_ONCE = 1 << 24  # elements that are held in double precision at once


def table(x: Tensor) -> Tensor:
    """A gradient as [B, M]; without a sample it still has its M."""
    batch = x.shape[0] if x.dim() else 1
    return x.reshape(batch, math.prod(x.shape[1:]))


def stacked(grads: Sequence[Tensor], mask: Tensor | None) -> Tensor:
    """Gradients [K, B, M] in accumulator precision, masked entries zero; mask is [K] or [B, K] over these gradients."""
    x = torch.stack([table(g) for g in grads])
    x = x.to(wide(grads[0]))
    if mask is None:
        return x
    return torch.where((mask.mT if mask.dim() == 2 else mask.unsqueeze(-1)).unsqueeze(-1), x, 0)


def select_present(x: Tensor, missing: Sequence[int], k: int) -> Tensor:
    """The columns [..., K - missing] of x [..., K]; taken one by one, as a list for an index would be copied from the host."""
    return torch.stack([x[..., i] for i in range(k) if i not in missing], -1) if missing else x


def mask_of_present(mask: Tensor | None, missing: Sequence[int], k: int) -> Tensor | None:
    """The mask's columns of the gradients that are there."""
    return None if mask is None else select_present(mask, missing, k)


def pad_missing(x: Tensor, missing: Sequence[int], k: int, dim: int = -1) -> Tensor:
    """x with zeros put in at the missing indices of a dimension."""
    if not missing:
        return x
    parts, zero = iter(x.unbind(dim)), torch.zeros_like(x.select(dim, 0))
    return torch.stack([zero if i in missing else next(parts) for i in range(k)], dim)


def problem_mask(mask: Tensor | None, per: str) -> Tensor | None:
    """The rows of each problem: one problem has a row that any of its samples has."""
    return mask if mask is None or mask.dim() == 1 or per == "sample" else mask.any(0)


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on where x is."""
    # torch.amp.is_autocast_available would say the same of meta; torch.compile cannot trace it in torch 2.10
    if x.is_cpu:  # asking for the name of a device takes longer than the rest
        return torch.is_autocast_enabled("cpu")
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def looks(x: Tensor) -> bool:
    """Whether numbers can be looked at as they come: no device is waited for, nothing traces, batches or stands in for a device (a dispatch mode)."""
    if torch.compiler.is_compiling():
        return False
    plain = x.is_cpu and type(x) is Tensor
    return plain and not torch._C._len_torch_dispatch_stack() and not torch._C._are_functorch_transforms_active()


def product(x: Tensor) -> Tensor:
    """x @ x.mT, rounded to x's dtype once: a product of float32 matrices is what autocast and torch's settings (TF32, bfloat16) leave of it."""
    wide = x.double()
    exact = wide @ wide.mT
    found, square, limits = exact.to(x.dtype).double(), exact.diagonal(dim1=-2, dim2=-1), torch.finfo(x.dtype)
    told = (square > x.shape[-1] * limits.tiny * limits.eps) | (square == 0)  # by the sum alone, that not all of a row's squares vanish
    if looks(exact) and bool(told.all()):
        return found
    vanished = (x.square() == 0).all(-1)  # in its own precision, as in the kernels: such a row is missing
    return found - torch.diag_embed(torch.where(vanished, found.diagonal(dim1=-2, dim2=-1), 0))


def _products(x: Tensor) -> Tensor:
    """x @ x.mT of [..., K, N] in float64, by chunks."""
    n = x.shape[-1]
    if not torch.compiler.is_compiling() and x.numel() > _AT_ONCE and n > _CHUNK:
        size = max(1, _AT_ONCE * n // x.numel() // _CHUNK) * _CHUNK
        return sum((_products(part) for part in x.split(size, -1)), start=x.new_zeros((), dtype=torch.float64))
    whole = n - n % _CHUNK
    chunks = x[..., :whole].unflatten(-1, (-1, _CHUNK)).movedim(-2, 0)
    return product(chunks).sum(0) + product(x[..., whole:])


def gram(grads: Sequence[Tensor], missing: Sequence[int], mask: Tensor | None, per: str) -> Tensor:
    """Gramian [K, K] (per="sample": [B, K, K]) float64, zero in the rows and columns of missing gradients; mask [K] or [B, K] over all K."""
    k = len(grads) + len(missing)
    x = stacked(grads, mask_of_present(mask, missing, k))
    if per == "sample":
        G = _products(x.movedim(1, 0))
    else:
        G = _products(x.double().sum(1).to(x.dtype) if per == "batch_sum" else x.flatten(1))
    return pad_missing(pad_missing(G, missing, k), missing, k, -2)


def _presence(grads: Sequence[Tensor], missing: Sequence[int], mask: Tensor | None, per: str) -> Tensor:
    """In place of the Gramian, for rules that do not look at it: 1 on the diagonal where a row has a non-zero element."""
    k = len(grads) + len(missing)
    x = stacked(grads, mask_of_present(mask, missing, k)) != 0
    rows = x.any(-1).mT if per == "sample" else x.flatten(1).any(-1)
    return torch.diag_embed(pad_missing(rows.double(), missing, k))


def combine(grads: Sequence[Tensor], missing: Sequence[int], mask: Tensor | None, w: Tensor, per: str) -> Tensor:
    """sum_i w_i g_i; w float64 [K] (per="sample": [B, K]) over all K."""
    k = len(grads) + len(missing)
    x, w = stacked(grads, mask_of_present(mask, missing, k)), select_present(w, missing, k)
    factors = (w.mT if per == "sample" else w.unsqueeze(-1)).unsqueeze(-1).to(x.dtype)
    total = factors[0] * x[0]
    for i in range(1, len(grads)):
        total = total + factors[i] * x[i]
    return total.to(grads[0].dtype).view(grads[0].shape)


def lengths(grads: Sequence[Tensor], missing: Sequence[int], mask: Tensor | None, w: Tensor, per: str) -> tuple[Tensor, Tensor]:
    """Squared lengths of the plain sum and of sum_i w_i g_i, float64 [] (per="sample": [B]), of the elements; per="batch_sum": of their batch sums."""
    k = len(grads) + len(missing)
    return squared(*sums(grads, mask_of_present(mask, missing, k), select_present(w, missing, k), per), per)


def sums(grads: Sequence[Tensor], mask: Tensor | None, w: Tensor, per: str) -> tuple[Tensor, Tensor]:
    """The plain sum and sum_i w_i g_i, float64 [B, M], or [1, M] for per="batch_sum"; mask and w over these gradients."""
    x = stacked(grads, mask)
    if per == "batch_sum":
        x = x.double().sum(1, keepdim=True)
    return _sums(x, w, per)


def squared(plain: Tensor, ours: Tensor, per: str) -> tuple[Tensor, Tensor]:
    """Squared lengths of `sums`, float64 [] or per sample [B]."""
    return (plain.square().sum(1), ours.square().sum(1)) if per == "sample" else (plain.square().sum(), ours.square().sum())


def _sums(x: Tensor, w: Tensor, per: str) -> tuple[Tensor, Tensor]:
    """The plain sum and sum_i w_i x_i of x [K, B, M] in double precision."""
    factors = (w.mT if per == "sample" else w.unsqueeze(-1)).unsqueeze(-1)
    plain = ours = torch.zeros_like(x[0], dtype=torch.float64)
    for factor, row in zip(factors, x, strict=True):
        plain, ours = plain + row.double(), ours + factor * row.double()
    return plain, ours


def graddrop(grads: Sequence[Tensor], missing: Sequence[int], mask: Tensor | None, rule: GradDrop) -> Tensor:
    """GradDrop; the random stream moves on by one call."""
    rng = rule.stream(grads[0].device)
    out = rule.combine(list(grads), mask_of_present(mask, missing, len(grads) + len(missing)), missing)
    contract.check_unmapped(out, rng)
    advance(rng)
    return out


def trimmed_mean(grads: Sequence[Tensor], missing: Sequence[int], mask: Tensor | None, rule: TrimmedMean) -> Tensor:
    """TrimmedMean."""
    return rule.combine(list(grads), mask_of_present(mask, missing, len(grads) + len(missing)))


def weights(G: Tensor, mask: Tensor | None, bound: Bound, preserve_norm: bool, precision: float) -> Tensor:
    """Weights [..., K]; states and random stream of the chain move on."""
    return solve.weights(G, mask, *bound, preserve_norm, precision)


def resolve(
    grads: Sequence[Tensor],
    missing: Sequence[int],
    mask: Tensor | None,
    bound: Bound,
    per: str,
    preserve_norm: bool,
    with_gram: bool,
) -> tuple[Tensor, Tensor]:
    """(result, weights | Gramian); states and random stream of the chain move on."""
    with_gram = with_gram or per == "batch_sum"  # there a row is missing when its batch sum is zero
    G = (gram if with_gram else _presence)(grads, missing, mask, per)
    w, norm = solve.weights_and_norm(G, problem_mask(mask, per), *bound, preserve_norm, solve.precision_of(grads[0].dtype))
    if norm is None:
        return combine(grads, missing, mask, w, per), torch.cat([w, G.flatten(-2)], -1)
    w = w * measured(norm, *lengths(grads, missing, mask, w, per)).unsqueeze(-1)
    return combine_with_norm(grads, missing, mask, w, norm, per), torch.cat([w, G.flatten(-2)], -1)


def combine_with_norm(grads: Sequence[Tensor], missing: Sequence[int], mask: Tensor | None, w: Tensor, norm: Norm, per: str) -> Tensor:
    """`combine`; in double precision where the norm had to be measured, for what is left of its summands is as small as their rounding."""
    k = len(grads) + len(missing)
    _, exact = _sums(stacked(grads, mask_of_present(mask, missing, k)), select_present(w, missing, k), per)
    settled = norm.settled.view(-1, *[1] * (grads[0].dim() - 1)) if per == "sample" else norm.settled
    return torch.where(settled, combine(grads, missing, mask, w, per), exact.to(grads[0].dtype).view(grads[0].shape))


def plain_sum(grads: Sequence[Tensor], missing: Sequence[int], mask: Tensor | None) -> Tensor:
    """Sum of the gradients [B, M] in accumulator precision."""
    return stacked(grads, mask_of_present(mask, missing, len(grads) + len(missing))).sum(0)


def with_norm(out: Tensor, grads: Sequence[Tensor], missing: Sequence[int], mask: Tensor | None, per: str) -> Tensor:
    """`out` scaled to the norm of the plain sum of the gradients, each sample to its own for per="sample"."""
    plain = plain_sum(grads, missing, mask).double()
    ours = out.reshape(plain.shape).double()
    wanted, have = (x.norm(dim=1, keepdim=True) if per == "sample" else x.norm() for x in (plain, ours))
    return (ours * norm_factor(wanted, have)).to(out.dtype).view(out.shape)


def norm_factor(wanted: Tensor, have: Tensor) -> Tensor:
    """What brings a length to another; nothing stays nothing, and what is not a number stays visible."""
    return torch.where(have > 0, wanted / have, torch.where(have.isnan(), have, 0))


_SAMPLES_AT_ONCE = 1 << 22  # elements of their products held at once


def _fold(deltas: Tensor, products: Tensor, members: Tensor, precision: float) -> Tensor:
    """The Gramian [..., K, K] from delta' delta [..., O, O] and W W' [O, O], both known to `precision`."""
    squares = deltas.diagonal(dim1=-2, dim2=-1)
    read = ((squares != 0).double() @ members @ members.mT) != 0  # the outputs of branches that send something
    parts = torch.where(read.unsqueeze(-1) & read.unsqueeze(-2), deltas * products, 0)
    G = members.mT @ parts @ members
    # where the parts of a branch's gradient cancel, rounding must make it neither missing nor negative
    floor = precision * (parts.diagonal(dim1=-2, dim2=-1).sqrt() @ members).square()
    return G + torch.diag_embed((floor - G.diagonal(dim1=-2, dim2=-1)).clamp_min(0))


def heads_gram(delta: Tensor, weight: Tensor, head_of: Tensor, k: int, per: str) -> Tensor:
    """Gramian [K, K] (per="sample": [B, K, K]) float64 of the gradients delta_i W_i of K linear branches, from delta' delta and W W'."""
    precision, outputs = solve.precision_of(delta.dtype), delta.shape[-1]
    accumulator = wide(delta)
    d, w = delta.to(accumulator), weight.to(accumulator)
    members = (head_of.unsqueeze(1) == torch.arange(k, device=delta.device)).double()
    products = product(w)
    if per == "sample":
        rows = d.flatten(1, -2) if d.dim() > 2 else d.unsqueeze(1)
        pieces = rows.split(max(1, _SAMPLES_AT_ONCE // (outputs * outputs)))
        return torch.cat([_fold(product(part.mT), products, members, precision) for part in pieces])
    rows = (d.sum(0) if per == "batch_sum" else d).reshape(-1, outputs)
    return _fold(product(rows.mT), products, members, precision)


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
    """Linear branches: (resolved gradient [..., H] of their input, weights | Gramian).

    delta [..., O] is the gradient of the branches' outputs, weight [O, H]; head_of [O] names the branch of each output, ascending.
    """
    delta = hide_branches(delta, head_of, mask)
    G = heads_gram(delta, weight, head_of, k, per)
    w, norm = solve.weights_and_norm(G, problem_mask(mask, per), *bound, preserve_norm, solve.precision_of(delta.dtype))
    if norm is not None:
        w = w * measured(norm, *heads_lengths(delta, weight, head_of, w, per)).unsqueeze(-1)
    return heads_combine(delta, weight, head_of, w, per), torch.cat([w, G.flatten(-2)], -1)


def hide_branches(delta: Tensor, head_of: Tensor, mask: Tensor | None) -> Tensor:
    """delta with zeros where the mask hides a branch: what a missing row or sample holds is not read, not even a NaN."""
    if mask is None:
        return delta
    columns = mask.index_select(-1, head_of)
    if mask.dim() == 2:
        columns = columns.view(mask.shape[0], *[1] * (delta.dim() - 2), head_of.shape[0])
    return torch.where(columns, delta, 0)


def heads_lengths(delta: Tensor, weight: Tensor, head_of: Tensor, w: Tensor, per: str) -> tuple[Tensor, Tensor]:
    """`lengths` of linear branches, from delta' delta and W W' in double precision."""
    G = heads_gram(delta.double(), weight.double(), head_of, w.shape[-1], per)
    return G.sum((-1, -2)).clamp(min=0), (w.unsqueeze(-2) @ G @ w.unsqueeze(-1)).squeeze(-1).squeeze(-1).clamp(min=0)


def heads_combine(delta: Tensor, weight: Tensor, head_of: Tensor, w: Tensor, per: str) -> Tensor:
    """[w_1 delta_1 ... w_K delta_K] W."""
    accumulator = wide(delta)
    scale = w.to(accumulator).index_select(-1, head_of)
    # of a branch that gets no weight nothing is read: one that sends nothing may have any weights
    if per == "sample":
        left = delta.to(accumulator) * scale.view(delta.shape[0], *[1] * (delta.dim() - 2), head_of.shape[0])
        right = torch.where((scale != 0).any(0).unsqueeze(1), weight, 0)
    else:
        left, right = delta, torch.where(scale.unsqueeze(1) != 0, weight.to(accumulator) * scale.unsqueeze(1), 0)
    product = accumulator if delta.dtype == torch.float16 else delta.dtype  # scaled rows could leave its range though their sum does not
    return (left.to(product) @ right.to(product)).to(delta.dtype)
