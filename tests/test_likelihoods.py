"""Likelihoods against torch.distributions, their sums and integrals, and their predictions."""

import pytest
import torch
from torch import distributions as dist
from torch.nn.functional import softplus

from mmfast.models.likelihoods import Bernoulli, Categorical, Exponential, Gamma, Joint, LogNormal, Normal, Ordinal, Poisson

DTYPE = torch.float64


def normal(raw, w):
    precision = 2 * softplus(raw[..., 1])
    return dist.Normal(raw[..., 0] / precision, precision.rsqrt())


def ordinal(raw):
    cuts = torch.cat([raw[..., 1:2], softplus(raw[..., 2:])], -1).cumsum(-1) - raw[..., :1]
    edges = torch.cat([torch.zeros_like(cuts[..., :1]), cuts.sigmoid(), torch.ones_like(cuts[..., :1])], -1)
    return edges.diff(dim=-1)


CASES = {
    "normal": (Normal(), torch.tensor([-2.0, 0.0, 3.1]), lambda raw, x, w: normal(raw, w).log_prob(w * x)),
    "lognormal": (LogNormal(), torch.tensor([0.2, 1.0, 30.0]), lambda raw, x, w: normal(raw, w).log_prob(w * x.log()) - w * x.log()),
    "bernoulli": (Bernoulli(), torch.tensor([0.0, 1.0, 1.0]), lambda raw, x, w: dist.Bernoulli(logits=raw[..., 0]).log_prob(x)),
    "categorical": (Categorical(4), torch.tensor([0.0, 3.0, 1.0]), lambda raw, x, w: dist.Categorical(logits=raw).log_prob(x)),
    "gamma": (
        Gamma(),
        torch.tensor([0.2, 1.0, 30.0]),
        lambda raw, x, w: dist.Gamma(softplus(raw[..., 0]), softplus(raw[..., 1])).log_prob(w * x),
    ),
    "exponential": (
        Exponential(),
        torch.tensor([0.0, 1.0, 30.0]),
        lambda raw, x, w: dist.Exponential(softplus(raw[..., 0])).log_prob(w * x),
    ),
    "ordinal": (Ordinal(4), torch.tensor([0.0, 3.0, 1.0]), lambda raw, x, w: dist.Categorical(probs=ordinal(raw)).log_prob(x)),
    "poisson": (Poisson(), torch.tensor([0.0, 1.0, 250.0]), lambda raw, x, w: dist.Poisson(raw[..., 0].exp()).log_prob(x)),
}


@pytest.mark.parametrize("w", [1.0, 0.3])
@pytest.mark.parametrize("name", CASES)
def test_log_prob_is_that_of_torch_distributions(name, w):
    likelihood, x, expected = CASES[name]
    raw = torch.randn(5, 3, likelihood.n_outputs, dtype=DTYPE, generator=torch.Generator().manual_seed(1))
    x = x.to(DTYPE).expand(5, 3)
    torch.testing.assert_close(likelihood.log_prob(raw, x, w), expected(raw, x, w))


@pytest.mark.parametrize("w", [1.0, 0.3])
@pytest.mark.parametrize("name", CASES)
def test_prediction_is_the_best_guess_in_original_units(name, w):
    """Mean of the normal and the exponential, mode of the others: no other value is likelier."""
    likelihood, _, _ = CASES[name]
    if name == "exponential":
        raw = torch.randn(7, 1, dtype=DTYPE)
        return torch.testing.assert_close(likelihood.predict(raw, w), dist.Exponential(softplus(raw[:, 0])).mean / w)
    raw = torch.randn(7, likelihood.n_outputs, dtype=DTYPE, generator=torch.Generator().manual_seed(2))
    if name == "gamma":
        raw = raw.abs() + 1  # a shape above 1: else the mode is zero
    best = likelihood.predict(raw, w)
    assert best.shape == (7,)
    if isinstance(likelihood, Categorical | Ordinal | Bernoulli | Poisson):
        others = torch.arange(
            4.0 if isinstance(likelihood, Categorical | Ordinal) else 2.0 if isinstance(likelihood, Bernoulli) else 30.0, dtype=DTYPE
        )
        others = others.unsqueeze(1).expand(-1, 7)
    else:
        others = best * torch.tensor([[0.9], [0.999], [1.001], [1.1]], dtype=DTYPE)

    def density(x):  # of x itself: the scaled feature is w x or x^w
        jacobian = (w - 1) * x.log() if isinstance(likelihood, LogNormal) else 0.0
        return likelihood.log_prob(raw.expand(*x.shape, -1), x, w) + jacobian

    assert (density(best) >= density(others).max(0).values - 1e-12).all()


