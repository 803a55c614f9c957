"""What must hold of a rule's weights for gradients whose Gramian was rounded: each condition with how far it is violated."""

from collections.abc import Iterator

import torch
from rule_table import RULES
from torch import Tensor

P = torch.finfo(torch.float32).eps


def _each(residual, G: Tensor, w: Tensor) -> Tensor:
    return torch.tensor([residual(g, v) for g, v in zip(G, w, strict=True)], dtype=torch.float64)


def conditions(name: str, rule, J: Tensor, w: Tensor, w64: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Of weights w [B, k] for gradients J [B, k, n], both float64: (condition, violation [B]), the unit being what the Gramian's precision allows.

    That is k times the precision for values and bounds, its square root for what depends on a root of the Gramian. w64 are the weights
    of the same gradients given as float64.
    """
    k, row = J.shape[1], RULES[name]
    p, root = k * P, (k * P) ** 0.5
    G, norm = J @ J.mT, J.norm(dim=-1)
    d, d64 = ((x.unsqueeze(1) @ J).squeeze(1) for x in (w, w64))
    slope = (J @ d.unsqueeze(-1)).squeeze(-1)
    bound = (w.abs() * norm).sum(-1).clamp(min=1e-300)  # how long d could be
    length, mean, scale = d.norm(dim=-1), J.mean(1), norm.mean(-1)
    apart = (d - d64).norm(dim=-1) / norm.amax(-1)
    if row.nonconflicting:
        yield "no conflict", (-slope / norm).amax(-1) / bound / (root if name.startswith("CAGrad") else p)
    if name in ("MGDA", "MGDA l2"):
        yield "shortest", _each(row.residual, G, w) / p
        yield "length", (length - (norm.amin(-1) if name == "MGDA" else 1)) / bound / p
    elif name in ("UPGrad", "DualProj"):
        yield "a projection is no longer", (length - scale) / scale / p
        if name == "DualProj":
            yield "projection", _each(row.residual, G, w) / p
        opposite = (
            (1 + G / norm.unsqueeze(-1) / norm.unsqueeze(-2)).flatten(1).amin(-1)
        )  # two such rows leave a cone as narrow as the rounding
        yield "float64", torch.where(opposite > 1e3 * p, apart, 0) / root
    elif name.startswith("CAGrad"):
        shrink = {"CAGrad c=0.1": 1 / 1.1, "CAGrad c=1": 0.5}.get(name, 1.0)
        yield "ball", ((d / shrink - mean).norm(dim=-1) - rule.c * mean.norm(dim=-1)) / scale / root
        worst, best = (((J @ v.unsqueeze(-1)).squeeze(-1) / norm).amin(-1) for v in (d, d64))
        yield "worst case", (best - worst) / scale / root
    elif name == "NashMTL(max_norm)":
        yield "length", (length - 1) / p
    elif name.startswith(("NashMTL", "FairGrad")):
        alpha = getattr(rule, "alpha", 1.0)
        yield "length", (length / (w ** (1 - 1 / alpha)).sum(-1).sqrt() - 1) / p
        x = (w * norm / norm ** ((1 - alpha) / (1 + alpha))).amax(-1)
        gap = (slope * w ** (1 / alpha) - 1).abs().amax(-1) / ((norm * w ** (1 / alpha)).amax(-1) * bound)
        yield "bargain", torch.where(x < 100, gap, 0) / p  # above, the barrier counts
    elif name == "MMPareto":
        total = J.sum(1).norm(dim=-1)
        out = length / bound  # where little of the direction is left it is known less exactly, and where nothing is it is not made longer
        yield "no shorter than the sum", torch.where(out > 1e-2, (1 - length / (rule.gamma * total)) * out.square(), 0) / p
    elif name.startswith(("GradNorm", "NSGD", "Unit", "DBMTL", "Sum", "Mean", "Constant", "Random")):
        yield "float64", (w - w64).abs().amax(-1) / w64.abs().amax(-1) / p
    elif name.startswith(("Krum", "Multi-Krum")):
        yield "nearest", _each(row.residual, G, w) / p
    elif name == "MGDA capped":
        yield "cap", torch.maximum((w - rule.cap * (1 + 1e-12)).amax(-1), -w.amin(-1)) / p
    elif name in (
        "PCGrad",
        "PCGrad every 2",
        "GradVac",
        "CRMOGM",
        "Compose",
    ):  # a random order: each row is made no longer, or as long as the bound on its cosines says
        yield "length", (length / norm.sum(-1) - (k if name in ("GradVac", "Compose") else 1)) / p
    elif name == "PCGrad fixed":
        far = apart > p
        violation = torch.zeros_like(apart)
        violation[far] = _each(row.residual, G[far], w[far]) / p
        yield "projections", violation
    elif name == "PCD":
        yield "length", (length - norm[:, 0]).abs() / norm[:, 0] / root / (bound / norm[:, 0]).clamp(min=1)
        yield "progress", torch.where(w[:, 1:].any(-1), (-slope / norm)[:, 1:].amax(-1) / bound / p, 0)
    elif name.startswith(("IMTLG", "AlignedMTL", "ConFIG")):
        # where no direction is near the rank's limit, d is a smooth function of the gradients
        scaled = G if name.startswith("AlignedMTL") else G / norm.unsqueeze(-1) / norm.unsqueeze(-2)
        values = torch.linalg.eigvalsh(scaled)
        clear = values[:, 0] > 1e-3 * values[:, -1]
        yield "aligned", torch.where(clear, apart, 0) / p / 1e3
