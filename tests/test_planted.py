"""The planted set, and that the diagnostics find what was planted, within stated tolerances."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mmfast as mf
from mmfast.data import modalities
from mmfast.data.planted import DataError, Planted, Source

SOURCES = {"image": Source(30, 5, 9, loudness=2.0), "sound": Source(16, 3, 6), "text": Source(12, 2, 0, strength=0.0)}
SIZES = [source.width for source in SOURCES.values()]


@pytest.fixture(scope="module")
def planted():
    return Planted(SOURCES, common=2, classes=12)


def test_ranks_are_found(planted):
    """Numerical ranks exactly, common features counted once in the fused one; effective ranks within 2 % at 4,000 rows."""
    inputs, _ = planted.draw(4000, seed=1)
    assert planted.rank == {"image": 16, "sound": 11, "text": 4, "fused": 27}
    for name, x in {**inputs, "fused": torch.cat(list(inputs.values()), 1)}.items():
        assert mf.collapse.numerical_rank(x) == planted.rank[name]
        assert float(mf.collapse.effective_rank(x)) == pytest.approx(planted.effective_rank[name], rel=0.02)
    assert mf.collapse.numerical_rank(inputs["image"], tol=0.7) == 9  # the noise alone, twice as loud
    alike = Planted({name: Source(5, 0, 1, loudness=0.2) for name in "abc"}, common=2)  # features in triplicate are as loud as three
    x = torch.cat(list(alike.draw(4000, seed=1)[0].values()), 1)
    assert float(mf.collapse.effective_rank(x)) == pytest.approx(alike.effective_rank["fused"], rel=0.02)
    weak = Planted({"a": Source(8, 3, 2, loudness=1e-4)}).draw(500, seed=0)[0]["a"]
    assert mf.collapse.numerical_rank(weak) == 3 and mf.collapse.numerical_rank(weak, 1e-5) == 5


def test_similarity_is_found(planted):
    """Within 4 standard errors over ten draws of 1,000 rows, which are below .01."""
    found = torch.stack([mf.collapse.similarity(planted.draw(1000, seed)[0]) for seed in range(10)])
    error = found.std(0) / 10**0.5
    assert float(error.max()) < 0.01
    off = ~torch.eye(3, dtype=torch.bool)
    assert float(((found.mean(0) - planted.similarity).abs() / error)[off].max()) < 4
    inputs, _ = planted.draw(20, seed=0)
    covariances = {name: Q.T @ Q for name, Q in planted.predictive.items()}
    assert inputs["text"].shape == (20, 12) and covariances["text"].trace() == pytest.approx(4)
    assert float(planted.similarity[1, 2]) == pytest.approx(2 / (11 * 4) ** 0.5)
    assert float(planted.similarity[0, 1]) == pytest.approx(2 / ((7 + 9 * 16) * 11) ** 0.5)


def test_collisions_are_found(planted):
    """Each neuron's participation to 1e-9, hence which of them collide; how many do is within 4 standard errors of the probability, above the bound."""
    neurons = planted.neurons(4000, seed=0)
    found = mf.collapse.participation(neurons.weight, SIZES)
    torch.testing.assert_close(found, neurons.participation, rtol=0, atol=1e-9)
    features = [planted.rank[name] for name in SOURCES]
    exact, bound = mf.collapse.collision_probability(features), mf.collapse.collision_bound(features)
    rate = float((found > 1.5).double().mean())
    assert abs(rate - exact) < 4 * (exact * (1 - exact) / 4000) ** 0.5
    assert bound < rate
    # of two features of different modalities one is predictive and one is noise; each pair counts twice
    kinds = {"image": (7, 9), "sound": (5, 6), "text": (4, 0)}
    mixed = sum(kinds[a][0] * kinds[b][1] for a, b in itertools.permutations(kinds, 2)) * 2 / sum(features) ** 2
    assert abs(float(neurons.harmful.double().mean()) - mixed) < 4 * (mixed * (1 - mixed) / 4000) ** 0.5


def test_the_gradient_outer_product_finds_the_teacher(planted):
    """Of the planted function itself M is W'W, of the rank of what predicts; noise has no part in it."""
    layer = nn.Linear(sum(SIZES), 12, bias=False).double()  # in float32 the products' rounding would stand for noise
    layer.weight.data = planted.teacher.double()
    inputs, _ = planted.draw(100, seed=0)
    with mf.collapse.Agop(layer) as agop:
        agop.add(layer(torch.cat(list(inputs.values()), 1).double()))
    assert agop.distance() < 1e-7
    assert mf.collapse.numerical_rank(agop.matrix) == 2 + 5 + 3  # text has nothing of its own to say
    noise = torch.block_diag(*planted.noise.values())
    assert float((noise @ agop.matrix @ noise.T).trace() / agop.matrix.trace()) < 1e-12


