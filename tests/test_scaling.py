"""Local steps: each beta against its definition."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from mmfast.blocks.scaling import DimRatio, LipschitzScale, StandardScale


def data(n=400):
    """(x [n, 6], types): real, positive, gamma, exponential, a constant category, a count."""
    columns = [
        3 * torch.randn(n) + 5,
        torch.exp(0.3 * torch.randn(n) - 2),
        torch.distributions.Gamma(3.0, 2.0).sample((n,)),
        torch.distributions.Exponential(0.1).sample((n,)),
        torch.zeros(n),
        torch.randint(0, 9, (n,)),
    ]
    return torch.stack([c.double() for c in columns], 1), ["real", "positive", "gamma", "exponential", "categorical", "count"]


TABULAR = ["real", "positive", "positive", "positive", "categorical", "count"]


def test_standard_scale():
    x, _ = data()
    beta = StandardScale(x, TABULAR).beta
    logs = x[:, 1:4].numpy()
    expected = [1 / x[:, 0].numpy().std(ddof=1), *(1 / np.log(logs).std(axis=0, ddof=1)), 1, 1]
    np.testing.assert_allclose(beta, expected, rtol=1e-13)
    assert beta.dtype == torch.float64


def test_standard_scale_gives_unit_deviation_and_scales_inversely():
    x, _ = data()
    beta = StandardScale(x, TABULAR).beta
    torch.testing.assert_close((x * beta)[:, 0].std(), torch.ones((), dtype=torch.float64))
    torch.testing.assert_close(StandardScale(x * 1e-12, TABULAR).beta[0] * 1e-12, beta[0])
    torch.testing.assert_close(StandardScale(x * 1e12, TABULAR).beta[1], beta[1])  # a unit of measure shifts the logarithm only


@pytest.mark.parametrize("scale", [StandardScale, LipschitzScale])
def test_missing_cells_are_ignored(scale):
    x, _ = data(50)
    holes = torch.cat([x, x[:7]])
    holes[50:, :4] = torch.nan
    torch.testing.assert_close(scale(holes, TABULAR).beta, scale(x, TABULAR).beta, rtol=1e-12, atol=0)


@pytest.mark.parametrize("convert", [lambda x: x.float(), lambda x: x.numpy(), lambda x: x.tolist(), lambda x: x.requires_grad_()])
def test_kinds_of_rows(convert):
    x, _ = data(30)
    beta = StandardScale(convert(x.clone()), TABULAR).beta
    torch.testing.assert_close(beta, StandardScale(x, TABULAR).beta, rtol=1e-5, atol=0)
    assert not beta.requires_grad


def column(*values):
    return torch.tensor([[0.0, v] for v in values])


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: StandardScale(column(2, 2, 2), ["binary", "real"]), r"column 1 \(real\) is constant \(2\)"),
        (lambda: StandardScale(torch.full((9, 1), 0.1), ["positive"]), r"column 0 \(positive\) is constant"),
        (lambda: LipschitzScale(torch.full((9, 1), 0.1), ["gamma"]), r"column 0 \(gamma\) is constant"),
        (lambda: StandardScale(column(1, 0, 2), ["binary", "positive"]), r"column 1 \(positive\) has the value 0, expected positive"),
        (lambda: LipschitzScale(column(1, -3, 2), ["binary", "exponential"]), r"column 1 \(exponential\) has the value -3"),
        (lambda: StandardScale(column(1, math.inf), ["binary", "real"]), r"column 1 \(real\) has an infinite value"),
        (lambda: StandardScale(column(1, math.nan), ["binary", "real"]), r"column 1 \(real\) has 1 known values"),
        (lambda: StandardScale(column(1, 2), ["binary", "normal"]), r"types\[1\] is 'normal', expected one of real, positive, count"),
        (lambda: StandardScale(column(1, 2), ["binary", "gamma"]), r"types\[1\] is 'gamma'"),
        (lambda: StandardScale(column(1, 2), ["real"]), r"x has shape \(2, 2\), expected \(rows, 1\)"),
        (lambda: StandardScale(torch.ones(3), ["real"]), r"x has shape \(3,\)"),
        (lambda: DimRatio([]), "dims is empty"),
        (lambda: DimRatio([3, 0]), r"dims\[1\] is 0.0"),
        (lambda: LipschitzScale(column(1, 2), ["binary", "real"], lr=0.0), "lr is 0.0"),
        (lambda: LipschitzScale(column(1, 2, 4), ["binary", "gamma"], lr=10.0), r"column 1 \(gamma\) has smoothness .* lower lr"),
        (lambda: LipschitzScale([[0.0, 0.0], [0.0, 1e160]], ["binary", "real"]), r"column 1 \(real\) is too far from unit scale"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_dim_ratio():
    torch.testing.assert_close(DimRatio([784, 3072, 568]).beta, torch.tensor([3072 / 784, 1, 3072 / 568], dtype=torch.float64))
    assert repr(DimRatio([784, 3072, 568])) == "DimRatio(beta=[3.918, 1, 5.408])"


def log_likelihood(kind: str, x: Tensor, eta: Tensor) -> Tensor:
    """Mean log-likelihood in natural parameters."""
    if kind == "exponential":
        return ((-eta[0]).log() + eta[0] * x).mean()
    if kind == "gamma":
        shape, rate = eta[0] + 1, -eta[1]
        return (shape * rate.log() - shape.lgamma() + eta[0] * x.log() + eta[1] * x).mean()
    x = x.log() if kind == "positive" else x
    return (eta[0] * x + eta[1] * x.square() + eta[0].square() / (4 * eta[1]) + 0.5 * (-2 * eta[1]).log()).mean()


def fit(kind: str, x: Tensor) -> Tensor:
    """Natural parameters of the maximum-likelihood fit, by scipy."""
    if kind == "exponential":
        return torch.tensor([-1 / x.mean()])
    if kind == "gamma":
        shape, _, scale = scipy.stats.gamma.fit(x.numpy(), floc=0)
        return torch.tensor([shape - 1, -1 / scale], dtype=torch.float64)
    x = x.log() if kind == "positive" else x
    variance = x.var(correction=0)
    return torch.stack([x.mean() / variance, -0.5 / variance])


@pytest.mark.parametrize("lr", [1e-3, 1e-6])
@pytest.mark.parametrize("d", range(4))
def test_lipschitz_scale_meets_its_goal(d, lr):
    """The smoothness by autograd at scipy's fit, and the paper's equation: f(w) times L summed, times f(w) summed."""
    x, types = data()
    scale = LipschitzScale(x, types, lr)
    w, kind = scale.beta[d].item(), types[d]
    eta = fit(kind, x[:, d])
    H = torch.autograd.functional.hessian(lambda eta: log_likelihood(kind, x[:, d], eta), eta)
    f = {"exponential": [w], "gamma": [1, w]}.get(kind, [w, w**2])
    smoothness = (torch.tensor(f, dtype=torch.float64) * H.abs().sum(1)).sum() * sum(f)
    assert smoothness.item() == pytest.approx(1 / (4 * lr), rel=1e-6)
    assert w > 0 and scale.beta[4:].tolist() == [1, 1]


@pytest.mark.parametrize("shape", [0.3, 1.0, 50.0, 1e4, 1e7])
def test_gamma_fit_solves_the_likelihood_equation(shape):
    """log k - digamma(k) = s: by scipy for moderate k, by the series 1/(2k) + 1/(12k^2) for large k, where it would cancel."""
    from mmfast.blocks.scaling import _gamma_fit

    x = torch.distributions.Gamma(torch.tensor(shape).double(), torch.tensor(3.0).double()).sample((2000,))
    k, rate = _gamma_fit(x)
    s = -(x / x.mean()).log().mean().item()
    left = 1 / (2 * k) + 1 / (12 * k**2) if k > 1e3 else math.log(k) - scipy.special.digamma(k)
    assert left == pytest.approx(s, rel=1e-9)
    assert rate == pytest.approx(k / x.mean().item(), rel=1e-12)


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
def test_lipschitz_scale_of_a_centred_column_is_that_of_its_unit(scale):
    """Where the mean is zero the equation is L2 w^4 + (L1 + L2) w^3 + L1 w^2 = goal with L = (s^2, 2 s^4)."""
    x = torch.randn(100, 1).double()
    x = (x - x.mean()) / x.std(correction=0) * scale
    w = LipschitzScale(x, ["real"]).beta.item()
    L1, L2 = scale**2, 2 * scale**4
    assert L2 * w**4 + (L1 + L2) * w**3 + L1 * w**2 == pytest.approx(1000, rel=1e-6)
