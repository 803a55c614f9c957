"""What the tests of multimodal VAEs share: small networks, batches with absent cells, and the bound of every sample by itself, in loops."""

import math
from itertools import combinations

import torch
from torch import nn
from torch.distributions import Independent, Normal

from mmfast.models.multimodal import Modality, MultimodalVAE

SIZES = {"image": 5, "sound": 3, "text": 4}
LATENT, ROWS = 2, 6
SCALES = {"image": 1.0, "sound": 2.5, "text": 0.5}


class Encoder(nn.Module):
    def __init__(self, size, latent=LATENT):
        super().__init__()
        self.hidden, self.out = nn.Linear(size, 6), nn.Linear(6, 2 * latent)

    def forward(self, x):
        mean, std = self.out(torch.tanh(self.hidden(x))).chunk(2, -1)
        return mean, nn.functional.softplus(std) + 0.1


def log_prob(raw, x):
    """Of a Laplace distribution; torch.distributions checks values, which a tensor on the meta device has not."""
    return (-(raw - x).abs() / 0.75 - math.log(1.5)).sum(-1)


def decoder(size, latent=LATENT):
    return nn.Sequential(nn.Linear(latent, 5), nn.Tanh(), nn.Linear(5, size))


def make(mixture="moe", objective="siwae", samples=3, blocks="", resolver=None, names=tuple(SIZES), seed=0):
    torch.manual_seed(seed)
    modalities = {name: Modality(Encoder(SIZES[name]), decoder(SIZES[name]), log_prob, SCALES[name]) for name in names}
    return MultimodalVAE(modalities, LATENT, mixture, objective, samples, blocks, resolver).double()


def batch(rows=ROWS, names=tuple(SIZES)):
    g = torch.Generator().manual_seed(1)
    return {name: torch.randn(rows, SIZES[name], generator=g, dtype=torch.float64) for name in names}


def absences():
    """Everything there, one missing, two missing, nothing there."""
    rows = [(1, 1, 1), (1, 0, 1), (0, 1, 1), (0, 0, 1), (1, 0, 0), (0, 0, 0)]
    return {name: torch.tensor([bool(row[i]) for row in rows]) for i, name in enumerate(SIZES)}


def noise_of(vae, seed, rows=ROWS):
    torch.manual_seed(seed)
    return torch.randn(len(vae.components), vae.samples, rows, vae.latent, dtype=torch.float64)


def loss_of(vae, x, present, noise):
    """vae.loss with this noise [S, K, B, latent] of all its components."""
    q = vae._encode(x, present)
    own = [0] if vae.mixture == "poe" else [vae.components.index(subset) for subset in q.components]
    return vae._loss(vae._densities(q, q.at(noise[own].to(q.mean.dtype))), q.valid)


def subsets(names, mixture):
    """Of the modalities that a sample has; for "poe" all of them."""
    if mixture == "poe":
        return [tuple(names)]
    return [c for n in range(1, len(names) + 1) for c in combinations(names, n) if n == 1 or mixture == "mopoe"]


def product(experts, with_prior):
    """The product of Gaussians, precisions added up."""
    precisions = [1 / std**2 for _, std in experts] + [torch.ones(LATENT, dtype=torch.float64)] * with_prior
    means = [mean for mean, _ in experts] + [torch.zeros(LATENT, dtype=torch.float64)] * with_prior
    total = sum(precisions)
    return sum(p * m for p, m in zip(precisions, means, strict=True)) / total, total**-0.5


class Row:
    """One sample: its components, their draws and log-weights, from nothing but what is present for it."""

    def __init__(self, vae, x, row, present, noise):
        self.names = [name for name in x if present is None or present[name][row]]
        self.parts = subsets(self.names, vae.mixture)
        everything = subsets(tuple(x), vae.mixture)
        experts = {name: vae.modalities[name].encoder(x[name][row : row + 1]) for name in self.names}
        experts = {name: (mean[0], std[0]) for name, (mean, std) in experts.items()}
        if not self.names:
            self.z = self.log_w = None
            return
        of_parts = [product([experts[name] for name in part], vae.mixture == "poe") for part in self.parts]
        draws = [noise[0 if vae.mixture == "poe" else everything.index(part), :, row] for part in self.parts]
        self.z = [mean + std * eps for (mean, std), eps in zip(of_parts, draws, strict=True)]
        fixed = [Independent(Normal(mean.detach(), std.detach()), 1) for mean, std in of_parts]
        self.log_x, self.log_q, log_w = [], [], []
        for z in self.z:
            log_x = {name: vae.modalities[name].scale * log_prob(vae.modalities[name].decoder(z), x[name][row]) for name in self.names}
            log_q = [q.log_prob(z) for q in fixed]
            mixture = torch.stack([q.exp() for q in log_q]).mean(0).log()
            self.log_x.append(log_x)
            self.log_q.append(log_q)
            log_w.append(Normal(0.0, 1.0).log_prob(z).sum(-1) + sum(log_x.values()) - mixture)
        self.log_w = torch.stack(log_w)  # [S of this row, K]

    def weights(self, objective):
        """The softmax over the index set, divided by the sizes of the axes that are not in it (models.md 1.7)."""
        w = self.log_w.detach()
        if objective == "elbo":
            return torch.ones_like(w) / w.numel()
        return w.softmax(1) / w.shape[0] if objective == "iwae" else w.flatten().softmax(0).view_as(w)

    def bound(self, objective):
        w = self.log_w.exp()
        return {"elbo": lambda: self.log_w.mean(), "iwae": lambda: w.mean(1).log().mean(), "siwae": lambda: w.mean().log()}[objective]()


def grads(vae, loss):
    vae.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in vae.named_parameters() if p.grad is not None}


def assert_same(a, b, rtol=1e-9, atol=1e-11):
    assert a.keys() == b.keys() and a
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")
