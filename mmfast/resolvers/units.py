"""Sizes of gradients that were seen at different calls, in one unit. Mirrors csrc/solvers/units.h.

The gradients of a call have a factor in common that says nothing about them, the loss scale, and it may be another one at the next call. So only
ratios within a call count. Rows whose sizes are comparable form a set; where rows of several sets meet in a call, the sets become one, in the unit
in which they have changed alike in the mean: the same as one unit for all where the scale stays and gradients keep their length.
"""

import torch
from torch import Tensor

from mmfast.resolvers.base import Problem


def to_one_unit(p: Problem, ratio: Tensor, sets: Tensor, units: Tensor, now: Tensor | bool = True) -> tuple[Tensor, Tensor]:
    """Each row's set and unit [B, K] after a call in which the present rows' sizes are `ratio` [B, K] times what is kept of them.

    A set is numbered by its first row, from 1; 0 is none yet, and a row with none makes one `now`, with a ratio of 1. ratio * units are comparable.
    """
    index = torch.arange(sets.shape[-1], device=sets.device)
    fresh = p.active & (sets == 0) & now
    own = torch.where(fresh, index, len(index)).amin(-1, keepdim=True) + 1.0
    sets, units = torch.where(fresh, own, sets), torch.where(fresh, 1.0, units)
    present = (sets.unsqueeze(-1) == sets.unsqueeze(-2)) & p.active.unsqueeze(-2)  # [B, K, K]: row j is there and of the set of row i
    mean = torch.where(present, (ratio * units).unsqueeze(-2), 0).cumsum(-1)[..., -1] / present.sum(-1).clamp(min=1)
    first = p.active.int().argmax(-1, keepdim=True)
    into = sets.gather(-1, first)
    joins = present.any(-1) & (sets != into)
    return torch.where(joins, into, sets), torch.where(joins, units * (mean.gather(-1, first) / mean), units)


def common_change(p: Problem, change: Tensor) -> Tensor:
    """The mean of the present rows' comparable changes [B, 1]."""
    return torch.where(p.active, change, 0).cumsum(-1)[..., -1:] / p.count.unsqueeze(-1)
