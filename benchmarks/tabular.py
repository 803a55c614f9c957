"""A whole training step of a tabular VAE with K linear heads: LinearHeads against one plain layer, against loops, against the naive block.

The step: encoder of three layers of 50, S samples of z, decoder of three layers of 50, K heads of two outputs with normal likelihoods, the IWAE
bound (the ELBO at S = 1), backward, Adam; batches of 128. Fused forms take the likelihoods of all heads in one call, loops take them head by head.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mmfast as mf
from benchmarks import naive
from benchmarks.timing import Call
from mmfast.models.likelihoods import Normal
from mmfast.models.vae import mlp

BATCH, HIDDEN = 128, 50


class Fused(nn.Module):
    """The heads of one layer; all likelihoods at once."""

    def __init__(self, layer: nn.Module, k: int) -> None:
        super().__init__()
        self.layer, self.k = layer, k

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        raw = self.layer.joint(y) if isinstance(self.layer, mf.LinearHeads) else self.layer(y)
        return Normal().log_prob(raw.unflatten(-1, (self.k, 2)), x).sum(-1)


class Loop(nn.Module):
    """K heads one after the other; `split` makes K aliases of their input."""

    def __init__(self, k: int, split: Callable[[Tensor], Sequence[Tensor]]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(HIDDEN, 2) for _ in range(k))
        self.split = split

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        terms = [Normal().log_prob(head(part), x[:, d]) for d, (head, part) in enumerate(zip(self.heads, self.split(y), strict=True))]
        return torch.stack(terms).sum(0)


class Parts(nn.Module):
    """The heads of one layer, taken apart: each part has its own likelihood, as where the modalities differ in kind."""

    def __init__(self, layer: nn.Module, k: int) -> None:
        super().__init__()
        self.layer, self.k = layer, k

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        parts = self.layer(y) if isinstance(self.layer, mf.LinearHeads) else self.layer(y).split([2] * self.k, -1)
        return torch.stack([Normal().log_prob(part, x[:, d]) for d, part in enumerate(parts)]).sum(0)


class Step:
    """One training step of the model with the given heads."""

    def __init__(self, k: int, samples: int, heads: nn.Module) -> None:
        latent = (k + 1) // 2
        self.samples, self.heads = samples, heads
        self.encoder, self.decoder = (
            mlp([k, *[HIDDEN] * 3], nn.Tanh),
            mlp([latent, *[HIDDEN] * 3], nn.ReLU),
        )
        self.posterior = nn.Linear(HIDDEN, 2 * latent)
        parameters = [p for m in (self.encoder, self.posterior, self.decoder, heads) for p in m.parameters()]
        self.x = torch.randn(BATCH, k)
        self.optimizer = torch.optim.Adam(parameters, lr=1e-3, capturable=self.x.is_cuda)  # so that a CUDA graph can hold the step

    def loss(self, noise: Tensor) -> Tensor:
        mean, spread = self.posterior(self.encoder(self.x)).chunk(2, -1)
        std = F.softplus(spread) + 1e-6
        z = mean + std * noise
        log_w = self.heads(self.decoder(z), self.x) + (0.5 * (noise.square() - z.square()) + std.log()).sum(-1)
        return -torch.logsumexp(log_w, 0).sum()

    def noise(self) -> Tensor:
        return torch.randn(self.samples, BATCH, self.posterior.out_features // 2, device=self.x.device)

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        self.loss(self.noise()).backward()
        self.optimizer.step()


def steps(k: int, samples: int, resolver: Callable[[int], mf.Resolver], rule: str) -> dict[str, Call]:
    """The calls of one case, by provider."""
    found: dict[str, Call] = {
        "ours": Step(k, samples, Fused(mf.LinearHeads(HIDDEN, [2] * k, resolver(k)), k)),
        "fused": Step(k, samples, Fused(nn.Linear(HIDDEN, 2 * k), k)),
        "parts": Step(k, samples, Parts(mf.LinearHeads(HIDDEN, [2] * k, resolver(k)), k)),
        "split": Step(k, samples, Parts(nn.Linear(HIDDEN, 2 * k), k)),
        "loop": Step(k, samples, Loop(k, lambda y: [y] * k)),
    }
    if rule in naive.RULES:
        loops = naive.RULES[rule](k)
        found["naive"] = Step(k, samples, Loop(k, lambda y: naive.fork(y, k, loops)))
    return found


def gate(k: int, resolver: Callable[[int], mf.Resolver]) -> tuple[float, bool]:
    """(largest error of the resolved gradient relative to its norm, against the same heads behind a block in float64; whether it may be timed)."""
    torch.manual_seed(0)
    heads = mf.LinearHeads(HIDDEN, [2] * k, resolver(k))
    torch.manual_seed(0)
    rule = resolver(k)  # of the same random stream
    block = mf.ImpartialityBlock([nn.Linear(HIDDEN, 2) for _ in range(k)], rule).double()
    rule.load_state_dict(heads.resolver.state_dict())
    with torch.no_grad():
        for branch, weight, bias in zip(block.branches, heads.weight.split(2), heads.bias.split(2), strict=True):  # type: ignore[union-attr,arg-type]
            branch.weight.copy_(weight)  # type: ignore[union-attr,operator]
            branch.bias.copy_(bias)  # type: ignore[union-attr,operator]
    y = torch.randn(BATCH, HIDDEN)
    delta = torch.randn(BATCH, 2 * k) * torch.logspace(-1, 0, k).repeat_interleave(2)
    ours, exact = y.clone().requires_grad_(), y.double().requires_grad_()
    heads.joint(ours).backward(delta)
    torch.cat(tuple(block(exact)), -1).backward(delta.double())
    assert ours.grad is not None and exact.grad is not None
    error = float((ours.grad - exact.grad).norm() / exact.grad.norm())
    return error, error < 1e-3
