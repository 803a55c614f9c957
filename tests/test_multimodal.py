"""The multimodal VAEs against closed forms, and against every sample by itself."""

import copy
import io
import itertools
import math

import pytest
import torch
from multimodal_models import ROWS, SIZES, Row, absences, assert_same, batch, decoder, grads, loss_of, make, noise_of
from torch.distributions import MultivariateNormal, Normal

import mmfast as mf
from mmfast.models.multimodal import Modality, MultimodalVAE
from mmfast.models.multimodal.bound import bound

MIXTURES, OBJECTIVES = ("poe", "moe", "mopoe"), ("elbo", "iwae", "siwae")


# A linear Gaussian model: x_d = W_d z + b_d + s_d noise, with columns of W_d at right angles, so that z's posterior is known and each modality's expert diagonal


class Linear:
    """The model's parts; experts are the modalities' likelihoods as functions of z, so with the prior their product is the posterior."""

    def __init__(self, latent=3, sizes=(5, 4, 7), wrong=0.0):
        g = torch.Generator().manual_seed(3)
        self.latent, self.sizes = latent, sizes
        self.weights, self.biases, self.stds = [], [], []
        for size in sizes:
            q, _ = torch.linalg.qr(torch.randn(size, latent, generator=g, dtype=torch.float64))
            self.weights.append(q * (0.5 + torch.rand(latent, generator=g, dtype=torch.float64)))
            self.biases.append(torch.randn(size, generator=g, dtype=torch.float64))
            self.stds.append(0.5 + torch.rand((), generator=g, dtype=torch.float64).item())
        self.wrong = wrong

    def modality(self, d):
        w, b, s = self.weights[d], self.biases[d], self.stds[d]

        def encoder(x):
            precision = w.square().sum(0) / s**2
            mean = (x - b) @ w / s**2 / precision
            return mean + self.wrong, precision.rsqrt().expand_as(mean) * (1 + self.wrong)

        return Modality(encoder, lambda z: z @ w.T + b, lambda raw, x: Normal(raw, s).log_prob(x).sum(-1))

    def vae(self, mixture, objective="elbo", samples=1):
        return MultimodalVAE({f"m{d}": self.modality(d) for d in range(len(self.sizes))}, self.latent, mixture, objective, samples)

    def data(self, rows, same=False):
        g = torch.Generator().manual_seed(4)
        z = torch.randn(1 if same else rows, self.latent, generator=g, dtype=torch.float64)
        x = {}
        for d, size in enumerate(self.sizes):
            noise = torch.randn(len(z), size, generator=g, dtype=torch.float64)
            x[f"m{d}"] = (z @ self.weights[d].T + self.biases[d] + self.stds[d] * noise).expand(rows, -1)
        return x

    def log_likelihood(self, x, which):
        w = torch.cat([self.weights[d] for d in which])
        noise = torch.cat([torch.full((self.sizes[d],), self.stds[d] ** 2, dtype=torch.float64) for d in which])
        mean = torch.cat([self.biases[d] for d in which])
        return MultivariateNormal(mean, w @ w.T + noise.diag()).log_prob(torch.cat([x[f"m{d}"] for d in which], -1))

    def posterior(self, x, which, prior):
        """Mean and standard deviation, by solving the normal equations."""
        precision = sum(self.weights[d].T @ self.weights[d] / self.stds[d] ** 2 for d in which) + prior * torch.eye(self.latent).double()
        right = sum((x[f"m{d}"] - self.biases[d]) @ self.weights[d] / self.stds[d] ** 2 for d in which)
        return torch.linalg.solve(precision, right.T).T, precision.inverse().diagonal().sqrt().expand_as(right)


