"""MUSE: the graph of samples and modalities, trained to say the same of a sample when edges are missing."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmfast.models.fusion.base import Features, Fusion, network, random_subset, task_loss
from mmfast.models.fusion.graph import Graph
from mmfast.models.multimodal.junction import Junction
from mmfast.resolvers.names import ResolverLike

SCALE = 1 / 0.07  # of cosines, in the contrastive losses


def info_nce(u: Tensor, v: Tensor) -> Tensor:
    """The symmetric contrastive loss: each row of u [B, n] is to find its own row of v, and the other way round.

    Example:
        >>> round(info_nce(torch.eye(2), torch.eye(2)).item(), 9) < 1e-5
        True
    """
    logits, own = SCALE * u @ v.T, torch.arange(len(u), device=u.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def same_label(u: Tensor, v: Tensor, target: Tensor) -> Tensor:
    """Binary cross-entropy of all pairs of rows of u and v [B, n], which are to agree where they have the same target [B] or [B, C]."""
    labels = target.flatten(1) if target.dim() > 1 else target.unsqueeze(1)
    same = (labels.unsqueeze(0) == labels.unsqueeze(1)).all(2).to(u.dtype)
    of = [F.binary_cross_entropy_with_logits(SCALE * a @ b.T, same) for a, b in ((u, u), (u, v), (v, u))]
    return (2 * of[0] + of[1] + of[2]) / 4


class MUSE(Fusion):
    """Message passing as in `Grape`, on the graph as it is and with edges left out; contrastive losses bring the two results together.

    Nodes begin as ones for a sample and learned for a modality; an edge has the modality's features, mapped to one width. In the second
    pass half of the samples keep a random number of their n modalities, 1 to n - 1. With u the normalised tanh of a linear map of a
    sample's node, and v that of the second pass, training adds half of the symmetric InfoNCE of u and v, and half of the binary
    cross-entropy of uu', uv' and vu' (weights 1/2, 1/4, 1/4) against "same label"; cosines are multiplied by 1/0.07. Predictions take the
    first pass; they depend on the batch, as with `Grape`. The three losses meet at the samples' nodes of both passes; with a `resolver` a block
    resolves their gradients there (`block.stats()`).

    Wu et al., "Multimodal patient representation learning with missing modalities and labels", ICLR 2024, as released (no rows without
    labels).

    Args:
        sizes: d_i by name.
        outputs: number of logits, C.
        width: of nodes, edges and u.
        layers: of messages.
        dropout: of the edges' first attributes and between layers.
        resolver: the rule of the block; None adds the gradients.

    Example:
        >>> features, present = {"image": torch.randn(8, 4), "sound": torch.randn(8, 3)}, torch.rand(8, 2) > 0.3
        >>> fusion = MUSE({"image": 4, "sound": 3}, 10, width=16)
        >>> fusion(features, present).shape, fusion.loss(features, present, torch.randint(10, (8,))).shape
        (torch.Size([8, 10]), torch.Size([]))
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        outputs: int,
        width: int = 128,
        layers: int = 2,
        dropout: float = 0.25,
        resolver: ResolverLike | None = None,
    ) -> None:
        super().__init__()
        self.edges = nn.ModuleDict({name: nn.Linear(d, width) for name, d in sizes.items()})
        self.modalities = nn.Parameter(torch.randn(len(sizes), width) / math.sqrt(width))
        self.graph = Graph(width, width, width, layers, normalize=False, dropout=dropout)
        self.dropout = nn.Dropout(dropout)
        self.projection = nn.Linear(width, width)
        self.classifier = network(width, width, outputs)
        self.block = None if resolver is None else Junction(("task", "passes", "labels"), resolver)

    def forward(self, features: Features, present: Tensor) -> Tensor:
        return self.classifier(self._samples(self._attributes(features), present))

    def loss(self, features: Features, present: Tensor, target: Tensor) -> Tensor:
        attributes = self._attributes(features)
        nodes = [self._samples(attributes, there) for there in (present, self._fewer(present))]
        to_task, to_passes, to_labels = (nodes,) * 3 if self.block is None else self.block(nodes)
        passes = info_nce(*map(self._projected, to_passes))
        u, v = map(self._projected, to_labels)
        return task_loss(self.classifier(to_task[0]), target) + 0.5 * passes + 0.5 * same_label(u, v, target)

    def _projected(self, nodes: Tensor) -> Tensor:
        return F.normalize(self.projection(nodes).tanh(), dim=1)

    def _fewer(self, present: Tensor) -> Tensor:
        """Where half of the samples that have several modalities keep some of them."""
        there, draws = present.sum(1), torch.rand(2, len(present), device=present.device)
        size = 1 + (draws[0] * (there - 1).clamp(min=0)).long()
        return random_subset(present, torch.where((draws[1] < 0.5) & (there > 1), size, there))

    def _attributes(self, features: Features) -> Tensor:
        return self.dropout(torch.stack([self.edges[name](f) for name, f in features.items()], 1))

    def _samples(self, attributes: Tensor, there: Tensor) -> Tensor:
        return self.graph(attributes.new_ones(len(attributes), attributes.shape[2]), self.modalities, attributes, there)
