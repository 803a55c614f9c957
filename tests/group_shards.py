"""A batch that the ranks of a group have parts of, and what they compare, for the cases of test_group.py."""

import torch

import mmfast as mf

K, D = 5, 7
SIZES = (3, 5, 2, 4)  # samples of each rank


class Shards:
    """A batch of K gradients that each rank has a part of, the same whole one on every rank."""

    def __init__(self, rank, world, seed=0, dtype=torch.float32, shape=(D,)):
        generator = torch.Generator().manual_seed(seed)
        self.sizes = SIZES[:world]
        self.whole = torch.randn(K, sum(self.sizes), *shape, generator=generator, dtype=torch.float64).to(dtype)
        self.part = slice(sum(self.sizes[:rank]), sum(self.sizes[: rank + 1]))

    def mine(self):
        return self.whole[:, self.part]


def seeded(rank, make):
    """A resolver that draws from a stream of its own on each rank, and one as the first rank has it."""
    torch.manual_seed(100)
    first = make(K)
    torch.manual_seed(100 + rank)
    return make(K), first


def through_fork(grads, rule, **kwargs):
    """The resolved gradient of K given ones, None for one that is missing."""
    y = torch.zeros_like(next(g for g in grads if g is not None)).requires_grad_()
    aliases = mf.fork(y, len(grads), rule, **kwargs)
    sum((a * g).sum().real for a, g in zip(aliases, grads, strict=True) if g is not None).backward()
    return y.grad


def close(ours, expected, scale, tolerance=1e-5):
    """Equal to rounding, relative to the length of the longest of the gradients or of the result."""
    size = max(scale, expected.double().norm().item(), 1e-30)
    error = (ours.double() - expected.double()).norm().item() / size
    assert error <= tolerance, f"differs by {error:.2e} of the gradients' size"


def raises(error, words, call):
    try:
        call()
    except error as raised:
        assert words in str(raised), str(raised)
    else:
        raise AssertionError(f"no error: {words}")