@pytest.mark.parametrize("which", [(0, 1, 2), (0, 2), (1,)])
@pytest.mark.parametrize("mixture", MIXTURES)
def test_the_product_of_experts_is_the_analytic_posterior(mixture, which):
    model = Linear()
    x = model.data(11)
    found = model.vae(mixture).posterior(x, [f"m{d}" for d in which])
    for a, b in zip(found, model.posterior(x, which, mixture == "poe"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("which", [(0, 1, 2), (0, 2)])
def test_with_the_true_posterior_every_bound_is_the_likelihood(objective, which):
    """Whatever the draws: constants are all there."""
    model = Linear()
    x = {f"m{d}": model.data(7)[f"m{d}"] for d in which}
    exact = model.log_likelihood(x, which)
    torch.testing.assert_close(model.vae("poe", objective, 4).loss(x), -exact.sum(), rtol=1e-12, atol=0)
    torch.testing.assert_close(model.vae("poe").log_likelihood(x, 3), exact, rtol=1e-12, atol=0)


def draws(model, mixture, objective, samples, rows=1500):
    """Mean and standard error of the bound of one x, of as many draws as rows."""
    vae, x = model.vae(mixture, objective, samples), model.data(rows, same=True)
    q = vae._encode(x, None)
    each = bound(vae._densities(q, q.draw(samples)).log_weights(None, {}), None, objective)
    return each.mean().item(), (each.std() / math.sqrt(rows)).item()


@pytest.mark.parametrize("mixture, objective", [("poe", "iwae"), ("moe", "siwae"), ("mopoe", "siwae")])
def test_the_bound_rises_with_the_samples_towards_the_likelihood(mixture, objective):
    model = Linear(wrong=0.4)
    exact = model.log_likelihood(model.data(1), (0, 1, 2)).item()
    elbo, error = draws(model, mixture, "elbo", 1)
    found = [(elbo, error)] + [draws(model, mixture, objective, samples) for samples in (1, 4, 16, 64)]
    for (low, e1), (high, e2) in itertools.pairwise(found):
        slack = 4 * math.hypot(e1, e2)
        assert high > low - slack
        assert high < exact + 4 * e2
    assert found[-1][0] > elbo + 8 * error  # it does rise
    assert exact - found[-1][0] < 0.1 * (exact - elbo) + 4 * found[-1][1]


@pytest.mark.parametrize("mixture", MIXTURES)
def test_the_likelihood_by_importance_sampling(mixture):
    model = Linear(wrong=0.3)
    x = model.data(5)
    exact = model.log_likelihood(x, (0, 1, 2))
    found = torch.stack([model.vae(mixture).log_likelihood(x, 3000) for _ in range(8)])
    error = found.std(0) / math.sqrt(8)
    assert ((found.mean(0) - exact).abs() < 5 * error + 1e-3).all() and (error < 0.05).all()
    part = model.vae(mixture).log_likelihood(x, 20000, {"m1": torch.zeros(5, dtype=torch.bool)})
    torch.testing.assert_close(part, model.log_likelihood(x, (0, 2)), rtol=0, atol=0.2)


def test_the_likelihood_takes_its_draws_in_parts_and_leaves_out_scales(monkeypatch):
    vae, x = make("mopoe", samples=2), batch()
    for m in vae.modalities.values():
        m.scale = 1.0
    sizes = []
    vae.modalities["text"].decoder.register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape[1]))
    monkeypatch.setattr("mmfast.models.multimodal.model.AT_ONCE", 7 * ROWS * 5)
    torch.manual_seed(5)
    found = vae.log_likelihood(x, 7 * 12 - 3)
    assert sizes == [5, 5, 2]
    torch.manual_seed(5)
    q = vae._encode(x, None)
    log_w = torch.cat([vae._densities(q, q.draw(n)).log_weights(None, {}) for n in sizes[:3]], 1)
    torch.testing.assert_close(found, log_w.flatten(0, 1).logsumexp(0) - math.log(7 * 12))
    vae.modalities["text"].scale = 9.0
    torch.manual_seed(5)
    assert torch.equal(found, vae.log_likelihood(x, 7 * 12 - 3))


# Every sample by itself


