"""Runs on representation collapse: which rows they see, what is measured of them, and the systems."""

import collapse_records
import pytest
import torch
from collapse_records import ROWS, tiny
from torch import nn

from mmfast.data.samples import Samples
from mmfast.experiments.collapse import measures, parts, run, systems
from mmfast.experiments.settings import SettingsError
from mmfast.models.fusion import Concat, FusionModel


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    collapse_records.use(monkeypatch)


# the rows


def test_masks_are_the_same_for_all_systems_of_a_seed():
    kinds = [tiny(), tiny("muse", "ebr"), tiny("cmae", epochs=7), tiny(noise=2.0)]
    one, *others = (parts.load(of) for of in kinds)
    for other in others:
        for a, b in zip(every_part(one), every_part(other), strict=True):
            assert all(torch.equal(a.present[name], b.present[name]) for name in a.present) and torch.equal(a.target, b.target)
    other = parts.load(tiny(seed=1))
    assert not torch.equal(one.test[0.4].present["weak"], other.test[0.4].present["weak"])


def every_part(data):
    return [data.train, data.valid, data.valid_missing, *data.test.values()]


def test_modalities_are_dropped_at_the_rate_and_never_all_of_a_row():
    n = 4000
    own = torch.ones(n, 3, dtype=torch.bool)
    own[: n // 2, 0] = False
    own[0] = False  # has nothing from the start
    names = "abc"
    rows = Samples({k: torch.zeros(n, 1) for k in names}, dict(zip(names, own.unbind(1), strict=True)), torch.zeros(n, dtype=torch.int64))
    keys = torch.rand(n, 3, generator=torch.Generator().manual_seed(0))
    before = own
    for rate in parts.RATES:
        kept = torch.stack(list(parts.dropped(rows, keys, rate).present.values()), 1)
        assert not (kept & ~before).any()  # nothing comes back at a higher rate
        assert torch.equal(kept.any(1), own.any(1))
        alone = rate**2  # of three: the third is dropped unless it is the last one
        expected = 1 - rate + rate * alone / 3
        assert float(kept[n // 2 :].double().mean()) == pytest.approx(expected, abs=0.02)
        before = kept
    assert torch.equal(torch.stack(list(parts.dropped(rows, keys, 0.0).present.values()), 1), own)
    each = parts.dropped(rows, keys, torch.tensor([[0.0], [1.0]]).repeat(n // 2, 1))
    there = torch.stack(list(each.present.values()), 1)[1:].sum(1)
    assert torch.equal(there[1::2], own[2::2].sum(1)) and there[::2].max() == 1


def test_rows_are_cut_by_the_seed_but_for_all_of_them(monkeypatch):
    monkeypatch.setattr(parts, "ROWS", {"train": 40, "valid": 20, "test": 30})
    cut, same, other, full = (parts.load(of) for of in (tiny(), tiny("late"), tiny(seed=1), tiny(full=True)))
    assert (len(cut.train), len(cut.valid), len(cut.test[0.0])) == (40, 20, 30) and len(full.train) == ROWS["train"]
    assert torch.equal(cut.train.target, same.train.target) and not torch.equal(cut.train.target, other.train.target)


def test_noise_is_in_one_modality_of_all_parts():
    plain, loud = parts.load(tiny()), parts.load(tiny(noise=2.0))
    for a, b in zip(every_part(plain), every_part(loud), strict=True):
        assert torch.equal(a.inputs["weak"], b.inputs["weak"])
        assert float((b.inputs["strong"] - a.inputs["strong"]).std()) == pytest.approx(2, abs=0.3)


def test_avmnist_has_what_it_lacks_and_no_more_is_dropped_in_training():
    data, split = parts.load(tiny(data="avMNIST")), collapse_records.split("avMNIST", 0)
    assert int(data.train.present["audio"].sum()) == int(split.train.present["audio"].sum()) and bool(data.train.present["image"].all())
    assert float(parts.load(tiny()).train.present["weak"].double().mean()) < 0.95


def test_rows_with_one_modality_alone_and_without_one():
    there = {"a": torch.tensor([True, True, False]), "b": torch.tensor([True, False, True])}
    rows = Samples({"a": torch.zeros(3, 1), "b": torch.zeros(3, 1)}, there, torch.arange(3))
    alone = parts.only(rows, "a")
    assert alone.target.tolist() == [0, 1] and alone.present["a"].tolist() == [True, True] and not alone.present["b"].any()
    whole, without = parts.with_and_without(rows, "a")
    assert whole.target.tolist() == without.target.tolist() == [0] and whole.present["a"].all()
    assert not without.present["a"].any() and without.present["b"].all() and rows.present["a"].sum() == 2


# measures


def test_scores_are_those_of_pairs_and_ranks():
    p = torch.tensor([0.9, 0.8, 0.7, 0.4, 0.2])
    target = torch.tensor([1, 0, 1, 0, 0])
    found = measures.scores(torch.stack([torch.zeros(5), (p / (1 - p)).log()], 1), target)
    # of 6 pairs of a positive and a negative one is in the wrong order; precision 1 at the first positive, 2/3 at the second
    assert (found.roc, found.prc, found.accuracy) == pytest.approx((5 / 6, (1 + 2 / 3) / 2, 4 / 5))
    assert (found.main(2), found.main(3)) == (found.roc, found.accuracy)
    assert measures.scores(torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64)) is None
    assert measures.scores(torch.tensor([[0.0, torch.nan], [0.0, 1.0]]), torch.tensor([0, 1])) is None


def test_scores_of_many_classes_are_means_over_those_that_are_there():
    logits = torch.tensor([[3.0, 0, 0, 0], [2.0, 1, 0, 0], [0.0, 2, 0, 0], [0.0, 1.5, 2, 0]])
    found = measures.scores(logits, torch.tensor([0, 1, 1, 2]))
    p = logits.double().softmax(1)
    roc, prc = [], []
    for c, own in enumerate(([0], [1, 2], [3])):
        others = [i for i in range(4) if i not in own]
        roc.append(sum(float(p[i, c] > p[j, c]) for i in own for j in others) / len(own) / len(others))
        order = p[:, c].argsort(descending=True).tolist()
        prc.append(sum((k + 1) / (order.index(i) + 1) for k, i in enumerate(sorted(own, key=order.index))) / len(own))
    assert (found.roc, found.prc, found.accuracy) == pytest.approx((sum(roc) / 3, sum(prc) / 3, 3 / 4))


@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("shift", [0.0, 20.0, 50.0, 500.0])
def test_scores_tell_sure_rows_apart(classes, shift):
    """Probabilities are 1, all of them, from a difference of 37 of logits on; the order that ROC and PRC see goes on."""
    target = torch.arange(60) % classes
    logits = torch.randn(60, classes)
    expected = measures.scores(logits, target)
    sure = logits.clone()
    for c in [1] if classes == 2 else range(classes):
        sure = logits.clone()
        sure[:, c] += shift
        found = measures.scores(sure, target)
        own, others = target == c, [i for i in range(classes) if i != c]
        odds = sure.double()[:, c] - sure.double()[:, others].logsumexp(1)
        pairs = (odds[own].unsqueeze(1) > odds[~own]).double().mean()
        if classes == 2:
            assert (found.roc, found.prc) == (expected.roc, expected.prc) and found.roc == pytest.approx(float(pairs))
        else:
            one = measures.scores(torch.stack([-odds, odds], 1) / 2, own.long())  # this class against the rest
            rest = [k for k in range(classes) if k != c]
            each = [sure.double()[:, k] - sure.double()[:, [i for i in range(classes) if i != k]].logsumexp(1) for k in rest]
            areas = [(o[target == k].unsqueeze(1) > o[target != k]).double().mean() for k, o in zip(rest, each, strict=True)]
            assert one.roc == pytest.approx(float(pairs))
            assert found.roc == pytest.approx(float((pairs + sum(areas)) / classes))


def test_the_look_at_a_linear_fusion_is_known(monkeypatch):
    """Of logits W x the product of derivatives is W'W; with features of deviations s, s W'W s."""
    torch.manual_seed(0)
    fusion = Concat(nn.Linear(5, 2, bias=False))
    model = FusionModel({"a": nn.Identity(), "b": nn.Identity()}, fusion, {"a": 2, "b": 3}).double()
    x = {"a": 3 * torch.randn(200, 2, dtype=torch.float64), "b": torch.randn(200, 3, dtype=torch.float64)}
    there = {"a": torch.ones(200, dtype=torch.bool), "b": torch.rand(200) > 0.3}
    rows = Samples(x, there, torch.zeros(200, dtype=torch.int64))
    found = measures.look(systems.System(model, fusion.network, None), rows, 64)
    s = torch.cat([x["a"].std(0, correction=0), x["b"][there["b"]].std(0, correction=0)])
    W = fusion.network.weight.detach() * s
    energies = torch.stack([W[:, :2].square().sum(1), W[:, 2:].square().sum(1)], 1)
    assert found.participation == pytest.approx(float((energies.sum(1).square() / energies.square().sum(1)).mean()))
    assert found.shares["a"] == pytest.approx(float(energies[:, 0].sum() / energies.sum())) and sum(found.shares.values()) == pytest.approx(
        1
    )
    _, S, V = torch.linalg.svd(W, full_matrices=False)
    spread = torch.stack([V[:, :2].square().sum(1), V[:, 2:].square().sum(1)], 1)
    assert found.directions == pytest.approx(float((S.square() / spread.square().sum(1)).sum() / S.square().sum()))
    assert found.numerical_rank == {"a": 2, "b": 3, "fused": 5} and found.similarity[0][0] == pytest.approx(1)
    assert model.training  # as it was
    monkeypatch.setattr(measures, "ROWS", 50)
    assert measures.look(systems.System(model, None, None), rows, 64).participation is None


def test_a_modality_that_is_ignored_has_no_share_and_contributes_nothing():
    fusion = Concat(nn.Linear(4, 2))
    fusion.network.weight.data[:, 2:] = 0
    model = FusionModel({"a": nn.Identity(), "b": nn.Identity()}, fusion, {"a": 2, "b": 2})
    x = torch.randn(80, 4)
    target = (x @ (fusion.network.weight[1] - fusion.network.weight[0]) > 0).long()
    there = {name: torch.ones(80, dtype=torch.bool) for name in "ab"}
    rows = Samples({"a": x[:, :2], "b": x[:, 2:]}, there, target)
    system = systems.System(model, fusion.network, None)
    found = measures.look(system, rows, 16)
    assert found.shares == {"a": pytest.approx(1), "b": 0} and found.participation == pytest.approx(1)
    assert run._contribution(system, tiny(), 2, *parts.with_and_without(rows, "b")) == 0
    assert run._contribution(system, tiny(), 2, *parts.with_and_without(rows, "a")) > 0.3


# systems


def test_encoders_and_fusion_begin_alike_whatever_the_cure():
    data = parts.load(tiny())
    for system in ("late", "early", "grape", "m3care", "muse"):
        plain, *treated = (systems.make(tiny(system, cure), data).model.state_dict() for cure in ("none", "kd", "ebr"))
        assert all(torch.equal(plain[name], other[name]) for other in treated for name in plain)
    assert not torch.equal(plain["encoders.weak.0.weight"], systems.make(tiny(seed=1), data).model.state_dict()["encoders.weak.0.weight"])


def test_the_factors_have_one_length_whatever_the_features():
    data = parts.load(tiny(cure="ebr"))
    model = systems.make(tiny(cure="ebr"), data).model
    model.encoders["weak"][-1].weight.data *= 100
    factors, _ = model.latents(data.valid.inputs)
    for g in factors.values():
        torch.testing.assert_close(g.square().mean(1), torch.ones(len(g)), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("system", ["early", "cmae", "mt", "grape", "m3care", "shaspec", "muse", "late"])
def test_the_fused_features_are_what_the_logits_are_made_of(system):
    data = parts.load(tiny(system))
    made = systems.make(tiny(system), data)
    features, there, fused = measures.features_of(made, data.valid_missing, 32)
    assert [f.shape for f in features.values()] == [(60, systems.WIDTH)] * 2 and there.shape == (60, 2)
    if made.last is None:
        assert torch.equal(fused, torch.cat(list(features.values()), 1))
    else:
        torch.testing.assert_close(made.last(fused), measures.logits_of(made.model, data.valid_missing, 32))


def test_encoders_of_pictures_have_the_published_sizes():
    for shape, flat in (((1, 28, 28), 160), ((1, 20, 20), 320)):
        network = systems.encoder(shape)
        assert network[-1].in_features == flat and network(torch.zeros(2, *shape)).shape == (2, systems.WIDTH)
        assert systems.decoder(shape)(torch.zeros(2, systems.WIDTH)).shape == (2, *shape)
    with pytest.raises(SettingsError, match="an input has shape"):
        systems.encoder((3, 9, 9))


def test_smil_wants_one_modality_that_may_be_missing(monkeypatch):
    data = parts.load(tiny("smil", data="avMNIST"))
    assert systems.make(tiny("smil", data="avMNIST"), data).model.missing == "audio"
    with pytest.raises(SettingsError, match="strong, weak is missing for some; expected one"):
        systems.make(tiny("smil", data="avMNIST"), parts.load(tiny()))


def test_all_stages_before_the_last_have_as_many_epochs():
    assert systems.plan(tiny("early", epochs=20), 4) == [20] and systems.plan(tiny("cmae", epochs=20), 4) == [20, 20]
    assert systems.plan(tiny("early", "kd", epochs=20), 3) == [10, 5, 5, 20] and systems.plan(tiny("late", "kd", epochs=1), 2) == [1, 1, 1]
