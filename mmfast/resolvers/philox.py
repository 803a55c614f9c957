"""Philox4x32-10 in plain torch: the same draws as csrc/solvers/philox.h, on any device, without host synchronisation."""

import math

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF


def _mul_hi_lo(constant: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low words of constant * x for 32-bit x held in int64 (the full product would overflow int64)."""
    low, high = constant & 0xFFFF, constant >> 16
    middle = high * (x & 0xFFFF) + ((low * (x & 0xFFFF)) >> 16)
    middle_low = low * (x >> 16) + (middle & 0xFFFF)
    return (high * (x >> 16) + (middle >> 16) + (middle_low >> 16)) & _LOW, (x * constant) & _LOW


def philox(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four 32-bit words (as int64) of each counter (c0, c1, c2, c3); the arguments broadcast."""
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(10):
        hi0, lo0 = _mul_hi_lo(0xD2511F53, c0)
        hi1, lo1 = _mul_hi_lo(0xCD9E8D57, c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return c0, c1, c2, c3


_ONE_CALL: dict[torch.device, Tensor] = {}


def advance(rng: Tensor) -> None:
    """Moves a random stream (seed, counter) on by one call, in place."""
    if torch.compiler.is_compiling() or type(rng) is not Tensor:  # a fake tensor must not be kept
        rng[1] += 1
        return
    step = _ONE_CALL.get(rng.device)
    if step is None:
        if rng.is_cuda and torch.cuda.is_current_stream_capturing():  # a graph's own memory holds nothing until it is replayed
            rng[1:].add_(1)
            return
        step = _ONE_CALL[rng.device] = torch.arange(2, device=rng.device)  # (0, 1), and nothing comes from the host
    rng.add_(step)  # a third of the time of an indexed addition


class Draw:
    """The random streams of a batch of problems at one step of a chain; `place` [...] gives draws [batch, ...]."""

    def __init__(self, rng: Tensor, batch: int, step: int, streams: int | None = None) -> None:
        self.rng, self.step = rng, step
        self.problem = torch.arange(batch, device=rng.device) % (streams or max(batch, 1))  # a batch that holds them again draws alike

    def _bits(self, place: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        problem = self.problem.view(-1, *[1] * place.dim())
        step = torch.full_like(problem, self.step)
        return philox(self.rng[0], place.expand(problem.shape[0], *place.shape), problem, step, self.rng[1] & _LOW)

    def integer(self, place: Tensor) -> Tensor:
        """A 32-bit integer for each place, as int64."""
        return self._bits(place)[0]

    def uniform(self, place: Tensor) -> Tensor:
        """A float64 in the open interval (0, 1) for each place."""
        v0, v1, _, _ = self._bits(place)
        return (((v0 << 20) ^ (v1 >> 12)).double() + 0.5) * 2.0**-52

    def normal(self, place: Tensor) -> Tensor:
        """A standard normal float64 for each place (Box and Muller, from the uniforms 2 place and 2 place + 1)."""
        u, v = self.uniform(2 * place), self.uniform(2 * place + 1)
        return torch.sqrt(-2 * torch.log(u)) * torch.cos(2 * math.pi * v)