@pytest.mark.parametrize("absent", [False, True])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("mixture", MIXTURES)
def test_loss_and_gradient_are_the_formulas(mixture, objective, absent):
    """The loss: the bound of each row from its own components. The gradient: that of log-weights by the detached softmax of models.md 1.7."""
    vae, x, present = make(mixture, objective), batch(), absences() if absent else None
    torch.manual_seed(2)
    loss = vae.loss(x, present)
    found = grads(vae, loss)
    rows = [Row(vae, x, b, present, noise_of(vae, 2)) for b in range(ROWS)]
    rows = [row for row in rows if row.names]  # nothing present: nothing in the loss
    assert len(rows) == ROWS - absent
    torch.testing.assert_close(loss, -sum(row.bound(objective) for row in rows), rtol=1e-10, atol=0)
    assert_same(found, grads(vae, -sum((row.weights(objective) * row.log_w).sum() for row in rows)))


def losses(mixture, samples, names=tuple(SIZES), present=None):
    found = []
    for objective in OBJECTIVES:
        vae = make(mixture, objective, samples, names=names)
        torch.manual_seed(2)
        found.append(vae.loss(batch(names=names), present).item())
    return found


@pytest.mark.parametrize("mixture, names", [("poe", tuple(SIZES)), ("moe", ("text",)), ("mopoe", ("image",))])
def test_siwae_of_one_component_is_iwae(mixture, names):
    elbo, iwae, siwae = losses(mixture, 5, names)
    assert siwae == pytest.approx(iwae, rel=1e-14) and iwae < elbo - 1e-3


@pytest.mark.parametrize("present", [None, absences()])
@pytest.mark.parametrize("mixture", ["moe", "mopoe"])
def test_siwae_is_above_iwae_is_above_elbo(mixture, present):
    """Of the same noise, by Jensen's inequality."""
    elbo, iwae, siwae = losses(mixture, 5, present=present)
    assert siwae < iwae - 1e-3 < elbo - 2e-3
    elbo, iwae, siwae = losses(mixture, 1, present=present)
    assert iwae == pytest.approx(elbo, rel=1e-14) and siwae < iwae - 1e-3


# Draws


@pytest.mark.parametrize("mixture", ["poe", "mopoe"])
def test_a_sample_is_from_the_product_of_its_subset(mixture):
    vae, x = make(mixture), batch()
    for subset in (None, ["image"], ("text", "sound")):
        mean, std = vae.posterior(x, subset)
        torch.manual_seed(3)
        z = vae.sample(x, subset, 4)
        torch.manual_seed(3)
        torch.testing.assert_close(z, mean + std * torch.randn(4, *mean.shape, dtype=mean.dtype))


def test_mmvae_draws_from_one_of_its_experts_at_random():
    vae, x = make("moe"), batch()
    with torch.no_grad():
        for name in SIZES:
            vae.modalities[name].encoder.out.bias.copy_(torch.tensor([10.0 * list(SIZES).index(name)] * 2 + [-3.0] * 2))
    z = vae.sample(x, None, 6000, absences())[..., 0]
    expert = (z / 10).round()
    for b, row in enumerate(zip(*absences().values(), strict=True)):
        there = torch.stack(row).double()
        expected = there / there.sum() if there.any() else torch.tensor([1.0, 0, 0])  # the prior, around zero
        shares = torch.stack([(expert[:, b] == i).double().mean() for i in range(3)])
        assert (shares - expected).abs().max() < 4 * math.sqrt(0.25 / 6000) + (0 if there.any() else 0.01)
    z = vae.sample(x, ["text"], 5)
    assert ((z / 10).round() == 2).all() and z.shape == (5, ROWS, 2)


# How it works


@pytest.mark.parametrize("mixture, components", [("poe", 1), ("moe", 3), ("mopoe", 7)])
@pytest.mark.parametrize("blocks", ["", "pq"])
def test_each_decoder_is_called_once_for_all_draws(mixture, components, blocks):
    vae = make(mixture, blocks=blocks, resolver=mf.MGDA if blocks else None)
    seen = []
    for m in vae.modalities.values():
        m.decoder.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
    vae.loss(batch())
    assert seen == [(components, 3, ROWS, 2)] * 3


