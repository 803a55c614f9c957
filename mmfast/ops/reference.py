"""Every operator in plain torch: any device, any dtype, no host synchronisation. The tests' oracle and the fallback."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mmfast.ops import contract
from mmfast.resolvers.base import Problem, Rule
from mmfast.resolvers.philox import Draw, advance

_EPS = torch.finfo(torch.float64).eps


def precision_of(dtype: torch.dtype) -> float:
    """Relative rounding of a Gramian of gradients of this dtype: float64's own, or that of the float32 it was summed in."""
    return _EPS if dtype == torch.float64 else torch.finfo(torch.float32).eps


def wide(x: Tensor) -> torch.dtype:
    """What numbers of x are summed in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _normalised(G: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    """(G / scale with identity rows where inactive, scale): scale is the power of four that brings the active trace into [1, 4)."""
    diagonal = G.diagonal(dim1=-2, dim2=-1)
    trace = torch.where(active, diagonal, 0).sum(-1)
    exponent = torch.frexp(trace).exponent - 1
    scale = torch.ldexp(torch.ones_like(trace), exponent - exponent % 2)
    pair = active.unsqueeze(-1) & active.unsqueeze(-2)
    identity = torch.eye(G.shape[-1], dtype=G.dtype, device=G.device)
    return torch.where(pair, G / scale.view(-1, 1, 1), identity), scale


def _norm_factor(G: Tensor, active: Tensor, w: Tensor, precision: float) -> Tensor:
    pair = active.unsqueeze(-1) & active.unsqueeze(-2)
    plain = torch.where(pair, G, 0).sum((-1, -2)).clamp(min=0)
    ours = torch.where(pair, G * w.unsqueeze(-1) * w.unsqueeze(-2), 0).sum((-1, -2))
    reach = torch.where(active, w.abs() * G.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt(), 0).sum(-1)
    floor = 16 * precision * reach.square()  # below it the length of d is rounding of G: not to be blown up
    return torch.where(reach > 0, (plain / torch.maximum(ours, floor)).sqrt(), 0)


def present(G: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Which rows of each problem are there [..., K] (neither masked nor all zero), and which problems are finite in those rows [...]."""
    diagonal = G.diagonal(dim1=-2, dim2=-1)
    rows = diagonal != 0 if mask is None else mask & (diagonal != 0)
    pair = rows.unsqueeze(-1) & rows.unsqueeze(-2)
    return rows, torch.where(pair, G, 0).isfinite().all(-1).all(-1)