def test_a_trained_model_shows_what_was_planted(planted):
    """After 400 steps: the derivatives are on what predicts (noise below 1 %), and hardly on a modality with nothing of its own beyond what is common; watch sees the planted ranks."""
    torch.manual_seed(0)
    fusion = nn.Linear(sum(SIZES), 32)
    model = nn.Sequential(fusion, nn.ReLU(), nn.Linear(32, 12))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.1)
    with mf.collapse.watch(fusion, dict(zip(SOURCES, SIZES, strict=True)), every=200) as watch:
        for step in range(400):
            inputs, target = planted.draw(256, seed=1000 + step)
            loss = F.cross_entropy(model(torch.cat(list(inputs.values()), 1)), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert [record.step for record in watch.records] == [0, 200]
    for record in watch.records:
        assert {name: record.numerical_rank[name] for name in SOURCES} == {name: planted.rank[name] for name in SOURCES}
        assert record.numerical_rank["fused"] == 28  # 27 and the bias
        assert record.numerical_rank["gradient"] <= 27
    x = torch.cat(list(planted.draw(2000, seed=7)[0].values()), 1)
    with mf.collapse.Agop(fusion) as agop:
        agop.add(model(x))
    M = agop.matrix / agop.matrix.trace()
    noise = torch.block_diag(*planted.noise.values())
    blocks = [float(M[a:b, a:b].trace()) for a, b in ((0, 30), (30, 46), (46, 58))]
    own = planted.predictive["text"][2:]
    own = torch.cat([torch.zeros(2, 46, dtype=torch.float64), own], 1)
    assert float((noise @ M @ noise.T).trace()) < 0.01
    assert blocks[0] > blocks[1] > blocks[2]
    assert float((own @ M @ own.T).trace()) < 0.003


def test_labels_follow_the_teacher(planted):
    """The classes' frequencies given the logits: the mean log-likelihood of drawn labels is that of the softmax, within 4 standard errors; the same seed gives the same."""
    inputs, target = planted.draw(5000, seed=3)
    logits = torch.cat(list(inputs.values()), 1).double() @ planted.teacher.T
    log_p = logits.log_softmax(1)
    score = log_p.gather(1, target.unsqueeze(1)).squeeze(1)
    expected = (log_p.exp() * log_p).sum(1)
    error = (score - expected).std() / 5000**0.5
    assert (score - expected).mean().abs() < 4 * error
    again = planted.draw(5000, seed=3)
    assert torch.equal(again[1], target) and all(torch.equal(again[0][name], x) for name, x in inputs.items())
    assert not torch.equal(planted.draw(5000, seed=4)[1], target)
    few = Planted({"a": Source(9, 8, 0), "b": Source(5, 3, 1)}, classes=3)  # fewer classes than features
    assert few.teacher.shape == (3, 14) and int(few.draw(200, 0)[1].max()) == 2
    chance = Planted({"a": Source(4, 4, 0)}, classes=4, sharpness=0.0).draw(4000, 0)[1]
    assert (chance.bincount() / 4000 - 0.25).abs().max() < 0.03


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: Planted({}), "sources is empty"),
        (lambda: Planted({"a": Source(4, 3, 2)}), "a holds 0 common, 3 predictive and 2 noisy features, expected 1 to 4 in all, its width"),
        (lambda: Planted({"a": Source(4, 3, 1)}, common=1), "a holds 1 common"),
        (lambda: Planted({"a": Source(4, 0, 0)}), "a holds 0 common, 0 predictive"),
        (lambda: Planted({"a": Source(4, -1, 2)}), "a holds 0 common, -1 predictive"),
        (lambda: Planted({"a": Source(4, 1, 1, strength=-1.0)}), "a has strength -1.0 and loudness 1.0"),
        (lambda: Planted({"a": Source(4, 1, 1, loudness=0.0)}), "a has strength 1.0 and loudness 0.0"),
        (lambda: Planted({"a": Source(4, 1, 1)}, classes=1), "common is 0 and classes 1, expected at least 0 and 2"),
    ],
)
def test_errors(call, message):
    with pytest.raises(DataError, match=message):
        call()


def test_the_planted_set_is_what_its_source_says():
    split, source = modalities.load("planted", 3), modalities.planted(3)
    assert [len(part) for part in (split.train, split.valid, split.test)] == [4000, 1000, 4000] and split.classes == 10
    for seed, part in zip((10, 11, 12), (split.train, split.valid, split.test), strict=True):
        inputs, target = source.draw(len(part), seed)
        assert torch.equal(part.target, target) and all(torch.equal(x, inputs[name]) for name, x in part.inputs.items())
        assert all(there.all() for there in part.present.values())
    assert not torch.equal(split.train.target[:1000], split.valid.target)
    assert not torch.equal(split.train.target, modalities.load("planted", 4).train.target)


@pytest.mark.parametrize("seed", range(3))
def test_the_weak_modality_is_needed_and_the_loudest_tells_least(seed):
    """By the logits that made the labels: all .83 right, without the weak one at most .7, without the strong one less; noise is most of what is loud."""
    split, source = modalities.load("planted", seed), modalities.planted(seed)

    def right(*without):
        x = torch.cat([x * (name not in without) for name, x in split.test.inputs.items()], 1).double()
        return float(((x @ source.teacher.T).argmax(1) == split.test.target).double().mean())

    assert right() > 0.8
    assert right("strong") < right("weak") < right("loud") < right() - 0.05
    assert right("weak") < 0.7 and right("strong", "loud") > 0.2
    for name, x in split.test.inputs.items():
        noise = float((x.double() @ source.noise[name].T).square().sum() / x.double().square().sum())
        assert noise > 0.98 if name != "strong" else noise < 0.6