def test_joint_gives_each_feature_its_own_likelihood():
    likelihoods = [Poisson(), Normal(), Categorical(3), Bernoulli(), Normal(), Categorical(3), LogNormal(), Categorical(2)]
    w = torch.tensor([1, 0.5, 1, 1, 2, 1, 3, 1.0])
    joint = Joint(likelihoods, w)
    assert joint.sizes == [1, 2, 3, 1, 2, 3, 2, 2]
    raw = torch.randn(4, sum(joint.sizes), requires_grad=True)
    x = torch.tensor([[3.0, -1, 2, 1, 0.5, 0, 2.5, 1]]).expand(4, -1)
    parts = raw.split(joint.sizes, -1)
    one_by_one = [p.log_prob(r, x[:, i], w[i]) for i, (p, r) in enumerate(zip(likelihoods, parts, strict=True))]
    torch.testing.assert_close(joint.log_prob(raw, x), torch.stack(one_by_one, -1))
    found, expected = (torch.autograd.grad(t.sum(), raw)[0] for t in (joint.log_prob(raw, x), torch.stack(one_by_one, -1)))
    torch.testing.assert_close(found, expected)
    predictions = [p.predict(r, w[i]) for i, (p, r) in enumerate(zip(likelihoods, parts, strict=True))]
    torch.testing.assert_close(joint.predict(raw), torch.stack(predictions, -1))


@pytest.mark.parametrize("w", [1.0, 0.3])
@pytest.mark.parametrize("name", CASES)
def test_probabilities_sum_to_one(name, w):
    """By summation where x is a class or a count, by quadrature of the rescaled feature's density where it is continuous."""
    likelihood, _, _ = CASES[name]
    raw = torch.randn(6, likelihood.n_outputs, dtype=DTYPE, generator=torch.Generator().manual_seed(3))
    if name == "gamma":
        raw = raw.abs()  # smaller shapes have much of their mass below every grid
    if name in ("bernoulli", "categorical", "ordinal", "poisson"):
        x = torch.arange({"bernoulli": 2, "poisson": 400}.get(name, 4), dtype=DTYPE).unsqueeze(1).expand(-1, 6)
        total = likelihood.log_prob(raw.expand(*x.shape, -1), x).exp().sum(0)
    else:  # t is the logarithm of the rescaled feature, or itself for the normal
        low, high = (-60.0, 60.0) if name == "normal" else (-40.0, 40.0)
        t = torch.linspace(low, high, 200_001, dtype=DTYPE)
        x = t / w if name == "normal" else (t / w).exp() if name == "lognormal" else t.exp() / w
        jacobian = 0.0 if name == "normal" else t.unsqueeze(1)
        log_prob = likelihood.log_prob(raw.expand(len(t), -1, -1), x.unsqueeze(1).expand(-1, 6), w)
        total = (log_prob + jacobian).exp().sum(0) * (t[1] - t[0])
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=2e-5)


@pytest.mark.parametrize("size", [30.0, 1000.0])
@pytest.mark.parametrize("name", CASES)
def test_finite_far_out(name, size):
    """Outputs of an untrained or diverging head give finite log-probabilities and gradients in float32."""
    likelihood, x, _ = CASES[name]
    for signs in torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * likelihood.n_outputs).view(-1, likelihood.n_outputs):
        raw = (size * signs).expand(3, -1).clone().requires_grad_()
        log_prob = likelihood.log_prob(raw, x)
        (grad,) = torch.autograd.grad(log_prob.sum(), raw)
        assert log_prob.isfinite().all()
        assert grad.isfinite().all()


def test_bad_arguments():
    for classes in (0, 2.5):
        with pytest.raises(ValueError, match=f"classes is {classes}, expected a whole number, 1 at least"):
            Categorical(classes)
    with pytest.raises(TypeError, match=r"likelihoods\[1\] is <class .*Normal'>, expected a likelihood, such as Normal\(\)"):
        Joint([Normal(), Normal])
    with pytest.raises(ValueError, match="likelihoods is empty, expected one for each feature"):
        Joint([])
    with pytest.raises(ValueError, match=r"w has shape \(3,\), expected \(1,\), one scale for each likelihood"):
        Joint([Normal()], torch.ones(3))
    for scale in (0.0, -1.0, torch.inf, torch.nan):
        with pytest.raises(ValueError, match=r"w is \[1.0, .*\], expected positive finite scales"):
            Joint([Normal(), Normal()], torch.tensor([1.0, scale]))
