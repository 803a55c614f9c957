"""M3Care: what a sample lacks is made up from the samples of the batch that are similar to it."""

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmfast.models.fusion.base import Features, Fusion, task_loss
from mmfast.models.multimodal.inputs import filled


def gaussian_kernel(x: Tensor, there: Tensor) -> Tensor:
    """Similarities [B, B] of the rows of x [B, n]: the mean of three Gaussians, of 1/2, 1 and 2 times the mean squared distance (detached) of rows that are
    `there`, bool [B]."""
    squares = x.square().sum(1)
    distance = (squares.unsqueeze(1) + squares - 2 * x @ x.T).clamp(min=0)
    rows = there.to(x.dtype)
    pairs = (rows.sum().square() - rows.sum()).clamp(min=1)
    mean = (rows @ distance.detach() @ rows / pairs).clamp(min=4 * torch.finfo(x.dtype).tiny)
    return torch.stack([(-distance / (mean * factor)).exp() for factor in (0.5, 1.0, 2.0)]).mean(0)


def _projection(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, width), nn.SELU(), nn.Linear(width, width), nn.SELU(), nn.Linear(width, width))


class M3Care(Fusion):
    """A graph of similar samples for each modality imputes its features; a transformer over the modalities fuses them.

    The features of a modality are mapped to one width, x. A sample's similarity to another is, averaged over the modalities that both have,
    a mix of two kernels (see `gaussian_kernel`), of BN(x) and of BN(an MLP of x), in shares that are learned; what is below a learned
    threshold counts as none. Over those similarities, scaled to a sum of one for each sample, two graph layers (SELU) take features from
    samples that have the modality: h^. Where it is missing h^ is in its place; where it is present the two are mixed, in learned shares.
    Then two transformer layers over the modalities, and a classifier. Predictions depend on the batch.

    After Zhang et al., "M3Care: learning with missing modalities in multimodal healthcare data", KDD 2022. In the released notebooks a
    sample without the modality receives nothing in its graph (rows are masked as columns are) and three of five results are written to
    wrong rows: both are right here. They do not scale similarities to a sum, so that their result depends on the size of the batch, and one
    modality, always present there, comes in after the first transformer layer. Deterministic without dropout.

    Args:
        sizes: d_i by name.
        outputs: number of logits, C.
        width: of x, 256 in the notebook.
        heads, dropout: of the transformer; the dropout is also the classifier's.
        norm_weight: of the regulariser, the sum over modalities of | ||MLP(x)|| - ||x|| |, Frobenius norms of the present rows of the
            batch.

    Example:
        >>> features, present = {"image": torch.randn(8, 4), "sound": torch.randn(8, 3)}, torch.rand(8, 2) > 0.3
        >>> M3Care({"image": 4, "sound": 3}, 10, width=16)(features, present).shape
        torch.Size([8, 10])
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        outputs: int,
        width: int = 256,
        heads: int = 4,
        dropout: float = 0.5,
        norm_weight: float = 1e-8,
    ) -> None:
        super().__init__()
        self.maps = nn.ModuleDict({name: nn.Linear(d, width) for name, d in sizes.items()})
        self.projections = nn.ModuleDict({name: _projection(width) for name in sizes})
        self.norm = nn.BatchNorm1d(width)
        self.share = nn.ParameterDict({name: nn.Parameter(torch.tensor(-0.3)) for name in sizes})  # epsilon
        self.threshold = nn.Parameter(torch.zeros(()))  # theta
        self.graphs = nn.ModuleDict({name: nn.ModuleList([nn.Linear(width, width), nn.Linear(width, width)]) for name in sizes})
        self.imputed_score = nn.ModuleDict({name: nn.Linear(width, 1) for name in sizes})  # a
        self.own_score = nn.ModuleDict({name: nn.Linear(width, 1) for name in sizes})  # b
        self.kinds = nn.Parameter(0.02 * torch.randn(len(sizes), width))
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout, batch_first=True)
        self.fuse = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        hidden = 2 * width
        self.classifier = nn.Sequential(nn.Linear(len(sizes) * width, hidden), nn.SELU(), nn.Dropout(dropout), nn.Linear(hidden, outputs))
        self.norm_weight = norm_weight

    def forward(self, features: Features, present: Tensor) -> Tensor:
        return self._logits(self._mapped(features, present), present)

    def loss(self, features: Features, present: Tensor, target: Tensor) -> Tensor:
        x = self._mapped(features, present)
        gaps = []
        for i, (name, of) in enumerate(x.items()):
            rows = present[:, i : i + 1]
            gaps.append(((self.projections[name](of) * rows).norm() - (of * rows).norm()).abs())
        return task_loss(self._logits(x, present), target) + self.norm_weight * torch.stack(gaps).sum()

    def similarity(self, x: Features, present: Tensor) -> Tensor:
        """S [B, B] of features that are mapped: in [0, 1], zero below the threshold and where two samples have no modality in common."""
        total = common = present.new_zeros(len(present), len(present), dtype=self.threshold.dtype)
        for i, (name, of) in enumerate(x.items()):
            share = self.share[name].sigmoid()
            there = present[:, i]
            kernel = (1 - share) * gaussian_kernel(self.norm(self.projections[name](of)), there) + share * gaussian_kernel(
                self.norm(of), there
            )
            both = (there.unsqueeze(1) & there).to(of.dtype)
            total, common = total + kernel * both, common + both
        above = F.relu(total / common.clamp(min=1) - self.threshold.sigmoid())
        return above + (above > 0) * self.threshold.sigmoid().detach()

    def complete(self, x: Features, present: Tensor) -> Tensor:
        """Features [B, m, width]: mixed with those of similar samples where a modality is present, made up of them where it is not."""
        s = self.similarity(x, present)
        done = []
        for i, (name, own) in enumerate(x.items()):
            rows = present[:, i : i + 1]
            near = s * rows.T  # no features are taken from where there are none, but rows without them take some
            near = near / near.sum(1, keepdim=True).clamp(min=torch.finfo(s.dtype).eps)
            h = torch.where(rows, own, torch.zeros_like(own))
            for layer in cast(nn.ModuleList, self.graphs[name]):
                h = F.selu(layer(near @ h))
            a, b = self.imputed_score[name](h).sigmoid(), self.own_score[name](own).sigmoid()
            done.append(torch.where(rows, (a * h + b * own) / (a + b), h))
        return torch.stack(done, 1)

    def _mapped(self, features: Features, present: Tensor) -> Features:
        """Mapped to one width; a present row stands in an absent one's place, so that batch norm sees what there is."""
        return {name: filled(self.maps[name](f), present[:, i]) for i, (name, f) in enumerate(features.items())}

    def _logits(self, x: Features, present: Tensor) -> Tensor:
        return self.classifier(self.fuse(self.complete(x, present) + self.kinds).flatten(1))
