"""Rules that withstand corrupted gradients. Mirrors csrc/solvers/robust.h."""

import torch
from torch import Tensor

from mmfast.resolvers.base import Problem, Rule


class Krum(Rule):
    """The mean of the gradients closest to their neighbours (Blanchard et al., "Machine learning with adversaries", NIPS 2017).

    Each gradient is scored by its distances to its k - n_byzantine - 2 nearest others, of the k that are present. With fewer than
    n_byzantine + 3 present no gradient can be told apart, and the result is their mean. Equal scores: the lower index.

    Args:
        n_byzantine: how many gradients may be corrupted; a block needs n_byzantine + 3 gradients or more.
        n_selected: how many gradients to average; more than 1 is Multi-Krum.
        distance: "squared" as in the paper, or "plain".
    """

    method = 19

    def __init__(self, n_byzantine: int, n_selected: int = 1, distance: str = "squared", *, every: int = 1) -> None:
        for name, value, least in (("n_byzantine", n_byzantine, 0), ("n_selected", n_selected, 1)):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"Krum: {name} is {value!r}, expected an integer, {least} or more")
        if distance not in ("squared", "plain"):
            raise ValueError(f"Krum: distance is {distance!r}, expected 'squared' or 'plain'")
        super().__init__(every=every)
        self.n_byzantine, self.n_selected, self.distance = n_byzantine, n_selected, distance

    def check(self, k: int) -> None:
        if k < self.n_byzantine + 3:
            raise ValueError(
                f"Krum: n_byzantine is {self.n_byzantine}, which takes {self.n_byzantine + 3} gradients or more; there are {k}"
            )
        if k < self.n_selected:
            raise ValueError(f"Krum: n_selected is {self.n_selected}, expected at most the number of gradients, {k}")

    def params(self) -> list[float]:
        return [float(self.n_byzantine), float(self.n_selected), float(self.distance == "squared")]

    def rule(self, p: Problem) -> Tensor:
        k, count = p.G.shape[-1], p.active.sum(-1, keepdim=True)
        square = p.G.diagonal(dim1=-2, dim2=-1)
        product = p.G.triu(1)
        product = product + product.mT  # rounding must not tell the distance of a pair from one side and the other
        total = square.unsqueeze(-1) + square.unsqueeze(-2)
        distance = total - 2 * product
        distance = torch.where(distance > 4 * p.precision * total, distance, 0)  # below it they are equal as far as the Gramian tells
        if self.distance == "plain":
            distance = distance.sqrt()
        others = p.active.unsqueeze(-2) & ~torch.eye(k, dtype=torch.bool, device=p.G.device)
        nearest = torch.where(others, distance, torch.inf).sort(-1).values
        neighbours = count - self.n_byzantine - 2
        score = torch.zeros_like(square)
        for place in range(k - self.n_byzantine - 2):  # one by one, so that equal distances give equal sums on every device
            score = score + torch.where(place < neighbours, nearest[..., place], 0)
        order = torch.where(p.active, score, torch.inf).argsort(dim=-1, stable=True)
        selected = count.clamp(max=self.n_selected)
        w = torch.zeros_like(score).scatter(-1, order, (torch.arange(k, device=p.G.device) < selected) / selected.double())
        return torch.where(neighbours < 1, 1 / count.double(), w)

    def extra_repr(self) -> str:
        return f"n_byzantine={self.n_byzantine}, n_selected={self.n_selected}, distance={self.distance!r}"
