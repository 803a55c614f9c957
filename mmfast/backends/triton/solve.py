"""From Gramians to weights in one launch: a program of Triton for each problem, float64, without synchronisation."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from mmfast import resolvers
from mmfast.backends.triton import alignment, bargaining, cone, minnorm, projection, simple
from mmfast.backends.triton.problem import packed
from mmfast.backends.triton.rows import current
from mmfast.resolvers.base import Rule
from mmfast.resolvers.philox import advance

MAX_ROWS = 64  # of a tile that registers hold

# the kernel of each rule, and which form of it a rule takes: what is known when it is compiled
KERNELS: dict[type[Rule], tuple[Any, Callable[[Any], dict[str, bool]]]] = {
    resolvers.Sum: (simple.fixed, lambda rule: {"MEAN": False, "CONSTANT": False}),
    resolvers.Mean: (simple.fixed, lambda rule: {"MEAN": True, "CONSTANT": False}),
    resolvers.Constant: (simple.fixed, lambda rule: {"MEAN": False, "CONSTANT": True}),
    resolvers.Random: (simple.random, lambda rule: {}),
    resolvers.PCGrad: (projection.pcgrad, lambda rule: {"FIXED": not rule.random}),
    resolvers.MGDA: (minnorm.mgda, lambda rule: {"UNIT": rule.normalize == "l2", "CAPPED": rule.cap is not None}),
    resolvers.CAGrad: (minnorm.cagrad, lambda rule: {}),
    resolvers.UPGrad: (cone.upgrad, lambda rule: {"GIVEN": rule.pref is not None}),
    resolvers.DualProj: (cone.dualproj, lambda rule: {"GIVEN": rule.pref is not None}),
    resolvers.NashMTL: (bargaining.nash, lambda rule: {}),
    resolvers.FairGrad: (bargaining.fair, lambda rule: {"SEARCHES": 0 < rule.alpha < 0.5}),
    resolvers.IMTLG: (alignment.imtlg, lambda rule: {}),
    resolvers.AlignedMTL: (alignment.aligned, lambda rule: {"GIVEN": rule.pref is not None}),
    resolvers.ConFIG: (alignment.config, lambda rule: {"GIVEN": rule.pref is not None}),
}


def launch_options(size: int) -> dict[str, Any]:
    """Warps that keep a tile of so many rows in registers; products and sums rounded apart, whatever Triton's version has for default."""
    return {"num_warps": 1 if size <= 16 else size // 8, "enable_fp_fusion": False}


def has_kernel(chain: Sequence[Rule], k: int) -> bool:
    """Whether `solve` serves a chain of rules for k gradients."""
    return len(chain) == 1 and type(chain[0]) in KERNELS and k <= MAX_ROWS


def solve(
    G: Tensor,
    mask: Tensor | None,
    chain: Sequence[Rule],
    states: Sequence[Tensor | None],
    rng: Tensor | None,
    preserve_norm: bool,
    precision: float,
) -> Tensor | None:
    """`reference.weights` in one launch (two for a random rule, whose stream moves on), or None where the chain has no kernel here.

    Args:
        G: Gramians [..., K, K] float64, contiguous; one program solves each.
        mask: bool [K] or [..., K]; False rows are missing: left out of the problem, weight 0. All-zero rows are missing too.
        chain, states, rng, preserve_norm, precision: as for `reference.weights`; one rule without state and K <= 64 have a kernel.

    Returns:
        float64 [..., K], fresh; NaN for a Gramian with a number that is not finite. Deterministic.
    """
    return _launch(G, mask, chain[0], rng, int(preserve_norm), precision)[0] if has_kernel(chain, G.shape[-1]) else None


def solve_twice(
    G: Tensor, mask: Tensor | None, chain: Sequence[Rule], states: Sequence[Tensor | None], rng: Tensor | None, precision: float
) -> Tensor | None:
    """Weights [2, ..., K] of the Gramians and of the Gramians changed within their precision, alike in all else; [1, ..., K] for rules that read none."""
    return _launch(G, mask, chain[0], rng, 2 * chain[0].needs_gram, precision) if has_kernel(chain, G.shape[-1]) else None


def _launch(G: Tensor, mask: Tensor | None, rule: Rule, rng: Tensor | None, norm: int, precision: float) -> Tensor:
    """Weights [1 or 2, ..., K]; `norm` as problem.py says."""
    kernel, form = KERNELS[type(rule)]
    k = G.shape[-1]
    w = torch.empty((1 + (norm == 2), *G.shape[:-1]), dtype=torch.float64, device=G.device)
    programs = w.numel() // k
    if programs:
        size = triton.next_power_of_2(k)
        with current(G.device):
            kernel[(programs,)](
                G,
                G if mask is None else mask.contiguous().view(torch.uint8),
                G if rng is None else rng,
                packed((precision, *rule.params())),
                w,
                0 if mask is None or mask.dim() == 1 else k,
                programs // w.shape[0],
                K=k,
                P=size,
                HAS_MASK=mask is not None,
                NORM=norm,
                **form(rule),
                **launch_options(size),
            )
    if rng is not None:
        advance(rng)
    return w
