"""Messages on the graph whose edges join each sample of a batch with the modalities that it has, as GRAPE passes them."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Edges = tuple[Tensor, Tensor]  # attributes [B, m, e] of the edges to samples and of those to modalities


def mean_along(values: Tensor, there: Tensor, dim: int) -> Tensor:
    """The mean of [B, m, n] over the edges along a dimension; zero where there is none."""
    kept = torch.where(there.unsqueeze(2), values, torch.zeros_like(values))
    return kept.sum(dim) / there.sum(dim).clamp(min=1).unsqueeze(1)


class Messages(nn.Module):
    """A layer of GRAPE (You et al., NeurIPS 2020): m_ij = ReLU(W [x_j; e_ij]), then h_i = ReLU(Q [mean of m_ij; x_i]).

    Args:
        nodes, edges: size of x and of e.
        outputs: size of h.
        normalize: whether h has Euclidean length 1.

    Its forward takes x of samples [B, n] and of modalities [m, n], the `Edges`, and bool [B, m], where an edge is.
    """

    def __init__(self, nodes: int, edges: int, outputs: int, normalize: bool) -> None:
        super().__init__()
        self.message, self.update, self.normalize = nn.Linear(nodes + edges, outputs), nn.Linear(outputs + nodes, outputs), normalize

    def forward(self, samples: Tensor, modalities: Tensor, edges: Edges, there: Tensor) -> tuple[Tensor, Tensor]:
        b, m = there.shape
        from_modalities = self.message(torch.cat([modalities.expand(b, -1, -1), edges[0]], 2)).relu()
        from_samples = self.message(torch.cat([samples.unsqueeze(1).expand(-1, m, -1), edges[1]], 2)).relu()
        return self._updated(mean_along(from_modalities, there, 1), samples), self._updated(mean_along(from_samples, there, 0), modalities)

    def _updated(self, message: Tensor, x: Tensor) -> Tensor:
        h = self.update(torch.cat([message, x], 1)).relu()
        return F.normalize(h, dim=1) if self.normalize else h


class Graph(nn.Module):
    """Layers of `Messages`, with e <- ReLU(P [h_source; h_target; e]) between them.

    Args:
        nodes: size of the first x; the further ones have `width`.
        edges: size of the first e, likewise.
        width: of nodes and edges.
        layers: how many.
        normalize: see `Messages`.
        dropout: between the layers, of the nodes.

    Its forward takes x of samples and modalities, attributes [B, m, e] that both directions of an edge have at first, and bool [B, m]; it
    returns the samples' h.
    """

    def __init__(self, nodes: int, edges: int, width: int, layers: int, normalize: bool, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            Messages(nodes if i == 0 else width, edges if i == 0 else width, width, normalize) for i in range(layers)
        )
        self.edge_updates = nn.ModuleList(nn.Linear(2 * width + (edges if i == 0 else width), width) for i in range(layers - 1))
        self.dropout = nn.Dropout(dropout)

    def forward(self, samples: Tensor, modalities: Tensor, attributes: Tensor, there: Tensor) -> Tensor:
        edges = attributes, attributes
        for i, layer in enumerate(self.layers):
            samples, modalities = layer(samples, modalities, edges, there)
            if i < len(self.edge_updates):
                edges = self._updated(self.edge_updates[i], samples, modalities, edges)
                samples, modalities = self.dropout(samples), self.dropout(modalities)
        return samples

    def _updated(self, update: nn.Module, samples: Tensor, modalities: Tensor, edges: Edges) -> Edges:
        b, m, _ = edges[0].shape
        s, o = samples.unsqueeze(1).expand(-1, m, -1), modalities.expand(b, -1, -1)
        return update(torch.cat([o, s, edges[0]], 2)).relu(), update(torch.cat([s, o, edges[1]], 2)).relu()
