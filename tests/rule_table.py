"""One row per rule: how to make it, what it promises, and how far given weights are from its own optimality conditions."""

from collections.abc import Callable
from dataclasses import dataclass

import residuals
import torch
from torch import Tensor

from mmfast.resolvers import alignment, bargaining, compose, cone, magnitude, minnorm, projection, robust, simple
from mmfast.resolvers.base import Resolver

# The two-row example every multi-task library is checked on: J and the golden weights of it.
GOLDEN_J = torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]], dtype=torch.float64)


@dataclass(frozen=True)
class Row:
    """What a rule promises.

    residual(G, w) is the worst violation of the rule's own optimality conditions, relative to the problem's size, for
    one full problem G [K, K] without missing rows; it must not call the rule's own code.
    """

    make: Callable[[int], Resolver]  # K -> a fresh resolver
    residual: Callable[[Tensor, Tensor], float] | None = None
    power: float | None = 0.0  # w(s G) = s^power w(G); None where no such law holds
    equivariant: bool = True  # permuting the rows permutes the weights
    nonconflicting: bool = False  # G w >= 0
    golden: tuple[float, ...] | None = None  # weights on GOLDEN_J
    golden_tolerance: float = 1e-4
    torchjd: Callable[[], object] | None = None  # the peer's aggregator that computes the same
    tolerance: float = 1e-8  # of residual
    min_k: int = 1


def _torchjd(name: str, *args: object, **kwargs: object) -> Callable[[], object]:
    def make() -> object:
        import torchjd.aggregation

        return getattr(torchjd.aggregation, name)(*args, **kwargs)

    return make