def test_components_are_the_subsets():
    assert make("poe").components == [tuple(SIZES)]
    assert make("moe").components == [("image",), ("sound",), ("text",)]
    assert make("mopoe").components == [
        ("image",),
        ("sound",),
        ("text",),
        ("image", "sound"),
        ("image", "text"),
        ("sound", "text"),
        tuple(SIZES),
    ]


@pytest.mark.parametrize("mixture", MIXTURES)
def test_densities_are_in_float32_where_networks_work_in_16_bits(mixture):
    """Of what a decoder gives in bfloat16 the density is that of those numbers; the bound keeps float32's digits."""
    vae, x = make(mixture, samples=4, blocks="pq", resolver=mf.MGDA).float(), {name: value.float() for name, value in batch().items()}
    seen = {}
    for name, m in vae.modalities.items():

        def judge(raw, value, name=name, of=m.log_prob):
            seen[name] = (raw.dtype, value.dtype, torch.is_autocast_enabled("cpu"))
            return of(raw, value)

        m.log_prob = judge
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(2)
        low = vae.loss(x)
        assert low.dtype == torch.float32 and vae.posterior(x)[0].dtype == torch.float32
    assert seen == {name: (torch.float32, torch.float32, False) for name in SIZES}
    found = grads(vae, low)
    torch.manual_seed(2)
    full = vae.loss(x)
    assert (low - full).abs() < 2e-2 * full.abs()
    exact = grads(vae, full)
    assert all(found[n].dtype == torch.float32 and (found[n] - exact[n]).norm() < 0.2 * exact[n].norm() + 1e-2 for n in exact)


def test_a_model_in_bfloat16():
    vae, x = make("mopoe", blocks="pqs", resolver=mf.MGDA).bfloat16(), {name: value.bfloat16() for name, value in batch().items()}
    loss = vae.loss(x, absences())
    assert loss.dtype == torch.float32 and all(g.isfinite().all() for g in grads(vae, loss).values())


@pytest.mark.parametrize("mixture", MIXTURES)
def test_float32_is_near_float64(mixture):
    vae, x = make(mixture, samples=5), batch()
    noise = noise_of(vae, 2)
    exact = loss_of(vae, x, absences(), noise)
    found = loss_of(vae.float(), {name: value.float() for name, value in x.items()}, absences(), noise)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=3e-6, atol=0)


def test_narrow_and_wide_experts_neither_overflow_nor_lose_their_gradient():
    """Precisions from 1e-30 to 1e30, in float32: that of one expert alone is itself, to the last bit of its mean."""
    std = torch.logspace(-15, 15, 7).unsqueeze(1).requires_grad_()
    mean = torch.full((7, 1), 3.0, requires_grad=True)
    vae = MultimodalVAE({n: Modality(lambda _: (mean, std), decoder(4, 1), Normal) for n in "ab"}, 1, "moe")
    m, s = vae.posterior({"a": mean}, ["a"])
    assert torch.equal(m, mean)
    torch.testing.assert_close(s, std, rtol=1e-5, atol=0)
    (m + 2 * s).sum().backward()
    torch.testing.assert_close(std.grad, torch.full_like(std, 2.0), rtol=1e-5, atol=0)
    assert (mean.grad == 1).all()
    torch.testing.assert_close(vae.posterior({"a": mean, "b": mean})[1], std / math.sqrt(2), rtol=1e-5, atol=0)


