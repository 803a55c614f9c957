"""The classifiers that judge what a model of MNIST-SVHN-Text generates: one for each modality, from its input to ten logits."""

import torch
from torch import Tensor, nn


def image_classifier(channels: int, side: int) -> nn.Module:
    """For images [B, channels, side, side]: two convolutions with dropout and two linear layers.

    Example:
        >>> image_classifier(3, 32)(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    left = ((side - 4) // 2 - 4) // 2
    return nn.Sequential(
        nn.Conv2d(channels, 10, 5),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Conv2d(10, 20, 5),
        nn.Dropout2d(),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(20 * left * left, 50),
        nn.ReLU(),
        nn.Dropout(),
        nn.Linear(50, 10),
    )


class _Residual(nn.Module):
    """A convolution of four that halves the length, beside one that does so in one step."""

    def __init__(self, inputs: int, outputs: int, padding: int) -> None:
        super().__init__()
        self.long = nn.Sequential(nn.ReLU(), nn.Conv1d(inputs, inputs, 1), nn.ReLU(), nn.Conv1d(inputs, outputs, 4, 2, padding))
        self.short = nn.Conv1d(inputs, outputs, 4, 2, padding)

    def forward(self, x: Tensor) -> Tensor:
        return self.short(x) + self.long(x)


class TextClassifier(nn.Module):
    """For one-hot text [B, 8, 71]: convolutions with 128, 192 and 128 channels, the last two residual, dropout and a linear layer.

    The published one ends in a sigmoid, which changes no decision; this one ends in logits.

    Example:
        >>> TextClassifier()(torch.zeros(2, 8, 71)).shape
        torch.Size([2, 10])
    """

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Conv1d(71, 128, 1), _Residual(128, 192, 1), _Residual(192, 128, 0), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(128, 10)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x.transpose(1, 2))


def classifier(modality: str) -> nn.Module:
    """The one of "mnist", "svhn" or "text"."""
    kinds = {"mnist": lambda: image_classifier(1, 28), "svhn": lambda: image_classifier(3, 32), "text": TextClassifier}
    return kinds[modality]()


@torch.no_grad()
def decide(network: nn.Module, x: Tensor, batch: int = 1000) -> Tensor:
    """The likeliest class of each input, int64 [B]."""
    return torch.cat([network(part).argmax(1) for part in x.split(batch)])
