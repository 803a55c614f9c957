"""The VAE of the demonstration: what lies between the shared decoder and the heads is exchangeable."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mmfast.models.likelihoods import Joint
from mmfast.models.vae import VAE

Join = Callable[[nn.ModuleList], nn.Module]  # from the heads to a module that applies them all: y -> [raw_1, ..., raw_K]


class Loop(nn.Module):
    """The heads one after the other, without a block: autograd sums their gradients."""

    def __init__(self, branches: nn.ModuleList) -> None:
        super().__init__()
        self.branches = branches

    def forward(self, y: Tensor) -> list[Tensor]:
        return [branch(y) for branch in self.branches]


class Joined(nn.Module):
    """Heads that some module applies, their outputs side by side."""

    def __init__(self, branches: nn.ModuleList, join: Join) -> None:
        super().__init__()
        self.branches = list(branches)  # a plain list: they are registered once, in what joins them
        self.join = join(branches)

    def forward(self, y: Tensor) -> Tensor:
        return torch.cat(self.join(y), -1)


def make_model(joint: Joint, hidden: int, latent: int, join: Join = Loop) -> VAE:
    """The VAE with a loop over its heads, or whatever else joins them."""
    model = VAE(joint, hidden, latent)
    branches = nn.ModuleList(nn.Linear(hidden, size) for size in joint.sizes)
    joined = model.decoder.heads
    for branch, weight, bias in zip(branches, joined.weight.split(joint.sizes), joined.bias.split(joint.sizes), strict=True):  # type: ignore[operator]
        branch.weight.data, branch.bias.data = weight.detach().clone(), bias.detach().clone()
    model.decoder.heads = Joined(branches, join)
    return model


def gradients(model: VAE, x: Tensor, seen: Tensor) -> list[Tensor]:
    """The K gradients that meet at the shared representation, one per feature, at z = its mean."""
    was_training = model.training
    model.eval()  # looking must not move the encoder's statistics, nor use up random numbers
    with torch.no_grad():
        y = model.decoder.body(model.posterior(x, seen)[0])
    model.train(was_training)
    heads: list[nn.Linear] = list(model.decoder.heads.branches)  # type: ignore[union-attr, arg-type]
    raw = [head(y) for head in heads]
    loss = -(model.joint.log_prob(torch.cat(raw, -1), x) * seen).sum()
    # a feature's loss sees its own head alone, so one backward pass to the heads' outputs serves all of them
    return [delta @ head.weight.detach() for delta, head in zip(torch.autograd.grad(loss, raw), heads, strict=True)]
