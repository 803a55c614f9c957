"""ELBO, IWAE and SIWAE: one formula, over which index set the mean stands inside the logarithm."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from mmfast.models.multimodal.mixture import log_mean_exp, log_mixture

OBJECTIVES = ("elbo", "iwae", "siwae")  # the mean inside the logarithm: of nothing, over samples, over components and samples


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


def bound(log_w: Tensor, valid: Tensor | None, objective: str) -> Tensor:
    """Of log p(x), [B], from log-weights [S, K, B] of which a sample has those of the valid components, [S, B].

    Its gradient weighs log-weights by their softmax over the axes inside the logarithm, by equal parts over the others.
    """
    if objective == "siwae":
        return log_mean_exp(log_w, None if valid is None else valid.unsqueeze(1), (0, 1))
    each = log_mean_exp(log_w, None, (1,)) if objective == "iwae" else log_w.mean(1)
    return each.mean(0) if valid is None else each.masked_fill(~valid, 0).sum(0) / valid.sum(0)
