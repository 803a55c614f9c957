"""Metrics of multimodal VAEs, on models and classifiers made by hand whose scores are known."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mmfast import gram
from mmfast.data.triplets import MODALITIES, Triplets
from mmfast.experiments.multimodal import metrics
from mmfast.experiments.multimodal.conflict import Probe
from mmfast.models.multimodal import Modality, MultimodalVAE, networks
from mmfast.stats import conflict_rate, norms

CPU = torch.device("cpu")
N = 23  # not a multiple of a batch


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch):
    monkeypatch.setattr(metrics, "BATCH", 10)
    torch.manual_seed(0)


@pytest.fixture
def data():
    """Triplets whose inputs hold their digit and nothing else: the first pixel, or all characters."""
    labels = torch.randint(0, 10, (N,))
    images = torch.zeros(N, 28, 28, dtype=torch.uint8)
    images[:, 0, 0] = 25 * labels
    text = labels.to(torch.uint8).unsqueeze(1).expand(N, 8).contiguous()
    coloured = F.pad(images, (0, 4, 0, 4)).unsqueeze(1).expand(N, 3, 32, 32).contiguous()
    return Triplets(images, coloured, text, torch.arange(N), torch.arange(N), labels)


def digit_in(name, x):
    return x[:, 0].argmax(-1) if name == "text" else (x[:, 0, 0, 0] * 255 / 25).round().long()


def by_hand(mixture="moe", shift=None, std=1e-4, decoders=None):
    """A model whose z holds the digit of the modality that it was encoded from, plus `shift` of that modality; decoders give z back, or what is given."""
    shift, decoders = shift or {}, decoders or {}

    def encoder(name):
        return lambda x: (10.0 * F.one_hot((digit_in(name, x) + shift.get(name, 0)) % 10, 10), torch.full((len(x), 10), std))

    def log_prob(raw, x):
        return -raw.square().sum(-1)

    modalities = {
        m: Modality(encoder(m), decoders.get(m, lambda z: z), log_prob, scale) for m, scale in zip(MODALITIES, (2.0, 1.0, 3.0), strict=True)
    }
    return MultimodalVAE(modalities, 10, mixture)


def judge(x):
    return x


JUDGES = dict.fromkeys(MODALITIES, judge)


@pytest.fixture(autouse=True)
def _means_are_raw(monkeypatch):
    monkeypatch.setattr(metrics, "mean", lambda name, raw: raw)


# latent classification


def test_subsets_are_in_the_tables_order():
    assert list(metrics.SUBSETS) == ["M", "S", "T", "MS", "MT", "ST", "MST"] and metrics.SUBSETS["ST"] == ("svhn", "text")


def test_a_perfect_model_is_right_everywhere(data):
    z, labels = metrics.latents(by_hand(), data, CPU)
    assert z.shape == (7, N, 10) and torch.equal(labels, data.labels)
    matrix = metrics.latent_accuracy(metrics.latent_classifiers(z, labels), z, labels)
    assert matrix.shape == (7, 7) and (matrix == 1).all() and metrics.self_and_cross(matrix) == (1.0, 1.0)


def test_each_subset_has_latents_of_its_own(data):
    z, labels = metrics.latents(by_hand(shift={"svhn": 1, "text": 2}), data, CPU)
    told = (z.argmax(-1) - labels) % 10
    assert [set(of.tolist()) for of in told] == [{0}, {1}, {2}, {0, 1}, {0, 2}, {1, 2}, {0, 1, 2}]


def test_subsets_that_speak_different_languages_are_right_for_themselves_alone():
    labels = torch.arange(10).repeat(5)
    z = torch.stack([10.0 * F.one_hot((labels + i) % 10, 10) for i in range(7)])
    matrix = metrics.latent_accuracy(metrics.latent_classifiers(z, labels), z, labels)
    torch.testing.assert_close(matrix, torch.eye(7, dtype=torch.float64))
    assert metrics.self_and_cross(matrix) == (1.0, 0.0)


def test_rows_are_the_subsets_whose_z_it_is_and_columns_those_that_were_learned_from():
    """Noise in the first subset: what it learned is nothing, and nothing is right about it."""
    labels = torch.arange(10).repeat(200)
    z = torch.stack([torch.randn(2000, 10), *(10.0 * F.one_hot(labels, 10) for _ in range(6))])
    matrix = metrics.latent_accuracy(metrics.latent_classifiers(z, labels), z, labels)
    assert (matrix[1:, 1:] == 1).all() and (matrix[0] < 0.2).all()


def test_random_latents_are_right_once_in_ten():
    z, labels = torch.randn(7, 4000, 5), torch.randint(0, 10, (4000,))
    classify = metrics.latent_classifiers(z, labels)
    own, cross = metrics.self_and_cross(metrics.latent_accuracy(classify, torch.randn(7, 4000, 5), torch.randint(0, 10, (4000,))))
    assert abs(own - 0.1) < 0.02 and abs(cross - 0.1) < 0.01


def test_latent_classifiers_are_at_their_optimum():
    """The objective is convex: where its gradient vanishes, in float64 by the definition, is its minimum."""
    labels = torch.randint(0, 10, (300,))
    z = torch.randn(2, 300, 6) + 1.5 * F.one_hot(labels % 6, 6)
    classify = metrics.latent_classifiers(z, labels)
    bias = classify(torch.zeros(2, 1, 6))
    weight = classify(torch.eye(6).expand(2, 6, 6)) - bias
    for of, w, b in zip(z.double(), weight.double(), bias.double(), strict=True):
        w, b = w.requires_grad_(), b.requires_grad_()
        (F.cross_entropy(of @ w + b, labels) + metrics.PENALTY * w.square().sum()).backward()
        assert w.grad.abs().max() < 1e-4 and b.grad.abs().max() < 1e-4 and w.abs().max() > 1


# coherence


def test_a_perfect_model_is_coherent(data):
    found = metrics.coherence(by_hand(), JUDGES, data, CPU)
    assert set(found) == set("MST") and all(of == dict.fromkeys(metrics.SUBSETS, 1.0) for of in found.values())


def test_what_is_generated_from_a_modality_that_is_wrong_is_wrong(data):
    found = metrics.coherence(by_hand(shift={"svhn": 1}), JUDGES, data, CPU)
    for of in found.values():
        assert (of["M"], of["T"], of["MT"], of["S"]) == (1.0, 1.0, 1.0, 0.0)
        assert 0 < of["MS"] < 1 and 0 < of["MST"] < 1  # z is that of one of them, at random


def test_a_decoder_that_is_wrong_harms_its_modality_alone(data):
    found = metrics.coherence(by_hand(decoders={"text": lambda z: z.roll(1, -1)}), JUDGES, data, CPU)
    assert set(found["T"].values()) == {0.0} and set(found["M"].values()) == set(found["S"].values()) == {1.0}


def test_the_last_batch_counts(data):
    """It holds the only triplets that are right."""
    wrong = {"mnist": lambda x: x.roll(1, -1) if len(x) == 10 else x, "svhn": judge, "text": judge}
    assert metrics.coherence(by_hand(), wrong, data, CPU)["M"]["M"] == pytest.approx(3 / N)
    assert (
        metrics.accuracy(
            lambda x: F.one_hot(digit_in("mnist", x), 10) * (len(x) == 3) - 1.0 * F.one_hot(digit_in("mnist", x), 10), "mnist", data, CPU
        )
        < 0.5
    )
    assert metrics.accuracy(lambda x: F.one_hot(digit_in("mnist", x), 10), "mnist", data, CPU) == 1


def test_joint_coherence_is_the_share_of_draws_that_all_agree_on():
    assert metrics.joint_coherence(by_hand(), JUDGES, 55, CPU) == 1
    one_off = by_hand(decoders={"svhn": lambda z: z.roll(1, -1)})
    assert metrics.joint_coherence(one_off, JUDGES, 55, CPU) == 0
    chance = by_hand(decoders={m: lambda z: torch.rand(*z.shape[:-1], 10) for m in MODALITIES})
    assert metrics.joint_coherence(chance, JUDGES, 20_000, CPU) == pytest.approx(0.01, abs=0.003)
    half = by_hand(decoders={"text": lambda z: torch.where(z[..., :1] > 0, z, z.roll(1, -1))})
    assert metrics.joint_coherence(half, JUDGES, 20_000, CPU) == pytest.approx(0.5, abs=0.02)


def test_joint_coherence_draws_from_the_standard_normal():
    """All agree where the first number of z is above 1: with a chance of 0.159."""
    above = by_hand(decoders={"text": lambda z: torch.where(z[..., :1] > 1, z, z.roll(1, -1))})
    assert metrics.joint_coherence(above, JUDGES, 20_000, CPU) == pytest.approx(0.159, abs=0.01)


def test_judges_see_the_mean_of_the_distribution(data, monkeypatch):
    monkeypatch.setattr(metrics, "mean", lambda name, raw: raw if name == "mnist" else -raw)
    found = metrics.coherence(by_hand(), JUDGES, data, CPU)
    assert set(found["M"].values()) == {1.0} and set(found["S"].values()) == set(found["T"].values()) == {0.0}


# likelihoods


@pytest.mark.parametrize("mixture", ["poe", "moe", "mopoe"])
def test_nll_is_the_mean_over_components_and_triplets(data, mixture):
    """log p = -|z|^2 for each modality, so its scaled sum is -6 |z|^2 with z at its mean."""
    vae = by_hand(mixture, std=1e-6)
    x = data.batch(slice(None))
    expected = torch.stack([6 * vae.posterior(x, subset)[0].double().square().sum(-1) for subset in vae.components]).mean()
    assert metrics.nll(vae, data, CPU) == pytest.approx(expected.item(), rel=1e-4)


def test_log_likelihood_is_the_mean_over_the_rows_that_were_asked_for(data, monkeypatch):
    vae = by_hand()
    monkeypatch.setattr(vae, "log_likelihood", lambda x, samples: digit_in("mnist", x["mnist"]) * samples)
    for rows in (5, 10, 17, 500):
        assert metrics.log_likelihood(vae, data, rows, 3, CPU) == pytest.approx(3 * data.labels[:rows].double().mean().item())


# conflict


def test_a_probe_sees_the_gradients_of_the_decoders_and_leaves_no_trace():
    vae = MultimodalVAE(networks.mnist_svhn_text(4, 0.25), 4, "moe", "iwae", 3).double()
    inputs = {"mnist": torch.rand(5, 1, 28, 28), "svhn": torch.rand(5, 3, 32, 32), "text": F.one_hot(torch.randint(0, 71, (5, 8)), 71)}
    inputs = {name: x.double() for name, x in inputs.items()}
    probe = Probe(vae, inputs)
    before = torch.get_rng_state()
    share, ratio = probe.look()
    assert torch.equal(torch.get_rng_state(), before) and all(p.grad is None for p in vae.parameters())
    assert probe.look() == [share, ratio]

    torch.manual_seed(0)
    experts = {name: m.encoder(inputs[name]) for name, m in vae.modalities.items()}
    eps = torch.randn(3, 3, 5, 4, dtype=torch.float64)
    z = torch.stack([mean + std * e for (mean, std), e in zip(experts.values(), eps, strict=True)])
    z = z.detach().requires_grad_()
    log_q = torch.stack([torch.distributions.Normal(mean, std).log_prob(z).sum(-1) for mean, std in experts.values()]).logsumexp(0)
    log_x = {name: m.scale * m.log_prob(m.decoder(z), inputs[name]) for name, m in vae.modalities.items()}
    log_w = sum(log_x.values()) - 0.5 * z.square().sum(-1) - log_q
    weight = log_w.detach().softmax(1)
    grads = [torch.autograd.grad((weight * of).sum(), z, retain_graph=True)[0] for of in log_x.values()]
    G = torch.stack([gram([g[s] for g in grads]) for s in range(3)])
    lengths = norms(G)
    assert share == pytest.approx(conflict_rate(G).mean().item())
    assert ratio == pytest.approx((lengths.amax(-1) / lengths.amin(-1)).quantile(0.5).item(), rel=1e-6)


def test_judges_are_frozen():
    network = nn.Sequential(nn.Dropout(), nn.Linear(3, 10))
    judges = metrics.freeze({"text": network})
    x = torch.randn(4, 3)
    assert torch.equal(judges["text"](x), judges["text"](x)) and not judges["text"](x).requires_grad
