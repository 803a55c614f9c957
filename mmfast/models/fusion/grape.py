"""Grape: samples and modalities as a graph, whose messages make up for what is missing."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mmfast.models.fusion.base import Features, Fusion, network
from mmfast.models.fusion.graph import Graph


class Grape(Fusion):
    """Message passing on the graph of samples and modalities: an edge for each modality that a sample has, with its features.

    Nodes begin as ones for a sample and one-hot for a modality. Each step of training leaves out a share of the edges. Samples see one
    another by way of the modalities' nodes, so a prediction depends on the batch that it is made in.

    After You et al., "Handling missing data with graph representation learning" (GRAPE), NeurIPS 2020, whose features are scalars and whose
    task is a regression: here an edge has the modality's features, mapped to one width, a classifier takes a sample's node instead of its
    imputed row, and nothing of test rows is seen in training. That it fuses modalities so is our reading of the comparison in Chaudhuri et
    al. (ICML 2025).

    Args:
        sizes: d_i by name.
        outputs: number of logits, C.
        width: of nodes and edges, and of the classifier's hidden layer.
        layers: of messages.
        drop: share of the edges that a step of training leaves out.

    Example:
        >>> features = {"image": torch.randn(8, 4), "sound": torch.randn(8, 3)}
        >>> Grape({"image": 4, "sound": 3}, 10)(features, torch.rand(8, 2) > 0.3).shape
        torch.Size([8, 10])
    """

    def __init__(self, sizes: Mapping[str, int], outputs: int, width: int = 16, layers: int = 2, drop: float = 0.3) -> None:
        super().__init__()
        if not 0 <= drop < 1:
            raise ValueError(f"drop is {drop!r}, expected a share, 0 <= drop < 1")
        self.edges = nn.ModuleDict({name: nn.Linear(d, width) for name, d in sizes.items()})
        self.graph = Graph(len(sizes), width, width, layers, normalize=True)
        self.classifier = network(width, width, outputs)
        self.drop = drop

    def forward(self, features: Features, present: Tensor) -> Tensor:
        attributes = torch.stack([self.edges[name](f) for name, f in features.items()], 1)
        b, m, _ = attributes.shape
        there = present
        if self.training and self.drop:
            there = present & (torch.rand(present.shape, device=present.device) >= self.drop)
        samples = attributes.new_ones(b, m)
        modalities = torch.eye(m, dtype=attributes.dtype, device=attributes.device)
        return self.classifier(self.graph(samples, modalities, attributes, there))
