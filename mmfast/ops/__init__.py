"""The operators: gram, weights, combine and resolve. No autograd here; the block is what joins them to it."""

from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any, cast

import torch
from torch import Tensor

from mmfast.ops import contract, direct, native, reference
from mmfast.ops.choice import backends as backends
from mmfast.ops.choice import kernels_of, serving
from mmfast.resolvers.base import Resolver, Rule
from mmfast.resolvers.elementwise import ElementwiseRule


def _restrict(mask: Tensor | None, missing: Sequence[int], k: int) -> Tensor | None:
    """The mask's columns of the gradients that are there."""
    return None if mask is None else reference.kept(mask, missing, k)


def gram(grads: Sequence[Tensor], per: str = "batch", *, mask: Tensor | None = None, backend: str = "auto") -> Tensor:
    """Inner products of all pairs of gradients: the only pass that reads all data.

    Args:
        grads: 1 to 256 tensors of one shape, dtype (float16, bfloat16, float32, float64) and device; any strides.
        per: "batch" takes each gradient as one vector; "sample" one Gramian per entry of the leading dimension;
            "batch_sum" the Gramian of the gradients summed over the leading dimension.
        mask: bool [K], or [B, K] for a mask per sample; False entries count as zero and are not read.
        backend: "auto", "cpu" or "cuda" (compiled), "triton" (GPUs; more than 64 gradients run in plain torch), or "reference" (plain torch).
            "auto" is "cpu" on the CPU, "reference" elsewhere.

    Returns:
        float64 [K, K], or [B, K, K] per sample, freshly allocated. Products are summed in single precision over at most 4096
        elements (double for float64), then in double, in an order that depends on the number of elements alone: the same bits
        for every thread count and instruction set.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    >>> import torch, mmfast as mf
    >>> mf.gram([torch.tensor([3.0, 4.0]), torch.tensor([1.0, 0.0])])
    tensor([[25.,  3.],
            [ 3.,  1.]], dtype=torch.float64)
    """
    code, k = contract.per_code(per), len(grads)
    contract.check_count(k)
    first, kernels = grads[0], native
    if backend != "auto" or not native.available or torch.compiler.is_compiling() or not isinstance(first, Tensor) or not first.is_cpu:
        contract.check(grads, per, mask, k)
        kernels = kernels_of(serving(first.device, backend, k))
        if kernels is None:
            return reference.gram(grads, mask, per)
    try:
        return kernels.gram(grads, [], mask, code)
    except (RuntimeError, TypeError):
        contract.check(grads, per, mask, k)  # says what is wrong in words for people, where it knows
        raise


def combine(grads: Sequence[Tensor], w: Tensor, per: str = "batch", *, backend: str = "auto") -> Tensor:
    """The weighted sum of the gradients, sum_i w_i g_i.

    Args:
        grads: as for `gram`.
        w: weights [K], or [B, K] for per="sample"; any floating dtype, used in single precision (double for float64 gradients).
        per: "batch", "sample" or "batch_sum" (the same as "batch" here).
        backend: as for `gram`.

    Returns:
        A fresh contiguous tensor of the shape and dtype of one gradient; rows are added in order, 16-bit types are rounded once.

    >>> import torch, mmfast as mf
    >>> mf.combine([torch.tensor([3.0, 4.0]), torch.tensor([1.0, 0.0])], torch.tensor([0.5, 1.0]))
    tensor([2.5000, 2.0000])
    """
    code, k = contract.per_code(per), len(grads)
    contract.check_count(k)
    contract.check_grads(grads)
    contract.check_per(per, grads[0].shape)
    expected = (grads[0].shape[0], k) if per == "sample" else (k,)
    if not isinstance(w, Tensor) or tuple(w.shape) != expected:
        raise ValueError(f"w is {tuple(w.shape) if isinstance(w, Tensor) else type(w).__name__}, expected a tensor of shape {expected}")
    w = w.to(dtype=torch.float64, device=grads[0].device).contiguous()
    kernels = kernels_of(serving(grads[0].device, backend, k))
    return reference.combine(grads, None, w, per) if kernels is None else kernels.combine(grads, [], None, w, code)


# How exact the Gramian is that a resolver written in Python sees: one inside another must not take rounding for a direction.
_precision: ContextVar[float] = ContextVar("precision", default=0.0)


