"""From Gramians to weights in one launch: a program of Triton for each problem, float64, without synchronisation."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from mmfast.resolvers import (
    IMTLG,
    MGDA,
    AlignedMTL,
    CAGrad,
    ConFIG,
    Constant,
    DualProj,
    FairGrad,
    Mean,
    NashMTL,
    PCGrad,
    Random,
    Sum,
    UPGrad,
)
from mmfast.resolvers.base import Rule
from mmfast.resolvers.philox import advance
from mmfast.triton import alignment, bargaining, cone, minnorm, projection, simple

MAX_ROWS = 64  # of a tile that registers hold


def _kernel(rule: Rule) -> tuple[Any, dict[str, bool]] | None:
    """The kernel of a rule and its variant, or None."""
    kind = type(rule)
    if kind in (Sum, Mean, Constant):
        return simple.fixed, {"MEAN": kind is Mean, "CONSTANT": kind is Constant}
    if kind is Random:
        return simple.random, {}
    if isinstance(rule, PCGrad):
        return projection.pcgrad, {"FIXED": not rule.random}
    if isinstance(rule, MGDA):
        return minnorm.mgda, {"UNIT": rule.normalize == "l2"}
    if isinstance(rule, CAGrad):
        return minnorm.cagrad, {}
    if kind in (UPGrad, DualProj):
        return cone.upgrad if kind is UPGrad else cone.dualproj, {"GIVEN": bool(rule.params())}
    if kind is IMTLG:
        return alignment.imtlg, {}
    if kind in (ConFIG, AlignedMTL):
        return alignment.config if kind is ConFIG else alignment.aligned, {"GIVEN": len(rule.params()) > 1}
    if kind in (NashMTL, FairGrad):
        return bargaining.nash if kind is NashMTL else bargaining.fair, {}
    return None


@lru_cache(maxsize=64)
def _on_device(params: tuple[float, ...], device: torch.device) -> Tensor:
    """Hyper-parameters where a kernel can read them in float64: its arguments would be rounded to float32."""
    return torch.tensor(params, dtype=torch.float64, device=device)


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
    k = G.shape[-1]
    found = _kernel(chain[0]) if len(chain) == 1 and k <= MAX_ROWS else None
    if found is None:
        return None
    kernel, variant = found
    w = torch.empty(G.shape[:-1], dtype=torch.float64, device=G.device)
    problems = w.numel() // k
    if problems:
        size = triton.next_power_of_2(k)
        kernel[(problems,)](
            G,
            G if mask is None else mask.contiguous().view(torch.uint8),
            G if rng is None else rng,
            _on_device((precision, *chain[0].params()), G.device),
            w,
            k,
            0 if mask is None or mask.dim() == 1 else k,
            P=size,
            HAS_MASK=mask is not None,
            PRESERVE_NORM=preserve_norm,
            num_warps=1 if size <= 16 else size // 8,
            enable_fp_fusion=False,  # as the other backends round; what is the default depends on Triton's version
            **variant,
        )
    if rng is not None:
        advance(rng)
    return w
