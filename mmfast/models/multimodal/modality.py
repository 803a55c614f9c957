"""Modality: what a multimodal VAE knows of one kind of data."""

import contextlib
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from mmfast.backends.reference import autocasts
from mmfast.precision import wide


class Modality(nn.Module):
    """One kind of data of a `MultimodalVAE`: how it is encoded, decoded and judged.

    Args:
        encoder: x [B, *] to (mean, std), each [B, latent], of its Gaussian expert; std is positive.
        decoder: z [..., latent] to raw [..., *], for any number of leading dimensions.
        log_prob: (raw [..., B, *], x [B, *]) to the log-probability [..., B], summed over features, constants included; of float32 tensors where a network
            works in 16 bits.
        scale: beta, a factor on the log-probability within the loss (the local step); `log_likelihood` leaves it out.

    Raises:
        TypeError, ValueError: scale is no positive number, or something is not callable.

    Example:
        >>> encoder = lambda x: (x[:, :2], torch.ones_like(x[:, :2]))
        >>> log_prob = lambda raw, x: torch.distributions.Normal(raw, 1.0).log_prob(x).sum(-1)
        >>> Modality(encoder, nn.Linear(2, 3), log_prob, scale=0.5).scale
        0.5
    """

    def __init__(
        self,
        encoder: Callable[[Tensor], tuple[Tensor, Tensor]],
        decoder: Callable[[Tensor], Tensor],
        log_prob: Callable[[Tensor, Tensor], Tensor],
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        for name, part in (("encoder", encoder), ("decoder", decoder), ("log_prob", log_prob)):
            if not callable(part):
                raise TypeError(f"{name} is a {type(part).__name__}, expected a function or an nn.Module")
        if not isinstance(scale, (int, float)) or not 0 < scale < math.inf:
            raise ValueError(f"scale is {scale!r}, expected a positive number")
        self.encoder, self.decoder, self.log_prob, self.scale = encoder, decoder, log_prob, float(scale)

    def expert(self, x: Tensor, latent: int, name: str) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation [B, latent] of its Gaussian, as the encoder gives them."""
        found = self.encoder(x)
        shape = (x.shape[0], latent)
        if not isinstance(found, (tuple, list)) or len(found) != 2 or any(tuple(t.shape) != shape for t in found):
            shapes = [tuple(t.shape) for t in found] if isinstance(found, (tuple, list)) else f"a {type(found).__name__}"
            raise ValueError(f"the encoder of {name!r} gives {shapes}, expected (mean, std), each of shape {shape}")
        return found[0], found[1]

    def judge(self, raw: Tensor, x: Tensor, shape: torch.Size, name: str) -> Tensor:
        """log p(x | z) of raw parameters, not scaled, of z's shape but for the last dimension; in float32 at least."""
        with torch.autocast(raw.device.type, enabled=False) if autocasts(raw) else contextlib.nullcontext():
            found = self.log_prob(wide(raw), wide(x))
        if found.shape != shape:
            raise ValueError(
                f"log_prob of {name!r} gives shape {tuple(found.shape)}, expected {tuple(shape)}, that of z but for its last dimension"
            )
        return found

    def extra_repr(self) -> str:
        return f"scale={self.scale:g}"
