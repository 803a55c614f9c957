"""The posterior: a mixture over subsets of modalities, each component a product of Gaussian experts."""

import math
from collections.abc import Sequence
from functools import reduce
from itertools import combinations
from operator import add, and_
from typing import NamedTuple

import torch
from torch import Tensor

from mmfast.models.multimodal.inputs import Batch

MIXTURES = ("poe", "moe", "mopoe")
_NEGLIGIBLE = {torch.float32: 50.0, torch.float64: 370.0}  # exp of minus it has a square at the end of what the type holds


def components_of(names: Sequence[str], mixture: str) -> list[tuple[str, ...]]:
    """The subsets that a mixture has a component for, the small ones first."""
    if mixture == "poe":
        return [tuple(names)]
    sizes = range(1, 2 if mixture == "moe" else len(names) + 1)
    return [subset for size in sizes for subset in combinations(names, size)]


def valid_components(components: Sequence[Sequence[str]], present: dict[str, Tensor]) -> Tensor:
    """Which components a sample has, bool [S, B]: those whose modalities are all there. Where nothing is, all of them, for each is then the prior."""
    whole = torch.stack([reduce(and_, (present[name] for name in subset)) for subset in components])
    return whole | ~whole.any(0)


def _shares(logs: Tensor) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """exp(logs - top) along dimension 1, one by one, their sum, and top, the largest. Added in order: a share of zero changes no bit, wherever it stands."""
    top = logs.detach().amax(1)
    shares = (logs - top.unsqueeze(1)).exp().unbind(1)
    return shares, reduce(add, shares), top


def products(
    experts: dict[str, tuple[Tensor, Tensor]], components: Sequence[Sequence[str]], present: dict[str, Tensor] | None, prior: bool
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [S, B, latent] of the product of each component's experts that are present.

    `prior` adds the expert N(0, I); where no other is present it stands alone. An expert's share is its part of the summed precision, from the precisions' logarithms: no
    scale overflows, the mean of one expert's product is its own, and an absent one changes no bit.
    """
    logs = {name: -2 * std.log() for name, (_, std) in experts.items()}  # of the precisions
    means = {name: mean for name, (mean, _) in experts.items()}
    nowhere = torch.full_like(next(iter(logs.values())), -torch.inf)
    if present is not None:
        there = {name: present[name].unsqueeze(-1) for name in experts}
        logs = {name: torch.where(there[name], log, nowhere) for name, log in logs.items()}
        means = {name: mean.masked_fill(~there[name], 0) for name, mean in means.items()}  # a share of zero does not take away a NaN
    each = [log if name in subset else nowhere for subset in components for name, log in logs.items()]
    rows = torch.stack(each).unflatten(0, (len(components), len(logs)))  # [S, D, B, latent]
    alone = rows.isneginf().all(1, keepdim=True)
    of_prior = torch.zeros_like(rows[:, :1]) if prior else torch.where(alone, 0.0, -torch.inf).to(rows.dtype)
    rows = torch.cat([of_prior, rows], 1)
    shares, total, _ = _shares(rows)
    mean = reduce(add, (share * mean for share, mean in zip(shares[1:], means.values(), strict=True))) / total
    _, total, top = _shares(rows)  # anew: the way back from a narrow std is not to be added to that from the mean, whose parts cancel
    return mean, (-0.5 * (top + total.log())).exp()


def log_prior(z: Tensor) -> Tensor:
    """log N(z; 0, I) [...] of z [..., latent], up to the constant that every Gaussian here shares."""
    return -0.5 * z.square().sum(-1)


def log_expert(z: Tensor, away: Tensor, std: Tensor) -> Tensor:
    """log N(z; mean, std) [...], up to that constant, as a function of z alone; `away` is z - mean, but not from z, whose last digit may be more than std."""
    return -0.5 * ((away + (z - z.detach())) / std).square().sum(-1) - std.log().sum(-1)


def log_mean_exp(x: Tensor, valid: Tensor | None, dims: tuple[int, ...]) -> Tensor:
    """Along some dimensions, over the entries that are valid (a mask that broadcasts against x); all of them for None.

    What lies so far below the largest that the square of its share vanishes is left out: it changes no digit, and a rule, to which small gradients may count as much as large
    ones, takes it as missing, as it takes every gradient whose squares vanish. Shares that small would make denormal numbers of a whole backward pass, which a CPU is
    slow with: the log-weights of images lie hundreds apart, and a step took up to twice as long.
    """
    if valid is not None:
        x = x.masked_fill(~valid, -torch.inf)
    total = x.masked_fill(x < x.detach().amax(dims, keepdim=True) - _NEGLIGIBLE[x.dtype], -torch.inf).logsumexp(dims)
    if valid is None:
        return total - math.log(math.prod([x.shape[dim] for dim in dims]))  # torch.compile takes no generator there
    return total - valid.expand_as(x).sum(dims).to(x.dtype).log()


def log_mixture(log_q: Tensor, valid: Tensor | None) -> Tensor:
    """log of the mean of the components' densities, [S, K, B] from [S, S', K, B]."""
    return log_mean_exp(log_q, None if valid is None else valid.unsqueeze(1), (1,))


class Draws(NamedTuple):
    """Of each component."""

    z: Tensor  # [S, K, B, latent]
    away: Tensor  # from the component's mean; of z itself, which is rounded to a ten millionth of that mean, a narrow component's noise is not to be had


class Posterior(NamedTuple):
    """The mixture of a batch."""

    batch: Batch
    components: list[tuple[str, ...]]  # those of the modalities that are given
    mean: Tensor  # [S, B, latent]
    std: Tensor
    valid: Tensor | None  # bool [S, B], the components that a sample has; None: all of them
    low: dict[str, torch.dtype]  # of a modality whose network works in 16 bits: what its decoder is given

    def draw(self, samples: int) -> Draws:
        """Some from each component."""
        s, rows, latent = self.mean.shape
        return self.at(torch.randn(s, samples, rows, latent, device=self.mean.device, dtype=self.mean.dtype))

    def at(self, noise: Tensor) -> Draws:
        """Those that come of noise [S, K, B, latent]."""
        away = self.std.unsqueeze(1) * noise
        return Draws(self.mean.unsqueeze(1) + away, away)
