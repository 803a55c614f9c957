"""ELBO, IWAE and SIWAE: one formula, over which index set the mean stands inside the logarithm."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from mmfast.models.multimodal.mixture import log_mean_exp, log_mixture

INSIDE = {"elbo": "", "iwae": "k", "siwae": "sk"}  # the axes of log-weights whose mean is taken inside the logarithm


class Densities(NamedTuple):
    """Everything that log-weights are made of, at the samples z_s of each component."""

    log_x: dict[str, Tensor]  # log p(x_d | z), [S, K, B]; zero where x_d is absent
    log_z: Tensor  # log p(z), [S, K, B]
    log_q: tuple[Tensor, ...]  # log q_s'(z_s), [S, S', K, B] in one part along S' or several

    def log_weights(self, valid: Tensor | None, scales: Mapping[str, float]) -> Tensor:
        """[S, K, B]"""
        log_joint = self.log_z
        for name, log_x in self.log_x.items():
            log_joint = log_joint + scales.get(name, 1.0) * log_x
        return log_joint - log_mixture(torch.cat(self.log_q, 1), valid)


def over_samples(log_w: Tensor, objective: str) -> Tensor:
    """[S, B] from log-weights [S, K, B]."""
    return log_w.logsumexp(1) - math.log(log_w.shape[1]) if "k" in INSIDE[objective] else log_w.mean(1)


def over_components(each: Tensor, valid: Tensor | None, objective: str) -> Tensor:
    """The bound [B] from those of the components, [S, B], of which a sample has the valid ones."""
    if "s" in INSIDE[objective]:
        return log_mean_exp(each, valid, -2)
    return each.mean(0) if valid is None else each.masked_fill(~valid, 0).sum(0) / valid.sum(0)


def bound(log_w: Tensor, valid: Tensor | None, objective: str) -> Tensor:
    """Of log p(x), [B]. Its gradient weighs log-weights by their softmax over the axes inside, by equal parts over the others."""
    return over_components(over_samples(log_w, objective), valid, objective)
