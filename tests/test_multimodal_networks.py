"""The networks of MNIST-SVHN-Text: shapes, scales, log-probabilities and the published sizes."""

import pytest
import torch

from mmfast.models.multimodal import MultimodalVAE, networks
from mmfast.models.multimodal.classifiers import classifier
from mmfast.models.multimodal.networks import character_log_prob, mnist_svhn_text, pixel_log_prob

SHAPES = {"mnist": (1, 28, 28), "svhn": (3, 32, 32), "text": (8, 71)}


def inputs(rows):
    generator = torch.Generator().manual_seed(0)
    text = torch.nn.functional.one_hot(torch.randint(0, 71, (rows, 8), generator=generator), 71).float()
    return {name: torch.rand(rows, *SHAPES[name], generator=generator) for name in ("mnist", "svhn")} | {"text": text}


@pytest.mark.parametrize("width", [1.0, 0.5, 0.25])
@pytest.mark.parametrize("name", SHAPES)
def test_shapes_and_ranges(name, width):
    modality = mnist_svhn_text(6, width)[name]
    mean, std = modality.encoder(inputs(3)[name])
    assert mean.shape == std.shape == (3, 6) and (std > 0).all()
    if name != "text":  # a softmax times the number of dimensions
        torch.testing.assert_close(std.mean(1), torch.ones(3))
    for lead in ((), (3,), (2, 5, 3)):
        z = torch.randn(*lead, 6)
        raw = modality.decoder(z)
        assert raw.shape == (*lead, *SHAPES[name])
        torch.testing.assert_close(raw.reshape(-1, *SHAPES[name])[-1], modality.decoder(z.reshape(-1, 6)[-1]), rtol=1e-4, atol=1e-5)
        shown = networks.mean(name, raw)
        assert shown.min() >= 0 and shown.max() <= 1
        if name == "text":
            torch.testing.assert_close(shown.sum(-1), torch.ones(*lead, 8))


def test_parameters_of_the_decoders_are_as_many_as_published():
    count = {name: sum(p.numel() for p in m.decoder.parameters()) for name, m in mnist_svhn_text().items()}
    assert count == {"mnist": 322_784, "svhn": 206_563, "text": 143_175}
    assert sum(p.numel() for p in mnist_svhn_text(width=0.5)["svhn"].decoder.parameters()) < 207_000 / 3


def test_pixels_at_the_ends_have_a_finite_log_probability():
    raw = networks.Pixels()(torch.tensor([-1e4, 0.0, 1e4]))
    torch.testing.assert_close(raw, torch.tensor([1e-6, 0.5, 1 - 1e-6]), rtol=1e-7, atol=0)


def test_log_probabilities_are_those_of_the_distributions():
    location, x = torch.rand(2, 4, 3, 5, 5, dtype=torch.float64), torch.rand(4, 3, 5, 5, dtype=torch.float64)
    expected = torch.distributions.Laplace(location, 0.75).log_prob(x).sum((-3, -2, -1))
    torch.testing.assert_close(pixel_log_prob(location, x), expected)
    logits = torch.randn(2, 4, 8, 71, dtype=torch.float64)
    text = inputs(4)["text"].double()
    expected = torch.distributions.OneHotCategorical(logits=logits).log_prob(text).sum(-1)
    torch.testing.assert_close(character_log_prob(logits.log_softmax(-1), text), expected)


def test_the_local_step_is_that_of_the_paper():
    scales = {name: m.scale for name, m in mnist_svhn_text().items()}
    assert scales == pytest.approx({"mnist": 3.918, "svhn": 1.0, "text": 5.408}, abs=1e-3)


@pytest.mark.parametrize("mixture", ["poe", "moe", "mopoe"])
def test_they_make_a_model(mixture):
    vae = MultimodalVAE(mnist_svhn_text(5, 0.25), 5, mixture, "siwae", 2, "pqs", "pcgrad")
    vae.loss(inputs(3)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in vae.parameters())
    assert vae.log_likelihood(inputs(3), 4).shape == (3,)


@pytest.mark.parametrize("rows", [0, 1])
def test_batches_without_rows_and_of_one(rows):
    vae = MultimodalVAE(mnist_svhn_text(5, 0.25), 5, "mopoe", "siwae", 2, "pqs", "pcgrad")
    loss = vae.loss(inputs(rows))
    loss.backward()
    assert (
        (loss == 0) == (rows == 0)
        and vae.log_likelihood(inputs(rows), 4).shape == (rows,)
        and vae.sample(inputs(rows)).shape == (1, rows, 5)
    )


@pytest.mark.parametrize("name", SHAPES)
def test_classifiers_have_ten_logits_and_drop_out_in_training_alone(name):
    torch.manual_seed(0)
    x, network = inputs(4)[name], classifier(name)
    assert not torch.equal(network(x), network(x))
    assert network.eval()(x).shape == (4, 10) and torch.equal(network(x), network(x))
    network(x).sum().backward()
    assert all(p.grad.any() for p in network.parameters())
