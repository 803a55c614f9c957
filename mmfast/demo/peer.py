"""TorchJD as a rival, where it is installed: its aggregator in the block's place, and the way that its manual shows."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mmfast.demo.model import Join
from mmfast.demo.naive import Materialised, keep_norm
from mmfast.models.vae import VAE

COMMON = "UPGrad"  # TorchJD's own rule, the one to compare by where it lacks the block's
INSTALL = "pip install 'torchjd[quadprog-projector]'"  # without the extra it has no UPGrad


def aggregator(name: str) -> Any:
    """TorchJD's aggregator of that name, or None where TorchJD is not installed or does not have it."""
    try:
        import torchjd.aggregation as peers
    except ImportError:
        return None
    try:
        return getattr(peers, name)()
    except (AttributeError, TypeError, ImportError):  # not there, or compulsory arguments, or dependencies of its own
        return None


def rule(wanted: str) -> str | None:
    """The rule by which the two libraries can be compared: the wanted one, or the common one, or None where TorchJD has neither."""
    return next((name for name in (wanted, COMMON) if aggregator(name) is not None), None)


def in_place(name: str) -> Join:
    """Its aggregator where the block is, at the length of the plain sum as ours: one backward pass for all losses, the fastest way to use it."""
    aggregate = aggregator(name)
    assert aggregate is not None, name
    return partial(Materialised, aggregate=lambda g: keep_norm([aggregate(g)], g))


def mtl_stepper(model: VAE, name: str) -> Callable[[Tensor, Tensor], None]:
    """A training step by `mtl_backward` and `jac_to_grad`, as its manual shows: the rule is at the shared parameters, a backward pass for each loss.

    All losses go back at once (vmap), which takes 0.8 of the time of one after the other.
    """
    from torchjd.autojac import jac_to_grad, mtl_backward

    aggregate = aggregator(name)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    shared = [p for part in (model.encoder, model.mean, model.std, model.decoder.body) for p in part.parameters()]

    def step(x: Tensor, seen: Tensor) -> None:
        optimiser.zero_grad()
        mean, std = model.posterior(x, seen)
        z = mean + std * torch.randn_like(mean)
        features = model.decoder.body(z)
        losses = -model.joint.log_prob(model.decoder.heads(features), x, seen).sum(0)
        mtl_backward(losses.unbind(), features=features, shared_params=shared, retain_graph=True)
        jac_to_grad(shared, aggregate)
        divergence = 0.5 * (z.square() - ((z - mean) / std).square()) - std.log()  # the ELBO's other part, which no head sees
        divergence.sum().backward()
        optimiser.step()

    return step
