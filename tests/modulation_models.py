"""Models whose gradients are modulated, and a step of them, for the tests of gradient modulation."""

import torch
from torch import nn
from torch.nn import functional as F

import mmfast as mf

N, C = 12, 4
KINDS = {
    "OGM": lambda k: mf.OGM(k, alpha=0.4),
    "AGM": lambda k: mf.AGM(k, alpha=0.7),
    "CGGM": lambda k: mf.CGGM(k, rho=k / (k - 1)),
}


def batch(k, seed=0, scale=2.0):
    """Logits of k modalities, the later the better they know the labels, and the labels."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(C, (N,), generator=g)
    right = F.one_hot(labels, C)
    return [scale * torch.randn(N, C, generator=g) + i * right for i in range(k)], labels


class Late(nn.Module):
    """Encoders whose features a sum of linear heads fuses."""

    def __init__(self, scale, k=2):
        super().__init__()
        self.scale = scale
        self.encoders = nn.ModuleList([nn.Sequential(nn.Linear(5, 6), nn.Tanh()) for _ in range(k)])
        self.heads = nn.ModuleList([nn.Linear(6, C) for _ in range(k)])

    def forward(self, x):
        features = [encoder(x) for encoder in self.encoders]
        if self.scale is not None:
            features = self.scale(features)
        return [head(feature) for head, feature in zip(self.heads, features, strict=True)]


class Shared(nn.Module):
    """Branches of one tensor that predict the same labels."""

    def __init__(self, kind, rule, local, k=2, **kwargs):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(5, 6), nn.Tanh())
        if kind == "heads":
            self.block = mf.LinearHeads(6, [C] * k, rule, local=local, **kwargs)
        else:
            branches = [nn.Linear(6, C) for _ in range(k)]
            self.block = mf.ImpartialityBlock(branches, rule, local=local, **kwargs) if kind == "block" else nn.ModuleList(branches)
            self.attached = [mf.attach(self.block, rule, local=local, **kwargs)] if kind == "attach" else []

    def forward(self, x):
        y = self.encoder(x)
        return [head(y) for head in self.block] if isinstance(self.block, nn.ModuleList) else self.block(y)


def data(seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(N, 5, generator=g), torch.randint(C, (N,), generator=g)


def loss_of(logits, labels):
    return sum((i + 1) * F.cross_entropy(x, labels) for i, x in enumerate(logits)) + F.cross_entropy(sum(logits), labels)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def step(model, scale, x, labels, forward=None):
    model.zero_grad()
    logits = (model if forward is None else forward)(x)
    if scale is not None:
        scale.update(logits, labels)
    loss_of(logits, labels).backward()
    return gradients(model)
