"""What the examples train: an encoder with two heads, where the first task's loss is a hundred times the second's, which is then neglected."""

import torch
from torch import Tensor, nn

torch.manual_seed(0)
torch.set_num_threads(1)  # everything here is small
x = torch.randn(256, 20)
targets = torch.tanh(x @ torch.randn(20, 2))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.encoder = nn.Sequential(nn.Linear(20, 2), nn.Tanh())
        self.heads = nn.ModuleList([nn.Linear(2, 1), nn.Linear(2, 1)])

    def forward(self, x: Tensor) -> list[Tensor]:
        y = self.encoder(x)
        return [head(y) for head in self.heads]


def errors(outputs: list[Tensor], targets: Tensor) -> list[Tensor]:
    return [(out - target).square().mean() for out, target in zip(outputs, targets.split(1, 1), strict=True)]


def losses(outputs: list[Tensor], targets: Tensor) -> list[Tensor]:
    first, second = errors(outputs, targets)
    return [100 * first, second]


@torch.no_grad()
def worst(model: nn.Module) -> float:
    """The larger of the two tasks' mean squared errors."""
    return float(max(errors(model(x), targets)))