def _ask(resolver: Resolver, G: Tensor, mask: Tensor, precision: float) -> Tensor:
    """The resolver's weights, made known how exact G is; a traced graph can't hold context variables and goes without."""
    if torch.compiler.is_compiling():
        w = resolver(G, mask)
    else:
        token = _precision.set(max(_precision.get(), precision))
        try:
            w = resolver(G, mask)
        finally:
            _precision.reset(token)
    if not isinstance(w, Tensor) or w.shape != G.shape[:-1]:
        raise ValueError(
            f"{type(resolver).__name__} returned {tuple(w.shape) if isinstance(w, Tensor) else type(w).__name__} for a Gramian of shape "
            f"{tuple(G.shape)}, expected weights of shape {tuple(G.shape[:-1])}"
        )
    return torch.where(mask, w.detach().double(), 0)


def known_precision() -> float:
    """Relative rounding of the Gramian that is being resolved; float64's own where nobody said."""
    own = reference.precision_of(torch.float64)
    return own if torch.compiler.is_compiling() else max(_precision.get(), own)


def _there(G: Tensor, mask: Tensor | None) -> Tensor:
    """The rows [..., K] that are neither masked nor all zero."""
    rows = G.diagonal(dim1=-2, dim2=-1) != 0
    return rows if mask is None else rows & mask