RULES: dict[str, Row] = {
    "Sum": Row(lambda k: simple.Sum(), golden=(1, 1)),
    "Mean": Row(lambda k: simple.Mean(), golden=(0.5, 0.5)),
    "Constant": Row(lambda k: simple.Constant([float(i + 1) for i in range(k)]), equivariant=False, golden=(1, 2)),
    "Random": Row(lambda k: simple.Random(), equivariant=False),
    "PCGrad": Row(lambda k: projection.PCGrad(), equivariant=False, golden=(20 / 9, 30 / 19)),
    "PCGrad fixed": Row(
        lambda k: projection.PCGrad(reduction="mean", order="fixed"),
        residual=lambda G, w: residuals.pcgrad_fixed_residual(G, w * len(w)),
        equivariant=False,
        golden=(10 / 9, 15 / 19),
    ),
    "GradVac": Row(lambda k: projection.GradVac(), equivariant=False, golden=(20 / 9, 30 / 19)),
    "PCGrad every 2": Row(lambda k: projection.PCGrad(every=2), equivariant=False, golden=(20 / 9, 30 / 19)),
    "Unit": Row(lambda k: magnitude.Unit(), residuals.unit_residual, power=-0.5, golden=(18**-0.5, 38**-0.5)),
    "DBMTL": Row(lambda k: magnitude.DBMTL(), residuals.dbmtl_residual, golden=((38 / 18) ** 0.5, 1.0)),
    "GradNorm": Row(lambda k: magnitude.GradNorm(alpha=1.0, lr=0.1, update_at=2), golden=(1, 1)),
    "NSGD": Row(lambda k: magnitude.NSGD(update_at=2), residual=residuals.nsgd_residual, golden=(1.268309, 0.872905)),
    "CRMOGM": Row(lambda k: compose.CRMOGM(projection.PCGrad()), equivariant=False, golden=(20 / 9, 30 / 19)),
    "Compose": Row(
        lambda k: compose.Compose(projection.GradVac(), compose.CRMOGM(magnitude.NSGD()), simple.Random(), projection.PCGrad()),
        equivariant=False,
    ),
    "Krum": Row(lambda k: robust.Krum(1), residual=residuals.krum_residual(1, 1, 2), min_k=4),
    "Krum plain": Row(
        lambda k: robust.Krum(1, distance="plain"), residual=residuals.krum_residual(1, 1, 1), min_k=4, torchjd=_torchjd("Krum", 1)
    ),
    "Multi-Krum": Row(lambda k: robust.Krum(2, n_selected=3), residual=residuals.krum_residual(2, 3, 2), min_k=5),
    "UPGrad": Row(
        lambda k: cone.UPGrad(),
        residual=residuals.upgrad_residual,
        nonconflicting=True,
        golden=(10 / 9, 15 / 19),
        golden_tolerance=1e-12,
        torchjd=_torchjd("UPGrad"),
    ),
    "DualProj": Row(
        lambda k: cone.DualProj(),
        residual=lambda G, w: residuals.dual_cone_residual(G, torch.full_like(w, 1 / len(w)), w),
        nonconflicting=True,
        golden=(11 / 18, 1 / 2),
        golden_tolerance=1e-12,
        torchjd=_torchjd("DualProj"),
    ),
    "PCD": Row(
        lambda k: cone.PCD(),
        residual=residuals.pcd_residual,
        equivariant=False,
        golden=(residuals.PCD_FIRST, (0.02 + 22 / 684**0.5) * (18 / 38) ** 0.5 * residuals.PCD_FIRST),
        golden_tolerance=1e-12,
        torchjd=_torchjd("PCD"),
    ),
    "NashMTL": Row(lambda k: bargaining.NashMTL(), residuals.fair_residual(1.0), power=-0.5, nonconflicting=True, golden=(0.5915, 0.4071)),
    "NashMTL(max_norm)": Row(lambda k: bargaining.NashMTL(max_norm=1.0), power=-0.5, nonconflicting=True, golden=(0.4182, 0.2878)),
    "NashMTL every 2": Row(
        lambda k: bargaining.NashMTL(every=2), residuals.fair_residual(1.0), power=-0.5, nonconflicting=True, golden=(0.5915, 0.4071)
    ),
    "FairGrad(0.5)": Row(lambda k: bargaining.FairGrad(0.5), residuals.fair_residual(0.5), power=-1 / 3, nonconflicting=True),
    "FairGrad": Row(
        lambda k: bargaining.FairGrad(), residuals.fair_residual(1.0), power=-0.5, nonconflicting=True, golden=(0.5915, 0.4071)
    ),
    "FairGrad(2)": Row(lambda k: bargaining.FairGrad(2.0), residuals.fair_residual(2.0), power=-2 / 3, nonconflicting=True),
    "IMTLG": Row(lambda k: alignment.IMTLG(), residuals.imtlg_residual, golden=(0.5923, 0.4077), torchjd=_torchjd("IMTLG")),
    "AlignedMTL": Row(
        lambda k: alignment.AlignedMTL(), residuals.aligned_residual, golden=(0.5591, 0.4083), torchjd=_torchjd("AlignedMTL")
    ),
    "AlignedMTL(median)": Row(lambda k: alignment.AlignedMTL("median")),
    "AlignedMTL(rmse)": Row(lambda k: alignment.AlignedMTL("rmse"), golden=(1.5109, 1.1033)),
    "ConFIG": Row(lambda k: alignment.ConFIG(), residuals.config_residual, golden=(1.2265, 0.8441), torchjd=_torchjd("ConFIG")),
    "ConFIG(geometric)": Row(lambda k: alignment.ConFIG(length="geometric")),
    "ConFIG(first)": Row(lambda k: alignment.ConFIG(length=0), residuals.config_first_residual, equivariant=False),
    "MMPareto": Row(
        lambda k: minnorm.MMPareto(),
        residuals.mmpareto_residual,
        nonconflicting=True,
        golden=(1.8 * 1.5**0.5, 1.2 * 1.5**0.5),
        golden_tolerance=1e-12,
    ),
    "MGDA": Row(
        lambda k: minnorm.MGDA(),
        residuals.mgda_residual,
        nonconflicting=True,
        golden=(0.6, 0.4),
        torchjd=_torchjd("MGDA", epsilon=1e-6, max_iters=3000),
    ),
    "MGDA l2": Row(
        lambda k: minnorm.MGDA("l2"), residuals.mgda_unit_residual, power=-0.5, nonconflicting=True, golden=(0.5 / 18**0.5, 0.5 / 38**0.5)
    ),
    "MGDA capped": Row(lambda k: minnorm.MGDA(cap=0.1), golden=(0.1, 0.1)),
    "CAGrad": Row(lambda k: minnorm.CAGrad(0.5), residuals.cagrad_residual(0.5), golden=(0.7041, 0.5), torchjd=_torchjd("CAGrad", c=0.5)),
    "CAGrad c=0.1": Row(lambda k: minnorm.CAGrad(0.1, rescale=2), residuals.cagrad_residual(0.1, 1 / 1.1)),
    "CAGrad c=1": Row(lambda k: minnorm.CAGrad(1.0, rescale=1), residuals.cagrad_residual(1.0, 0.5), nonconflicting=True),
    "CAGrad c=3": Row(lambda k: minnorm.CAGrad(3.0), residuals.cagrad_residual(3.0), nonconflicting=True),
}
