"""A variational autoencoder with one linear head per feature; what lies between the shared decoder and the heads is exchangeable."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmfast.models.likelihoods import Joint

Join = Callable[[nn.ModuleList], nn.Module]  # from the heads to a module that applies them all: y -> [raw_1, ..., raw_K]


class Loop(nn.Module):
    """The heads one after the other, without a block: autograd sums their gradients."""

    def __init__(self, branches: nn.ModuleList) -> None:
        super().__init__()
        self.branches = branches

    def forward(self, y: Tensor) -> list[Tensor]:
        return [branch(y) for branch in self.branches]


def layers(sizes: Sequence[int], activation: type[nn.Module]) -> list[nn.Module]:
    return [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), activation())]


class VAE(nn.Module):
    """The tabular VAE of Javaloy et al. (ICML 2022): standard normal prior, three layers on either side.

    Args:
        joint: the likelihoods of the K features.
        hidden: width of the layers, and of the representation that the heads share.
        latent: dimensions of z.
        join: makes the module that applies the heads; `Loop` is the model without a block.
    """

    def __init__(self, joint: Joint, hidden: int, latent: int, join: Join = Loop) -> None:
        super().__init__()
        k = len(joint.sizes)
        self.joint = joint
        self.encoder = nn.Sequential(nn.Dropout(0.1), nn.BatchNorm1d(k), *layers([k, hidden, hidden, hidden], nn.Tanh))
        self.mean, self.std = nn.Linear(hidden, latent), nn.Linear(hidden, latent)
        self.decoder = nn.Sequential(*layers([latent, hidden, hidden, hidden], nn.ReLU))
        heads = nn.ModuleList(nn.Linear(hidden, size) for size in joint.sizes)
        for part, gain in ((self.encoder, 5 / 3), (self.decoder, 2**0.5), (self.mean, 1.0), (self.std, 1.0), (heads, 1.0)):
            for m in part.modules():
                if isinstance(m, nn.Linear):
                    nn.init.xavier_uniform_(m.weight, gain)
                    nn.init.constant_(m.bias, 0.01)
        self.branches = list(heads)  # a plain list: they are registered once, in what joins them
        self.heads = join(heads)

    def decode(self, y: Tensor) -> Tensor:
        """All heads' outputs, side by side, from what they share."""
        return torch.cat(self.heads(y), -1)

    def loss(self, x: Tensor, seen: Tensor) -> Tensor:
        """The negative evidence lower bound of a batch, one sample of z, with the missing cells left out."""
        h = self.encoder(x * seen)
        mean, std = self.mean(h), F.softplus(self.std(h)) + 1e-6
        z = mean + std * torch.randn_like(std)
        log_prob = (self.joint.log_prob(self.decode(self.decoder(z)), x) * seen).sum()
        kl = 0.5 * (mean.square() + std.square() - 1).sum() - std.log().sum()
        return kl - log_prob

    @torch.no_grad()
    def reconstruct(self, x: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Predictions [rows, K] and log-likelihoods [rows, K] at z = its mean."""
        was_training = self.training
        self.eval()
        raw = self.decode(self.decoder(self.mean(self.encoder(x * seen))))
        self.train(was_training)
        return self.joint.predict(raw), self.joint.log_prob(raw, x)

    def gradients(self, x: Tensor, seen: Tensor) -> list[Tensor]:
        """The K gradients that meet at the shared representation, one per feature, at z = its mean."""
        with torch.no_grad():
            y = self.decoder(self.mean(self.encoder(x * seen)))
        y.requires_grad_()
        losses = -(self.joint.log_prob(torch.cat([head(y) for head in self.branches], -1), x) * seen).sum(0)
        return [torch.autograd.grad(loss, y, retain_graph=True)[0] for loss in losses]