def apply(A: Tensor, G: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    """The Gramian A G A' after a step that mapped the active rows, and the rows that are still active.

    A row of which only rounding errors are left is gone: a rule would take their direction for that of a gradient.
    """
    G_next = A @ G @ A.mT
    G_next = (G_next + G_next.mT) / 2
    reach = (A.abs() @ G.diagonal(dim1=-2, dim2=-1).sqrt().unsqueeze(-1)).squeeze(-1)
    active = active & ~(G_next.diagonal(dim1=-2, dim2=-1) <= 1e-14 * reach.square())
    return torch.where(active.unsqueeze(-1) & active.unsqueeze(-2), G_next, 0), active


def row_map(
    G: Tensor,
    mask: Tensor | None,
    chain: list[Rule],
    states: list[Tensor | None],
    rng: Tensor | None,
    precision: float = _EPS,
) -> tuple[Tensor, list[Tensor | None]]:
    """What a chain does to the rows, A [B, K, K] (row i becomes sum_j A[i, j] g_j, the weights are the column sums), and the next states.

    Zero in the rows and columns of missing gradients, and in problems that are not finite; these keep their state.
    """
    rows, finite = present(G, mask)
    active = rows & finite.unsqueeze(-1)
    current = torch.where(active.unsqueeze(-1) & active.unsqueeze(-2), G, 0)
    total: Tensor | None = None  # row map of the steps so far
    w = torch.zeros_like(G[..., 0])
    next_states: list[Tensor | None] = []
    for s, rule in enumerate(chain):
        scaled, scale = _normalised(current, active)
        draw = Draw(rng, G.shape[0], s) if rule.random and rng is not None else None
        p = Problem(scaled, active, scale, states[s], draw, precision)
        if rule.smooths:
            w = torch.where(active, rule.smooth(p, w), 0)  # type: ignore[operator]
            A = torch.diag_embed(w)
        elif rule.maps_rows:
            A = torch.where(active.unsqueeze(-1) & active.unsqueeze(-2), rule.rows(p), 0)
            w = A.sum(-2)
        else:
            w = torch.where(active, rule.rule(p), 0)
            A = torch.diag_embed(w)
        state = states[s]
        if state is not None and p.next_state is not None:
            state = torch.where((finite & active.any(-1)).unsqueeze(-1), p.next_state, state)
        next_states.append(state)
        if s + 1 < len(chain) and chain[s + 1].smooths:
            continue
        total = A if total is None else A @ total
        current, active = apply(A, torch.where(active.unsqueeze(-1) & active.unsqueeze(-2), scaled, 0), active)
        current = current * scale.view(-1, 1, 1)
    assert total is not None
    return total, next_states


def solve(
    G: Tensor,
    mask: Tensor | None,
    chain: list[Rule],
    states: list[Tensor | None],
    rng: Tensor | None,
    preserve_norm: bool,
    precision: float = _EPS,
) -> tuple[Tensor, list[Tensor | None]]:
    """Weights [B, K] of the Gramians G [B, K, K] float64, and the next state of each rule of the chain.

    mask is bool [B, K] or None. A missing row (masked, or all zero) is left out and gets weight 0; a problem with a
    non-finite number gets NaN weights and keeps its state.
    """
    rows, finite = present(G, mask)
    A, next_states = row_map(G, mask, chain, states, rng, precision)
    w = A.sum(-2)
    if preserve_norm:
        active = rows & finite.unsqueeze(-1)
        scaled, _ = _normalised(torch.where(active.unsqueeze(-1) & active.unsqueeze(-2), G, 0), active)
        w = w * _norm_factor(scaled, active, w, precision).unsqueeze(-1)
    nan = torch.where(rows, torch.nan, 0.0).to(G.dtype)
    return torch.where(finite.unsqueeze(-1), w, nan), next_states


_CHUNK = 4096  # elements whose products are summed in single precision; chunks are summed in double


def _present(grads: Sequence[Tensor], mask: Tensor | None) -> Tensor:
    """Gradients [K, B, M] in accumulator precision, masked entries zero; mask is [K] or [B, K] over these gradients."""
    first = grads[0]
    batch = first.shape[0] if first.dim() else 1
    x = torch.stack([g.reshape(batch, first.numel() // max(batch, 1)) for g in grads])
    x = x.to(wide(first))
    if mask is None:
        return x
    return torch.where((mask.mT if mask.dim() == 2 else mask.unsqueeze(-1)).unsqueeze(-1), x, 0)


def problem_mask(mask: Tensor | None, per: str) -> Tensor | None:
    """The rows of each problem: one problem has a row that any of its samples has."""
    return mask if mask is None or mask.dim() == 1 or per == "sample" else mask.any(0)


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on where x is."""
    return torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in their own precision: a Gramian that autocast has rounded is none."""
    if not autocasts(a):
        return a @ b
    with torch.autocast(a.device.type, enabled=False):
        return a @ b


def _products(x: Tensor) -> Tensor:
    """x @ x.mT of [..., K, N] in float64, by chunks."""
    n = x.shape[-1]
    whole = n - n % _CHUNK
    chunks = x[..., :whole].unflatten(-1, (-1, _CHUNK)).movedim(-2, 0)
    rest = x[..., whole:]
    return _product(chunks, chunks.mT).double().sum(0) + _product(rest, rest.mT).double()


def gram(grads: Sequence[Tensor], mask: Tensor | None, per: str) -> Tensor:
    """Gramian [K, K] (per="sample": [B, K, K]) float64 of K gradients; mask [K] or [B, K] bool or None."""
    x = _present(grads, mask)
    if per == "sample":
        return _products(x.movedim(1, 0))
    return _products(x.double().sum(1).to(x.dtype) if per == "batch_sum" else x.flatten(1))


_PIECE = 1 << 22  # elements of per-sample products held at once


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
    precision, outputs = precision_of(delta.dtype), delta.shape[-1]
    accumulator = wide(delta)
    d, w = delta.to(accumulator), weight.to(accumulator)
    members = (head_of.unsqueeze(1) == torch.arange(k, device=delta.device)).double()
    products = _product(w, w.mT).double()
    if per == "sample":
        rows = d.flatten(1, -2) if d.dim() > 2 else d.unsqueeze(1)
        pieces = rows.split(max(1, _PIECE // (outputs * outputs)))
        return torch.cat([_fold(_product(part.mT, part).double(), products, members, precision) for part in pieces])
    rows = (d.sum(0) if per == "batch_sum" else d).reshape(-1, outputs)
    return _fold(_product(rows.mT, rows).double(), products, members, precision)


def heads(
    delta: Tensor,
    weight: Tensor,
    head_of: Tensor,
    mask: Tensor | None,
    k: int,
    per: str,
    solve: Callable[[Tensor, Tensor | None, float], Tensor],
) -> tuple[Tensor, Tensor]:
    """Linear branches: (resolved gradient [..., H] of their input, weights | Gramian); `solve` maps Gramian, mask and precision to weights.

    delta [..., O] is the gradient of the branches' outputs, weight [O, H]; head_of [O] names the branch of each output, ascending.
    """
    if mask is not None:  # what a missing row or sample holds is not read, not even a NaN
        columns = mask.index_select(-1, head_of)
        if mask.dim() == 2:
            columns = columns.view(mask.shape[0], *[1] * (delta.dim() - 2), head_of.shape[0])
        delta = torch.where(columns, delta, 0)
    G = heads_gram(delta, weight, head_of, k, per)
    w = solve(G, problem_mask(mask, per), precision_of(delta.dtype))
    accumulator = wide(delta)
    scale = w.to(accumulator).index_select(-1, head_of)
    # of a branch that gets no weight nothing is read: one that sends nothing may have any weights
    if per == "sample":
        left = delta.to(accumulator) * scale.view(delta.shape[0], *[1] * (delta.dim() - 2), head_of.shape[0])
        right = torch.where((scale != 0).any(0).unsqueeze(1), weight, 0)
    else:
        left, right = delta, torch.where(scale.unsqueeze(1) != 0, weight.to(accumulator) * scale.unsqueeze(1), 0)
    product = accumulator if delta.dtype == torch.float16 else delta.dtype  # scaled rows could leave its range though their sum does not
    return (left.to(product) @ right.to(product)).to(delta.dtype), torch.cat([w, G.flatten(-2)], -1)


def combine(grads: Sequence[Tensor], mask: Tensor | None, w: Tensor, per: str) -> Tensor:
    """sum_i w_i g_i; w float64 [K] (per="sample": [B, K])."""
    x = _present(grads, mask)
    weights = (w.mT if per == "sample" else w.unsqueeze(-1)).unsqueeze(-1).to(x.dtype)
    total = weights[0] * x[0]
    for i in range(1, len(grads)):
        total = total + weights[i] * x[i]
    return total.to(grads[0].dtype).view(grads[0].shape)


def kept(x: Tensor, missing: Sequence[int], k: int) -> Tensor:
    """The columns [..., K - missing] of x [..., K]; taken one by one, as a list for an index would be copied from the host."""
    return torch.stack([x[..., i] for i in range(k) if i not in missing], -1) if missing else x


def padded(x: Tensor, missing: Sequence[int], k: int, dim: int = -1) -> Tensor:
    """x with zeros put in at the missing places of a dimension."""
    if not missing:
        return x
    parts, zero = iter(x.unbind(dim)), torch.zeros_like(x.select(dim, 0))
    return torch.stack([zero if i in missing else next(parts) for i in range(k)], dim)


def spread(G: Tensor, missing: Sequence[int], k: int) -> Tensor:
    """G of the gradients that are there, with zero rows and columns put in at the missing places."""
    return padded(padded(G, missing, k), missing, k, -2)


def keep(states: Sequence[Tensor | None], after: Sequence[Tensor | None], rng: Tensor | None) -> None:
    """Writes the next states of a chain over its states, and moves its random stream on by one call."""
    for state, next_state in zip(states, after, strict=True):
        if state is not None and next_state is not None:
            state.copy_(next_state.detach())
    if rng is not None:
        advance(rng)


def weights(
    G: Tensor,
    mask: Tensor | None,
    chain: list[Rule],
    states: list[Tensor | None],
    rng: Tensor | None,
    preserve_norm: bool,
    precision: float = _EPS,
) -> Tensor:
    """Weights [..., K] of Gramians [..., K, K]; the states of the chain and its random stream advance in place."""
    contract.check_unmapped(G, rng, *states)
    problems, k = G.shape[:-2], G.shape[-1]
    flat_mask = None if mask is None else mask.expand(*problems, k).reshape(-1, k)
    flat_states = [None if s is None else s.view(problems.numel(), s.shape[-1]) for s in states]
    w, after = solve(G.reshape(-1, k, k), flat_mask, chain, flat_states, rng, preserve_norm, precision)
    keep(flat_states, after, rng)
    return w.view(*problems, k)


def preserve_norm(G: Tensor, mask: Tensor | None, w: Tensor, precision: float) -> Tensor:
    """w scaled so that sum_i w_i g_i has the norm of the plain sum over the rows that are there."""
    diagonal = G.diagonal(dim1=-2, dim2=-1)
    active = diagonal != 0 if mask is None else mask & (diagonal != 0)
    return w * _norm_factor(G, active, w, precision).unsqueeze(-1)


def with_norm(out: Tensor, grads: Sequence[Tensor], mask: Tensor | None, per: str) -> Tensor:
    """`out` scaled to the norm of the plain sum of the gradients, each sample to its own for per="sample"."""
    plain = _present(grads, mask).sum(0).double()
    ours = out.reshape(plain.shape).double()
    wanted, have = (x.norm(dim=1, keepdim=True) if per == "sample" else x.norm() for x in (plain, ours))
    return (ours * torch.where(have > 0, wanted / have, torch.where(have.isnan(), have, 0))).to(out.dtype).view(out.shape)


def resolve(
    grads: Sequence[Tensor],
    missing: Sequence[int],
    mask: Tensor | None,
    chain: list[Rule],
    states: list[Tensor | None],
    rng: Tensor | None,
    per: str,
    norm: bool,
    with_gram: bool,
) -> tuple[Tensor, Tensor]:
    """The compiled `resolve` in plain torch: (result, weights | Gramian)."""
    k = len(grads) + len(missing)
    present = None if mask is None else kept(mask, missing, k)
    if with_gram or per == "batch_sum":  # there a row is missing when its batch sum is zero
        G = gram(grads, present, per)
    else:
        x = _present(grads, present) != 0
        G = torch.diag_embed(x.any(-1).mT if per == "sample" else x.flatten(1).any(-1)).double()
    G = spread(G, missing, k)
    w = weights(G, problem_mask(mask, per), chain, states, rng, norm, precision_of(grads[0].dtype))
    return combine(grads, present, kept(w, missing, k), per), torch.cat([w, G.flatten(-2)], -1)