def _present_samples(grads: Sequence[Tensor], missing: Sequence[int], mask: Tensor | None, k: int) -> Tensor:
    """Mask [B, K] of the samples that are neither masked nor all zero."""
    found = torch.stack([(g != 0).reshape(g.shape[0], g.numel() // max(g.shape[0], 1)).any(1) for g in grads], 1)
    rows = reference.padded(found, missing, k)
    return rows if mask is None else rows & mask


def _steps(chain: list[Rule]) -> tuple[list[int], list[float]]:
    if len(chain) == 1:
        params = chain[0].params()
        return [chain[0].method, len(params)], params
    parts = [(rule.method, rule.params()) for rule in chain]
    return [n for method, params in parts for n in (method, len(params))], [x for _, params in parts for x in params]


def _states(chain: list[Rule], problems: tuple[int, ...], k: int, device: torch.device) -> list[Tensor | None]:
    """Each rule's state [*problems, S], made on first use."""
    states: list[Tensor | None] = []
    for rule in chain:
        rule.check(k)
        size = rule.state_size(k)
        if not size:
            states.append(None)
            continue
        state = rule._buffers["state"]  # as an attribute of a module it would cost a microsecond each time
        if state is None:
            rule.state = state = contract.plain(torch.zeros(*problems, size, dtype=torch.float64, device=device))
        if state.device != device:
            rule.state = state = state.to(device)
        if state.shape != (*problems, size):
            raise ValueError(
                f"{type(rule).__name__} keeps state of shape {tuple(state.shape)} from earlier calls, but these gradients need "
                f"{(*problems, size)}; use one resolver per block, or call its reset()"
            )
        states.append(state)
    return states


def _joined(states: list[Tensor | None]) -> Tensor | None:
    """The states of a chain side by side: one's own storage, or a copy of several."""
    if len(states) == 1:
        return states[0]
    kept = [s for s in states if s is not None]
    return None if not kept else kept[0] if len(kept) == 1 else torch.cat(kept, -1)


def _keep(states: list[Tensor | None], joined: Tensor | None) -> None:
    """Writes joined states back where they are a copy."""
    if joined is None or len(states) == 1:
        return
    kept = [s for s in states if s is not None]
    if len(kept) > 1:
        for state, after in zip(kept, joined.split([s.shape[-1] for s in kept], -1), strict=True):
            state.copy_(after)


def _stream(chain: list[Rule], device: torch.device) -> Tensor | None:
    """The random stream of a chain: its first random rule's; the steps draw from different places of it."""
    for rule in chain:
        if rule.random:
            rng = cast(Tensor, rule._buffers["rng"])
            if rng.device != device:
                rule.rng = rng = rng.to(device)
            return rng
    return None


def weights(G: Tensor, resolver: Resolver, mask: Tensor | None = None, *, preserve_norm: bool = False, backend: str = "auto") -> Tensor:
    """Weights of a resolver for given Gramians.

    Args:
        G: Gramians [..., K, K], any floating dtype; solved in float64, each on its own. The dtype tells how exact the numbers are:
            what could be rounding counts as zero in the rules that need a rank (IMTLG, ConFIG, AlignedMTL).
        resolver: how conflicts are resolved.
        mask: bool [K] or [..., K]; False rows are missing: left out of the problem, weight 0. All-zero rows are missing too.
        preserve_norm: scale the weights so that the resolved gradient has the norm of the plain sum.
        backend: as for `gram`.

    Returns:
        float64 [..., K], fresh. A Gramian with a NaN or infinity gives NaN weights. State and random stream of the resolver advance.

    >>> import torch, mmfast as mf
    >>> mf.weights(torch.tensor([[18.0, -22.0], [-22.0, 38.0]]), mf.MGDA())
    tensor([0.6000, 0.4000], dtype=torch.float64)
    """
    contract.check_gramian(G)
    if isinstance(resolver, ElementwiseRule):
        resolver(G)
    problems, k = G.shape[:-2], G.shape[-1]
    if mask is not None:
        if mask.dtype != torch.bool or mask.shape not in ((k,), (*problems, k)):
            raise ValueError(f"mask is {mask.dtype} {tuple(mask.shape)}, expected torch.bool {(k,)} or {(*problems, k)}")
        mask = mask.contiguous()
    precision = max(known_precision(), reference.precision_of(G.dtype))
    return solve(G.detach().double().contiguous(), resolver, mask, preserve_norm, precision, backend)


def solve(G: Tensor, resolver: Resolver, mask: Tensor | None, preserve_norm: bool, precision: float, backend: str = "auto") -> Tensor:
    """`weights` for contiguous float64 Gramians of known relative rounding, without its checks."""
    problems, k = G.shape[:-2], G.shape[-1]
    chain = resolver.chain()
    if chain is None:
        resolver.check(k)
        there = _there(G, mask)
        w = _ask(resolver, G, there, precision)
        return w if not preserve_norm else reference.preserve_norm(G, there, w, precision)
    states, rng = _states(chain, tuple(problems), k, G.device), _stream(chain, G.device)
    served = serving(G.device, backend, k)
    if served in ("triton", "reference"):
        plain = kernels_of(served) or reference
        return plain.weights(G, mask, chain, states, rng, preserve_norm, precision)
    steps, params = _steps(chain)
    state = _joined(states)
    w = native.weights(G, mask, steps, params, state, rng, preserve_norm, precision)
    _keep(states, state)
    return w


def resolve(
    grads: Sequence[Tensor | None],
    resolver: Resolver,
    per: str = "batch",
    mask: Tensor | None = None,
    *,
    preserve_norm: bool = False,
    backend: str = "auto",
) -> Tensor:
    """One gradient from K conflicting ones: Gramian, weights and weighted sum in one call.

    Args:
        grads: 1 to 256 tensors of one shape, dtype and device; entries that are None are missing modalities.
        resolver: how conflicts are resolved.
        per: "batch" (one problem), "sample" (one problem per entry of the leading dimension) or "batch_sum" (one problem, of the
            gradients summed over the leading dimension).
        mask: bool [K], or [B, K]: False where a gradient (or a sample of it) is missing; what it holds is never read.
        preserve_norm: give the result the norm of the plain sum, as the impartial-optimisation code does.
        backend: as for `gram`; "auto" goes past torch's dispatcher where nobody could tell, "cpu" never does.

    Returns:
        A fresh contiguous tensor of the shape and dtype of one gradient. The same inputs, resolver state and seed give the same
        bits on every run, thread count and instruction set. A non-finite gradient gives a non-finite result.

    >>> import torch, mmfast as mf
    >>> mf.resolve([torch.tensor([-3.0, 1.0, 1.0]), torch.tensor([5.0, 1.0, 1.0])], mf.MGDA())
    tensor([0., 1., 1.])
    """
    return resolve_info(grads, resolver, per, mask, preserve_norm=preserve_norm, backend=backend, with_info=False)[0]


def resolve_info(
    grads: Sequence[Tensor | None],
    resolver: Resolver,
    per: str = "batch",
    mask: Tensor | None = None,
    *,
    preserve_norm: bool = False,
    backend: str = "auto",
    with_info: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """`resolve`, with what it did: (result, info) with info float64 [K + K * K], or [B, K + K * K] per sample: weights, then Gramian.

    info is None for elementwise resolvers; without `with_info` it may be None, or lack what the result did not need.
    """
    if mask is None and per == "batch" and backend == "auto":
        found = direct.resolve(grads, resolver, preserve_norm, with_info)
        if found is not None:
            return found
    k = len(grads)
    missing = tuple([i for i, g in enumerate(grads) if g is None])
    present = [g for g in grads if g is not None] if missing else cast(Sequence[Tensor], grads)
    return _resolve(present, resolver, k, missing, per, mask, preserve_norm, with_info, backend)


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
    code = contract.per_code(per)
    first = grads[0] if grads else None
    served = "cpu" if native.available and backend == "auto" and isinstance(first, Tensor) and first.is_cpu else ""
    if not served or torch.compiler.is_compiling():  # else the compiled operator checks, and only what it refuses is looked at here
        contract.check(grads, per, mask, k)
        served = serving(grads[0].device, backend, k)
    first = grads[0]
    chain = resolver.chain()
    if chain is None:
        resolver.check(k)
        if code or not isinstance(resolver, ElementwiseRule):
            contract.check(grads, per, mask, k)
        return _resolve_general(grads, resolver, k, missing, per, mask, preserve_norm, kernels_of(served))
    problems = (first.shape[0],) if code == 1 and first.dim() else ()
    states, rng = _states(chain, problems, k, first.device), _stream(chain, first.device)
    with_gram = with_info or preserve_norm or chain[0].needs_gram or any(rule.needs_gram for rule in chain)
    if served in ("triton", "reference"):
        plain = kernels_of(served) or reference
        return plain.resolve(grads, missing, mask, chain, states, rng, per, preserve_norm, with_gram)
    steps, params = _steps(chain)
    state = _joined(states)
    try:
        out, info = native.resolve(grads, missing, mask, steps, params, state, rng, code, preserve_norm, with_gram)
    except (RuntimeError, TypeError):
        contract.check(grads, per, mask, k)  # says what is wrong in words for people, where it knows
        raise
    _keep(states, state)
    return out, info


def _resolve_general(
    grads: Sequence[Tensor],
    resolver: Resolver,
    k: int,
    missing: tuple[int, ...],
    per: str,
    mask: Tensor | None,
    preserve_norm: bool,
    kernels: Any,
) -> tuple[Tensor, Tensor | None]:
    """Resolvers that are not chains of built-in rules: elementwise ones, and a user's own between the kernels' passes."""
    if isinstance(resolver, ElementwiseRule):
        if per == "sample":
            mask = _present_samples(grads, missing, mask, k)
        out = _elementwise(grads, resolver, missing, mask, k, kernels)
        return reference.with_norm(out, grads, _restrict(mask, missing, k), per) if preserve_norm else out, None
    code = contract.per_code(per)
    present = _restrict(mask, missing, k)
    if kernels is not None:
        G = kernels.gram(grads, missing, mask, code)
    else:
        G = reference.spread(reference.gram(grads, present, per), missing, k)
    row_mask = reference.problem_mask(mask, per)
    if missing:
        there = reference.padded(torch.ones(len(grads), dtype=torch.bool, device=G.device), missing, k)
        row_mask = there if row_mask is None else row_mask & there
    row_mask = _there(G, row_mask)
    precision = reference.precision_of(grads[0].dtype)
    w = _ask(resolver, G, row_mask, precision)
    if preserve_norm:
        w = reference.preserve_norm(G, row_mask, w, precision)
    w = w.contiguous()
    if kernels is not None:
        out = kernels.combine(grads, missing, mask, w, code)
    else:
        out = reference.combine(grads, present, reference.kept(w, missing, k), per)
    return out, torch.cat([w, G.flatten(-2)], -1)


def _elementwise(
    grads: Sequence[Tensor], rule: ElementwiseRule, missing: tuple[int, ...], mask: Tensor | None, k: int, kernels: Any
) -> Tensor:
    if kernels is not None:
        try:
            return rule.fused(kernels, grads, missing, mask)
        except (RuntimeError, TypeError):
            contract.check(grads, "batch", mask, k)
            raise
    out = rule.combine(list(grads), _restrict(mask, missing, k))
    contract.check_unmapped(out, *rule._buffers.values())
    rule.advance()
    return out
