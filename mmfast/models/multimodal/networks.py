"""The networks and likelihoods of MNIST-SVHN-Text, as in the experiments of Javaloy et al. (ICML 2022), at full and at half width.

Encoders take a batch and return mean and standard deviation, [B, latent] each. Decoders take z [..., latent] and return what their log-probability takes:
the locations of pixels in (0, 1), or the log-probabilities of characters.
"""

import math

from torch import Tensor, nn
from torch.nn import functional as F

from mmfast.models.multimodal.modality import Modality

PIXEL_SCALE = 0.75  # of the Laplace distribution of a pixel
SIZES = {"mnist": 784, "svhn": 3072, "text": 568}  # numbers in one input, by which the log-likelihoods are balanced
CHARACTERS = 71
_EPS = 1e-6


class Heads(nn.Module):
    """Mean and scale of a posterior from features; the scales are a softmax times their number, so that their mean is one."""

    def __init__(self, mean: nn.Module, scale: nn.Module) -> None:
        super().__init__()
        self.mean, self.scale = mean, scale

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        mean, scale = self.mean(h).flatten(1), self.scale(h).flatten(1)
        return mean, self.positive(scale)

    def positive(self, scale: Tensor) -> Tensor:
        return scale.shape[1] * scale.softmax(1) + _EPS


class TextHeads(Heads):
    """Those of the text: each scale by itself."""

    def positive(self, scale: Tensor) -> Tensor:
        return F.softplus(scale) + 1e-15


class OnEach(nn.Module):
    """A network that takes vectors [n, latent], on z with any number of leading dimensions."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.network = nn.Sequential(*layers)

    def forward(self, z: Tensor) -> Tensor:
        out = self.network(z.reshape(-1, z.shape[-1]))
        return out.view(*z.shape[:-1], *out.shape[1:])


class Pixels(nn.Module):
    """Locations of pixels, kept off 0 and 1."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sigmoid().clamp(_EPS, 1 - _EPS)


def mnist_encoder(latent: int) -> nn.Module:
    """From [B, 1, 28, 28]: 784 - 400 - mean and scale."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 400), nn.ReLU(), Heads(nn.Linear(400, latent), nn.Linear(400, latent)))


def mnist_decoder(latent: int) -> nn.Module:
    """To [..., 1, 28, 28]: latent - 400 - 784."""
    return OnEach(nn.Linear(latent, 400), nn.ReLU(), nn.Linear(400, 784), Pixels(), nn.Unflatten(1, (1, 28, 28)))


def svhn_encoder(latent: int, width: float = 1.0) -> nn.Module:
    """From [B, 3, 32, 32]: convolutions with 32, 64 and 128 channels (times `width`), each of which halves the sides, and one each for mean and scale."""
    a, b, c = _channels(width)
    body = (nn.Conv2d(3, a, 4, 2, 1), nn.ReLU(), nn.Conv2d(a, b, 4, 2, 1), nn.ReLU(), nn.Conv2d(b, c, 4, 2, 1), nn.ReLU())
    return nn.Sequential(*body, Heads(nn.Conv2d(c, latent, 4), nn.Conv2d(c, latent, 4)))


def svhn_decoder(latent: int, width: float = 1.0) -> nn.Module:
    """To [..., 3, 32, 32]: the mirror image of the encoder."""
    a, b, c = _channels(width)
    layers = (nn.ConvTranspose2d(latent, c, 4), nn.ConvTranspose2d(c, b, 4, 2, 1), nn.ConvTranspose2d(b, a, 4, 2, 1))
    body = [module for layer in layers for module in (layer, nn.ReLU())]
    return OnEach(nn.Unflatten(1, (latent, 1, 1)), *body, nn.ConvTranspose2d(a, 3, 4, 2, 1), Pixels())


def _channels(width: float) -> tuple[int, int, int]:
    return int(32 * width), int(64 * width), int(128 * width)


class _CharactersLast(nn.Module):
    """[B, characters, length] to and from [B, length, characters]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


def text_encoder(latent: int) -> nn.Module:
    """From one-hot [B, 8, 71]: 128 features of each character, two convolutions along them, mean and scale."""
    convolutions = (nn.Conv1d(CHARACTERS, 128, 1), nn.Conv1d(128, 128, 4, 2, 1), nn.Conv1d(128, 128, 4, 2, 0))
    body = [module for convolution in convolutions for module in (convolution, nn.ReLU())]
    return nn.Sequential(_CharactersLast(), *body, nn.Flatten(), TextHeads(nn.Linear(128, latent), nn.Linear(128, latent)))


def text_decoder(latent: int) -> nn.Module:
    """To log-probabilities [..., 8, 71]: the mirror image of the encoder."""
    body = (nn.Linear(latent, 128), nn.ReLU(), nn.Unflatten(1, (128, 1)), nn.ConvTranspose1d(128, 128, 4), nn.ReLU())
    end = (nn.ConvTranspose1d(128, 128, 4, 2, 1), nn.ReLU(), nn.Conv1d(128, CHARACTERS, 1), _CharactersLast(), nn.LogSoftmax(2))
    return OnEach(*body, *end)


def pixel_log_prob(location: Tensor, x: Tensor) -> Tensor:
    """Of images under a Laplace distribution around the locations, with scale 0.75, summed over the pixels.

    Args:
        location: [..., C, H, W].
        x: [B, C, H, W], which broadcasts against it.

    Returns:
        [...], the last three dimensions summed.

    Example:
        >>> pixel_log_prob(torch.zeros(2, 1, 1, 1), torch.tensor(0.75).view(1, 1, 1, 1))
        tensor([-1.4055, -1.4055])
    """
    distance = (location - x).abs().sum((-3, -2, -1))
    return -distance / PIXEL_SCALE - math.prod(x.shape[-3:]) * math.log(2 * PIXEL_SCALE)


def character_log_prob(log_probability: Tensor, x: Tensor) -> Tensor:
    """Of one-hot text [B, length, characters] under the log-probabilities [..., length, characters], summed over the characters of a text.

    Example:
        >>> character_log_prob(torch.tensor([[[0.25, 0.75]]]).log(), torch.tensor([[[0.0, 1.0]]]))
        tensor([-0.2877])
    """
    return (log_probability * x).sum((-2, -1))


def mean(name: str, raw: Tensor) -> Tensor:
    """The mean of the modality's distribution: the locations, or the characters' probabilities."""
    return raw.exp() if name == "text" else raw


def mnist_svhn_text(latent: int = 20, width: float = 1.0) -> dict[str, Modality]:
    """The three modalities with the paper's networks and local step: each log-likelihood times 3072 over the numbers in an input.

    Args:
        latent: dimensions of z.
        width: of SVHN's convolutions; 0.5 takes half as many channels, and 0.43 times the time of a training step of that decoder on a CPU.

    Returns:
        Modality "mnist" of images [B, 1, 28, 28] and "svhn" of [B, 3, 32, 32], in [0, 1], and "text" of one-hot characters [B, 8, 71].

    Example:
        >>> mean, std = mnist_svhn_text()["text"].encoder(torch.zeros(4, 8, 71))
        >>> mean.shape, bool((std > 0).all())
        (torch.Size([4, 20]), True)
    """
    most = max(SIZES.values())
    return {
        "mnist": Modality(mnist_encoder(latent), mnist_decoder(latent), pixel_log_prob, most / SIZES["mnist"]),
        "svhn": Modality(svhn_encoder(latent, width), svhn_decoder(latent, width), pixel_log_prob, most / SIZES["svhn"]),
        "text": Modality(text_encoder(latent), text_decoder(latent), character_log_prob, most / SIZES["text"]),
    }
