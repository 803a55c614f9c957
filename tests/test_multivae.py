"""A published multimodal VAE that nobody here wrote, MultiVae's MMVAE: its latents are found, and one line puts a block at each."""

import copy
import sys
from pathlib import Path

import pytest
import torch

import mmfast as mf

pytestmark = pytest.mark.filterwarnings("ignore")  # of packages of 2023 on a torch of today
SHAPES, K, BATCH, LATENT = {"image": (1, 28, 28), "sound": (1, 28, 28)}, 3, 4, 8


@pytest.fixture(scope="module")
def multivae():
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        sys.path.insert(0, str(Path(__file__).parent / "stand_ins"))
    pytest.importorskip("multivae.models", exc_type=ImportError)
    return sys.modules["multivae"]


def model_and_data(multivae, **options):
    from multivae.data.datasets.base import MultimodalBaseDataset

    torch.manual_seed(0)
    config = multivae.models.MMVAEConfig(n_modalities=2, input_dims=SHAPES, latent_dim=LATENT, K=K, **options)
    model = multivae.models.MMVAE(config).double()
    return model, MultimodalBaseDataset({name: torch.rand(BATCH, *shape).double() for name, shape in SHAPES.items()})


def reconstruction_terms(model, data, out):
    """Minus the log-likelihood of each modality from the latents of all."""
    return {name: -sum(model.recon_log_probs[name](recon[name], data.data[name]).sum() for recon in out.recon.values()) for name in SHAPES}


def grads(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def by_hand(model, data, rule):
    """The loss of the model, with a fork written into its loop over decoders."""
    posteriors, detached, latents, recons = {}, {}, {}, {}
    for name, x in data.data.items():
        out = model.encoders[name](x)
        mean, std = out.embedding, model.log_var_to_std(out.log_covariance)
        posteriors[name], detached[name] = model.post_dist(mean, std), model.post_dist(mean.detach(), std.detach())
        latents[name] = posteriors[name].rsample([K])
        branches = mf.fork(latents[name].reshape(-1, LATENT), 2, rule)
        recons[name] = {
            other: model.decoders[other](z)["reconstruction"].reshape(K, BATCH, *SHAPES[other])
            for other, z in zip(data.data, branches, strict=True)
        }
    dreg = model.model_config.loss == "dreg_looser"
    loss = model.dreg_looser if dreg else model.iwae_looser
    return loss(detached if dreg else posteriors, latents, recons, data).loss


def test_its_latents_are_found(multivae):
    model, data = model_and_data(multivae)
    out = model(data, detailed_output=True)
    found = mf.find_blocks(reconstruction_terms(model, data, out), model)
    assert sorted((b.producer.split(" ")[0], b.shape, b.terms) for b in found) == [
        (f"encoders.{name}.embedding", (K, BATCH, LATENT), ("image", "sound")) for name in SHAPES
    ]
    assert {b.attach_line() for b in found} == {"mf.attach([model.decoders.image, model.decoders.sound], mf.UPGrad())"}


@pytest.mark.parametrize(("rule", "loss"), [(mf.IMTLG, "dreg_looser"), (mf.MGDA, "iwae_looser")])
def test_one_line_trains_it_as_a_block_by_hand(multivae, rule, loss):
    model, data = model_and_data(multivae, loss=loss)
    same, plain = copy.deepcopy(model), copy.deepcopy(model)
    mf.attach([model.decoders.image, model.decoders.sound], rule())
    for step in (lambda: model(data).loss, lambda: by_hand(same, data, rule()), lambda: plain(data).loss):
        torch.manual_seed(1)
        step().backward()
    found, wanted, without = grads(model), grads(same), grads(plain)
    assert found.keys() == wanted.keys() == without.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-10, atol=1e-10, msg=name)
    assert not torch.allclose(found["encoders.image.embedding.weight"], without["encoders.image.embedding.weight"])
