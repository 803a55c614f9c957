"""Tabular models whose networks work in 16 bits: their densities and bounds do not."""

import math

import pytest
import torch
from test_vae import HIDDEN, LATENT, ROWS, K, batch, gradients, joint
from torch.nn import functional as F

import mmfast as mf
from mmfast.models.hivae import HIVAE
from mmfast.models.likelihoods import Categorical, Joint, Normal, Poisson
from mmfast.models.vae import VAE

MAKERS = {
    "elbo": lambda: VAE(joint(), HIDDEN, LATENT, [mf.MGDA()]),
    "iwae": lambda: VAE(joint(), HIDDEN, LATENT, [mf.MGDA()], "iwae", 4),
    "dreg": lambda: VAE(joint(), HIDDEN, LATENT, [mf.MGDA(), mf.PCGrad()], "dreg", 4),
    "hivae": lambda: HIVAE(joint(), LATENT, 2, 4, [mf.MGDA(), mf.PCGrad()]),
}


def data(dtype=torch.float32):
    x, seen = batch()
    return x.to(dtype), seen.to(dtype)


@pytest.mark.parametrize("objective, samples", [("elbo", 1), ("iwae", 5)])
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_the_bound_is_that_of_what_the_networks_gave(objective, samples, low, monkeypatch):
    """Under autocast the networks round; from there on every digit of float32 counts: a log-weight of 100 in bfloat16 is off by a quarter of a nat, which IWAE takes the exponential of."""
    torch.manual_seed(0)
    model, (x, seen) = VAE(joint(), HIDDEN, LATENT, [mf.MGDA()], objective, samples), data()
    model.encoder[0].p = 0.0
    with torch.no_grad():
        model.decoder.heads.bias.mul_(300)  # densities far from what they should be
    noise, given = torch.randn(samples, ROWS, LATENT), {}
    for name in ("mean", "std", "decoder"):
        getattr(model, name).register_forward_hook(lambda _, args, out, name=name: given.__setitem__(name, out.detach()))
    monkeypatch.setattr(torch, "randn", lambda *shape, **_: noise)
    with torch.autocast("cpu", low):
        loss = model.loss(x, seen)
    assert {of.dtype for of in given.values()} == {low} and loss.dtype == torch.float32
    mean, std = given["mean"].double(), F.softplus(given["std"].double()) + 1e-6
    z, wide = mean + std * noise.double(), joint().double()
    log_w = wide.in_torch(given["decoder"].double(), x.double(), seen.double()).sum(-1) + (
        0.5 * (noise.double().square() - z.square()) + std.log()
    ).sum(-1)
    exact = -(log_w.logsumexp(0) - math.log(samples)).sum()
    assert exact.abs() > 300
    torch.testing.assert_close(loss.double(), exact, rtol=2e-6, atol=0)


@pytest.mark.parametrize("name", MAKERS)
def test_autocast_is_near_single_precision(name):
    x, seen = data()
    torch.manual_seed(0)
    model = MAKERS[name]()
    found = []
    for on in (False, True):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            loss = model.loss(x, seen)
            predicted, log_p = model.reconstruct(x, seen)
        assert {loss.dtype, predicted.dtype, log_p.dtype} == {torch.float32}
        found.append((loss, gradients(model, loss)))
    (full, exact), (rounded, low) = found
    assert (rounded - full).abs() < 2e-2 * full.abs()
    assert all((low[n] - exact[n]).norm() < 0.2 * exact[n].norm() + 1e-2 for n in exact)


@pytest.mark.parametrize("name", MAKERS)
def test_a_model_in_bfloat16(name):
    x, seen = data(torch.bfloat16)
    torch.manual_seed(0)
    model = MAKERS[name]().bfloat16()
    loss = model.loss(x, seen)
    assert loss.dtype == torch.float32 and all(g.isfinite().all() and g.dtype == torch.bfloat16 for g in gradients(model, loss).values())
    predicted, log_p = model.reconstruct(x, seen)
    assert predicted.dtype == log_p.dtype == torch.float32 and predicted.shape == log_p.shape == (ROWS, K)
    assert torch.equal(model.joint.w, joint().w)


def test_densities_and_predictions_of_16_bits_are_those_of_float32():
    """300 counts are no number of bfloat16, nor is class 257."""
    torch.manual_seed(0)
    part = Joint([Poisson(), Normal(), Categorical(300)], torch.tensor([1.0, 1.3, 1.0]))
    raw = torch.randn(ROWS, sum(part.sizes)).bfloat16()
    raw[:, 0], raw[:, 3 + 257] = 5.75, 100.0
    x = torch.stack([torch.full((ROWS,), 256.0), torch.randn(ROWS), torch.full((ROWS,), 256.0)], 1).bfloat16()
    predicted = part.predict(raw)
    assert predicted.dtype == torch.float32 and (predicted[:, 0] == 314).all() and (predicted[:, 2] == 257).all()
    for function in (part.log_prob, part.in_torch):
        found = function(raw, x)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, part.in_torch(raw.float(), x.float()), rtol=2e-5, atol=1e-4)
