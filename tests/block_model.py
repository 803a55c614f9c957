"""A small model with a block in it, for the block's tests."""

import torch
from torch import Tensor, nn

from mmfast.blocks.block import ImpartialityBlock
from mmfast.resolvers.base import Resolver

K, B, H = 3, 6, 5


class ByLength(Resolver):
    """Every present gradient at unit length; counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))

    def forward(self, G: Tensor, mask: Tensor | None = None) -> Tensor:
        self.calls.add_(1)
        d = G.diagonal(dim1=-2, dim2=-1)
        present = d > 0 if mask is None else (d > 0) & mask
        return torch.where(present, d.clamp(min=1e-300).rsqrt(), 0)


def materialised(y: Tensor, branches, losses) -> list[Tensor | None]:
    """The gradient of each branch's loss at y, by plain autograd."""
    leaf = y.detach().clone().requires_grad_()
    grads = []
    for branch, loss in zip(branches, losses, strict=True):
        value = loss(branch(leaf))
        grads.append(torch.autograd.grad(value, leaf)[0] if isinstance(value, Tensor) else None)
    return grads


LOSSES = [lambda o: o.square().sum(), lambda o: 3 * o.sin().sum(), lambda o: o.exp().mean()]


def make_branches(dtype=torch.float64):
    return [nn.Sequential(nn.Linear(H, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype) for _ in range(K)]


class Model(nn.Module):
    """A shared layer and a block; branch outputs are summed into one loss."""

    def __init__(self, resolver=None, dtype=torch.float64, **kwargs):
        super().__init__()
        self.shared = nn.Linear(4, H, dtype=dtype)
        self.block = ImpartialityBlock(make_branches(dtype), resolver or ByLength(), **kwargs)

    def forward(self, x, mask=None):
        return self.block(self.shared(x).tanh(), mask)


def total(outputs, used=range(K)):
    return sum(LOSSES[i](outputs[i]) for i in used)


def gradients(model, x, used=range(K), forward=None):
    model.zero_grad()
    total((model if forward is None else forward)(x), used).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
