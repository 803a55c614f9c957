"""What is measured of a system: scores, and how much of each modality reaches the logits."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmfast.collapse import Agop, effective_rank, numerical_rank, participation, similarity
from mmfast.collapse.collisions import energy_shares
from mmfast.data.samples import Samples
from mmfast.experiments.collapse.systems import System
from mmfast.models.fusion import CMAE, FusionModel
from mmfast.models.fusion.base import Features

ROWS = 1000  # of which ranks, participation and the gradient outer product are taken


@dataclass
class Scores:
    """Of one set of rows; of many classes ROC and PRC are means over the classes, each against the rest."""

    roc: float  # area under the ROC curve
    prc: float  # average precision
    accuracy: float

    def main(self, classes: int) -> float:
        """What runs are chosen by: ROC of two classes, accuracy of more."""
        return self.roc if classes == 2 else self.accuracy


def scores(logits: Tensor, target: Tensor) -> Scores | None:
    """Of logits [n, C] and classes [n]; None where only one class is there, or a logit is not finite."""
    from sklearn.metrics import average_precision_score, roc_auc_score  # takes a second to load

    there = target.unique().tolist()
    if len(there) < 2 or not bool(logits.isfinite().all()):
        return None
    wide = logits.double()
    roc, prc = [], []
    for c in [1] if logits.shape[1] == 2 else there:
        others = [other for other in range(logits.shape[1]) if other != c]
        odds = (wide[:, c] - wide[:, others].logsumexp(1)).numpy()  # in the order of the probabilities, which are all 1 from 37 on
        own = (target == c).numpy()
        roc.append(roc_auc_score(own, odds))
        prc.append(average_precision_score(own, odds))
    return Scores(float(sum(roc) / len(roc)), float(sum(prc) / len(prc)), float((logits.argmax(1) == target).double().mean()))


@torch.no_grad()
def logits_of(model: nn.Module, rows: Samples, batch: int) -> Tensor:
    """In eval mode, batch by batch in the order of the rows: some systems' logits depend on the batch."""
    was_training = model.training
    model.eval()
    found = [model(part.inputs, part.present) for part in batches(rows, batch)]
    model.train(was_training)
    return torch.cat(found) if found else torch.zeros(0, 2)


def batches(rows: Samples, batch: int) -> list[Samples]:
    """In their order; the last may be smaller."""
    return [rows.part(torch.arange(i, min(i + batch, len(rows)))) for i in range(0, len(rows), batch)]


def score(model: nn.Module, rows: Samples, batch: int) -> Scores | None:
    """Of a model on these rows."""
    return scores(logits_of(model, rows, batch), rows.target)


@dataclass
class Look:
    """What the fusion of a system makes of some rows; None for what it does not have, or what is not finite."""

    participation: float | None  # of the first layer's neurons, mean; weights times their inputs' standard deviations
    directions: float | None  # the same of the eigenvectors of the gradient outer product, mean weighted by the eigenvalues
    shares: dict[str, float | None]  # of each modality in its trace
    effective_rank: dict[str, float | None]  # of each modality's features where it is present, and "fused"
    numerical_rank: dict[str, float | None]
    similarity: list[list[float | None]]  # of the modalities' features


def look(system: System, rows: Samples, batch: int) -> Look:
    """Looks at the features that reach the fusion (of EBR those that come back from the factors) and at what becomes of them, in eval mode.

    The gradient outer product is that of the logits by the features, each divided by its standard deviation: whatever the scale of the features, a
    feature's part is how much the logits move with it. Where they depend on the batch, a row's derivative is that of all rows' logits.
    """
    model, rows = system.model, rows.part(torch.arange(min(ROWS, len(rows))))
    was_training = model.training
    model.eval()
    features, there, fused = features_of(system, rows, batch)
    sizes = [f.shape[1] for f in features.values()]
    scale = torch.cat([_deviation(f, there[:, i]) for i, f in enumerate(features.values())])
    M = _outer_product(model, features, there, batch) * scale.unsqueeze(1) * scale
    model.train(was_training)
    parts = {name: f[there[:, i]] for i, (name, f) in enumerate(features.items())}
    matrices = {**parts, "fused": fused}
    names, trace = list(features), M.diagonal().split(sizes)
    alike = similarity(features, {name: there[:, i] for i, name in enumerate(names)})
    return Look(
        None if system.first is None else number(participation(system.first.weight.double() * scale, sizes).nanmean()),
        number(_directions(M, sizes)),
        {name: number(part.sum() / M.trace()) for name, part in zip(names, trace, strict=True)},
        {name: number(effective_rank(x)) for name, x in matrices.items()},
        {name: number(numerical_rank(x)) for name, x in matrices.items()},
        [[number(x) for x in row] for row in alike],
    )


@torch.no_grad()
def features_of(system: System, rows: Samples, batch: int) -> tuple[Features, Tensor, Tensor]:
    """The features that reach the fusion, bool [n, m] where they are present, and the fused features: what the logits' layer takes, or where there is no such
    layer the features side by side."""
    taken: list[tuple[Features, Tensor]] = []
    last: list[Tensor] = []
    hooks = [system.model.fusion.register_forward_pre_hook(lambda module, args: taken.append(args))]
    if system.last is not None:
        hooks.append(system.last.register_forward_pre_hook(lambda module, args: last.append(args[0].flatten(1))))
    try:
        logits_of(system.model, rows, batch)
    finally:
        for hook in hooks:
            hook.remove()
    features = {name: torch.cat([f[name] for f, _ in taken]) for name in taken[0][0]}
    there = torch.cat([t for _, t in taken])
    return features, there, torch.cat(last) if last else torch.cat(list(features.values()), 1)


def fused_rank(system: System, rows: Samples, batch: int) -> float | None:
    """Effective rank of the fused features."""
    return number(effective_rank(features_of(system, rows.part(torch.arange(min(ROWS, len(rows)))), batch)[2]))


class _Fusion(nn.Module):
    """The fusion and what follows, of features side by side."""

    def __init__(self, model: FusionModel, features: Features) -> None:
        super().__init__()
        self.model, self.sizes = model, {name: f.shape[1] for name, f in features.items()}

    def forward(self, x: Tensor, there: Tensor) -> Tensor:
        fused = self.model.fusion(dict(zip(self.sizes, x.split(list(self.sizes.values()), 1), strict=True)), there)
        return self.model.classifier(fused) if isinstance(self.model, CMAE) else fused


def _outer_product(model: FusionModel, features: Features, there: Tensor, batch: int) -> Tensor:
    fusion = _Fusion(model, features)
    with Agop(fusion) as agop:
        for x, seen in zip(torch.cat(list(features.values()), 1).split(batch), there.split(batch), strict=True):
            agop.add(fusion(x.requires_grad_(), seen))
    return agop.matrix


def _deviation(x: Tensor, rows: Tensor) -> Tensor:
    return x[rows].double().std(0, correction=0) if bool(rows.any()) else x.new_zeros(x.shape[1], dtype=torch.float64)


def _directions(M: Tensor, sizes: list[int]) -> Tensor:
    if not bool(M.isfinite().all()) or not bool(M.trace() > 0):
        return M.new_tensor(math.nan)
    values, vectors = torch.linalg.eigh(M)
    values = values.clamp(min=0)
    return (values * (1 / energy_shares(vectors.mT, sizes).square().sum(1))).sum() / values.sum()


def number(x: Tensor | float) -> float | None:
    """As a float; None where it is not finite."""
    return float(x) if math.isfinite(float(x)) else None
