"""The comparison of modality-imbalance methods: each trains what it says, on the same data, and the table holds what was measured."""

import copy

import pytest
import scipy.stats
import torch
from torch.nn import functional as F

import mmfast as mf
from benchmarks import unimodal_heads as bench

METHODS = {method.name: method for method in bench.METHODS}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return bench.Model()


@pytest.fixture
def batch():
    return bench.pairs(20, torch.Generator().manual_seed(0))


def gradients(model, name, batch):
    method, model = METHODS[name], copy.deepcopy(model)
    state = [method.modulation()] if method.rule is None else [method.rule() for _ in bench.SIZES]
    bench.gradients(model, method, state, batch)
    return {name: p.grad for name, p in model.named_parameters()}, state


def by_hand(model, batch, fused, alone):
    """The gradients of a weighted sum of the multimodal and the unimodal losses."""
    model = copy.deepcopy(model)
    features = model.encode(batch.inputs)
    losses = [F.cross_entropy(x, batch.labels) for x in (sum(model.parts(features)), *model.alone(features))]
    (fused * losses[0] + alone * sum(losses[1:])).backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    "name, fused, alone", [("multimodal loss alone", 1, 0), ("rows: Sum", 1, 1), ("rows: Constant([0, 1]), which is DGL", 0, 1)]
)
def test_the_rows_of_linear_rules(model, batch, name, fused, alone):
    ours, _ = gradients(model, name, batch)
    encoders, others = by_hand(model, batch, fused, alone), by_hand(model, batch, 1, 1)
    for key, gradient in ours.items():
        torch.testing.assert_close(gradient, (encoders if key.startswith("encoders") else others)[key], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", [method.name for method in bench.METHODS if method.modulation])
def test_modulated_encoders(model, batch, name):
    ours, (modulation,) = gradients(model, name, batch)
    plain, others = by_hand(model, batch, 1, 0), by_hand(model, batch, 1, 1)
    assert modulation.beta.min() < modulation.beta.max()
    for key, gradient in ours.items():
        expected = modulation.beta[int(key.split(".")[1])].float() * plain[key] if key.startswith("encoders") else others[key]
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-7)


def test_the_two_rows_of_mmpareto():
    """On vectors: 2 k_0 g_0 + 2 k_1 g_1 with equal k, or with those of the shortest vector between rows that conflict, brought up to the sum's length, times 1.5."""
    rule, conflicts = METHODS["rows: MMPareto(gamma=1.5)"].rule(), 0
    for seed in range(20):
        g = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * torch.tensor([[1.0], [4.0]])
        if F.cosine_similarity(*g, dim=0) > 0:
            d = g.sum(0)
        else:
            conflicts += 1
            k = ((g[1] - g[0]) @ g[1] / (g[1] - g[0]).square().sum()).clamp(0.001, 0.999)
            d = 2 * (k * g[0] + (1 - k) * g[1])
        d = 1.5 * d * (g.sum(0).norm() / d.norm()).clamp(min=1)
        torch.testing.assert_close(mf.resolve(list(g), rule), d, rtol=1e-10, atol=1e-12)
    assert 5 < conflicts < 15


def test_the_table(monkeypatch):
    monkeypatch.setattr(bench, "METHODS", [METHODS["multimodal loss alone"], METHODS["OGM(alpha=0.1)"]])
    for name, value in (("RATES", (0.01, 0.03)), ("TRAIN", 100), ("HELD_OUT", 50), ("TEST", 200)):
        monkeypatch.setattr(bench, name, value)
    first, _, one, other = bench.table(seeds=2, epochs=1).splitlines()
    assert first.count("|") == one.count("|") == other.count("|") == 7
    assert one.startswith("| multimodal loss alone | 0.0") and one.endswith("| 0.0 ± 0.0 |")
    again = bench.run(bench.METHODS[0], float(one.split("|")[2]), 0, 1), bench.run(bench.METHODS[0], float(one.split("|")[2]), 1, 1)
    assert one.split("|")[3].strip() == bench.interval([test[0] for _, test in again])


def test_the_interval():
    values = [80.0, 82.0, 85.0, 81.0, 90.0]
    low, high = scipy.stats.t.interval(0.95, 4, sum(values) / 5, scipy.stats.sem(values))
    assert bench.interval(values) == f"{sum(values) / 5:.1f} ± {(high - low) / 2:.1f}"