@pytest.mark.parametrize("blocks", ["", "pq"])
@pytest.mark.parametrize("mixture", MIXTURES)
def test_the_noise_of_a_narrow_component_is_not_lost_beside_its_mean(mixture, blocks):
    """A std of 1e-6 at a mean of 20, whose next number in float32 is 2e-6 away: what widens it again is the gradient that log q sends by way of the noise."""
    noise, found = noise_of(make(mixture), 2), []
    for dtype in (torch.float64, torch.float32):
        vae = make(mixture, "elbo", blocks=blocks, resolver="sum" if blocks else None).to(dtype)
        x = {name: value.to(dtype) for name, value in batch().items()}
        out = vae.modalities["image"].encoder.out
        with torch.no_grad():
            out.weight.zero_()
            out.bias.copy_(torch.tensor([20.0, -20.0, 0.0, 0.0]))
        vae.modalities["image"].encoder.register_forward_hook(lambda _, args, found: (found[0], found[1] * 1e-6))
        loss = loss_of(vae, x, None, noise)
        loss.backward()
        found.append([loss.detach().double(), *out.bias.grad.double().chunk(2)])  # of the mean, of the std
    for exact, value in zip(*found, strict=True):
        assert (value - exact).norm() < 2e-4 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("objective", ["iwae", "siwae"])
def test_no_gradient_is_a_denormal_number(objective, dtype):
    """Log-weights of images lie hundreds apart, and a CPU is slow with what is left of their softmax; leaving it out changes no digit of the bound."""
    spread = 40 if dtype == torch.float32 else 250
    log_w = (torch.randn(3, 50, 20, generator=torch.Generator().manual_seed(1)) * spread).to(dtype).requires_grad_()
    exact = log_w.detach().double().requires_grad_()
    found = bound(log_w, None, objective)
    plain = exact.flatten(0, 1).logsumexp(0) if objective == "siwae" else exact.logsumexp(1).mean(0)
    plain = plain - math.log(150 if objective == "siwae" else 50)
    torch.testing.assert_close(
        found.double(), plain, rtol=0 if dtype == torch.float64 else 3e-7, atol=1e-12 if dtype == torch.float64 else 0
    )
    found.sum().backward()
    plain.sum().backward()
    least = torch.finfo(dtype).tiny
    assert (exact.grad.to(dtype) < least).any()
    assert (log_w.grad[log_w.grad != 0] > least**0.6).all()  # which leaves something for what is multiplied by it
    torch.testing.assert_close(log_w.grad.double(), exact.grad, rtol=1e-4 if dtype == torch.float32 else 1e-12, atol=least**0.5)


@pytest.mark.parametrize("blocks", ["", "pqs"])
@pytest.mark.parametrize("mixture", MIXTURES)
def test_the_seed_decides(mixture, blocks):
    found = []
    for _ in range(2):
        vae = make(mixture, blocks=blocks, resolver=mf.PCGrad if blocks else None)
        torch.manual_seed(7)
        found.append(grads(vae, vae.loss(batch(), absences())))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("blocks", ["", "pqs"])
def test_everything_moves_with_the_model(blocks):
    vae = make("mopoe", blocks=blocks, resolver=mf.MGDA if blocks else None).to("meta")
    x, present = ({name: value.to("meta") for name, value in of.items()} for of in (batch(), absences()))
    assert vae.loss(x, present).device.type == "meta"


def test_training_raises_the_bound():
    vae, x = make("mopoe", "iwae", 4, "pqs", mf.PCGrad), batch()
    optimizer = torch.optim.Adam(vae.parameters(), lr=1e-2)
    before = vae.log_likelihood(x, 500)
    for _ in range(60):
        optimizer.zero_grad()
        vae.loss(x, absences()).backward()
        optimizer.step()
    assert vae.log_likelihood(x, 500).sum() > before.sum() + 10


def test_a_copy_and_a_file():
    vae = make("mopoe", blocks="pqs", resolver=mf.GradNorm)
    vae.loss(batch()).backward()
    file = io.BytesIO()
    torch.save(copy.deepcopy(vae).state_dict(), file)
    file.seek(0)
    other = make("mopoe", blocks="pqs", resolver=mf.GradNorm, seed=9)
    other.load_state_dict(torch.load(file))
    found = []
    for model in (vae, other):
        torch.manual_seed(3)
        found.append(grads(model, model.loss(batch())))
    assert_same(*found, rtol=0, atol=0)
