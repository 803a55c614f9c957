"""The interface of the fusion models, and late and early fusion."""

import pytest
import torch
from fusion_models import (
    CLASSES,
    NAMES,
    ROWS,
    SIZES,
    assert_absent_cells_are_never_read,
    assert_same,
    batch,
    encoders,
    features_of,
    grads,
    matrix,
    overfit,
)
from torch import nn
from torch.nn import functional as F

from mmfast.models.fusion import Concat, FusionModel, Late, feature_sizes, task_loss
from mmfast.models.fusion.base import random_subset


def early(dtype=torch.float64):
    return FusionModel(encoders(dtype), Concat(nn.Linear(sum(SIZES.values()), CLASSES).to(dtype)))


def late(dtype=torch.float64):
    return FusionModel(encoders(dtype), Late(SIZES, CLASSES).to(dtype))


def test_the_task_loss():
    logits, classes = torch.randn(6, 4, dtype=torch.float64), torch.randint(4, (6,))
    each = -logits.log_softmax(1)[torch.arange(6), classes]
    torch.testing.assert_close(task_loss(logits, classes), each.mean())
    rows = torch.tensor([True, False, True, True, False, False])
    torch.testing.assert_close(task_loss(logits, classes, rows), each[rows].mean())
    assert task_loss(logits, classes, torch.zeros(6, dtype=torch.bool)) == 0
    labels = (torch.rand(6, 4) > 0.5).double()
    expected = -(labels * F.logsigmoid(logits) + (1 - labels) * F.logsigmoid(-logits))
    torch.testing.assert_close(task_loss(logits, labels, rows), expected[rows].mean())
    assert task_loss(logits, 2 * labels - 1).isnan() and task_loss(logits, torch.where(rows[:, None], labels, 2.0), rows).isfinite()
    for target, found in ((torch.ones(6), r"torch.float32 \(6,\)"), (torch.zeros(6, 4).long(), r"torch.int64 \(6, 4\)")):
        with pytest.raises(ValueError, match=rf"target is {found}, expected int64 \(6,\) or floating-point \(6, 4\)"):
            task_loss(logits, target)
    for none in (-100, -1, 4):  # -100 is torch's mark of rows to be left out, which a mean over all rows would count as learned
        target = classes.clone()
        target[2] = none
        with pytest.raises(IndexError, match=f"Target {none} is out of bounds"):
            task_loss(logits, target)


def test_a_random_subset_has_its_size_and_is_uniform():
    present = torch.tensor([[True, True, False, True]]).expand(6000, 4)
    kept = random_subset(present, torch.full((6000,), 2))
    assert (kept.sum(1) == 2).all() and not kept[:, 2].any()
    assert (kept.double().mean(0)[[0, 1, 3]] - 2 / 3).abs().max() < 0.03
    assert torch.equal(random_subset(present, torch.full((6000,), 4)), present)
    assert not random_subset(present, torch.zeros(6000).long()).any()


def test_early_fusion_is_zeros_in_the_place_of_what_is_missing():
    model = early()
    x, _, present = batch()
    f = [model.encoders[n](x[n]) * present[n].unsqueeze(1) for n in NAMES]
    torch.testing.assert_close(model(x, present), model.fusion.network(torch.cat(f, 1)))


def test_late_fusion_is_the_mean_of_what_is_present():
    model = late()
    x, _, present = batch()
    found = model(x, present)
    for row in range(ROWS):
        each = [model.fusion.heads[n](model.encoders[n](x[n][row])) for n in NAMES if present[n][row]]
        torch.testing.assert_close(found[row], torch.stack(each).mean(0) if each else torch.zeros(CLASSES, dtype=torch.float64))


@pytest.mark.parametrize("make", [early, late])
def test_absent_cells_are_never_read(make):
    assert_absent_cells_are_never_read(make())


@pytest.mark.parametrize("make", [early, late])
def test_a_modality_absent_everywhere_is_one_that_is_not_given(make):
    model = make()
    x, target, present = batch()
    present["sound"] = torch.zeros(ROWS, dtype=torch.bool)
    some = {n: x[n] for n in NAMES if n != "sound"}, {n: present[n] for n in NAMES if n != "sound"}
    assert torch.equal(model(x, present), model(*some))
    a = grads(model, model.loss(x, target, present))
    b = grads(model, model.loss(some[0], target, some[1]))
    assert_same({n: g for n, g in a.items() if n in b}, b)
    assert {n for n in a if n not in b} == {n for n in a if n.startswith("encoders.sound")} and all(
        (a[n] == 0).all() for n in a if n not in b
    )
    assert torch.equal(model.encode(x, present)[1], matrix(present))


def test_a_batch_norm_sees_what_is_present():
    """Means over the present rows alone, where each of them stands in for as many absent ones."""
    model = FusionModel({"a": nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3, momentum=1.0))}, Concat(nn.Linear(3, 2)), {"a": 3})
    x, there = torch.randn(4, 2), torch.tensor([True, True, False, False])
    model({"a": torch.where(there.unsqueeze(1), x, torch.nan)}, {"a": there})
    torch.testing.assert_close(model.encoders["a"][1].running_mean, model.encoders["a"][0](x[:2]).mean(0))


def test_a_module_that_is_no_fusion_of_ours():
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(SIZES["text"], CLASSES).double()

        def forward(self, features, present):
            return self.layer(features["text"]) * present[:, 2:]

    model = FusionModel(encoders(), Head())
    x, target, present = batch()
    expected = model.fusion.layer(model.encoders["text"](x["text"])) * present["text"].unsqueeze(1)
    torch.testing.assert_close(model(x, present), expected)
    torch.testing.assert_close(model.loss(x, target, present), F.cross_entropy(expected, target))


def test_the_number_of_features_is_found():
    body = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 5), nn.ReLU(), nn.BatchNorm1d(5))
    assert feature_sizes({"a": body, "b": nn.Linear(3, 2)}) == {"a": 5, "b": 2}

    class Own(nn.Module):
        out_features = 9

        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(2, 3)

    assert feature_sizes({"a": Own()}) == {"a": 9}
    with pytest.raises(TypeError, match=r"encoders\['a'\] is a ReLU without out_features; expected sizes=\{'a': ...\} beside it"):
        feature_sizes({"a": nn.ReLU()})
    assert FusionModel({"a": nn.Identity()}, Concat(nn.Linear(4, 2)), {"a": 4})({"a": torch.ones(3, 4)}).shape == (3, 2)


@pytest.mark.parametrize("make", [early, late])
def test_overfits_32_samples(make):
    assert overfit(make(torch.float32)) == 1


@pytest.mark.parametrize("make", [early, late])
def test_the_state_dict(make):
    a, b = make(), make()
    x, _, present = batch()
    assert not torch.equal(a(x, present), b(x, present))
    b.load_state_dict(a.state_dict())
    assert torch.equal(a(x, present), b(x, present))


def test_what_is_refused():
    x, target, present = batch()
    head = Concat(nn.Linear(18, 3).double())
    for call, error, message in [
        (lambda: FusionModel([nn.Linear(2, 3)], head), TypeError, "encoders is not as expected: a dict"),
        (lambda: FusionModel({}, head), TypeError, "encoders is not as expected"),
        (lambda: FusionModel({"a": abs}, head), TypeError, r"encoders\['a'\] is a builtin_function_or_method, expected an nn.Module"),
        (lambda: FusionModel({"a.b": nn.Linear(2, 3)}, head), ValueError, "encoders has 'a.b', expected names without a dot"),
        (
            lambda: FusionModel({"type": nn.Linear(2, 3)}, head),
            ValueError,
            "encoders has 'type', which torch.nn.ModuleDict has as an attribute",
        ),
        (lambda: FusionModel(encoders(), abs), TypeError, "fusion is a builtin_function_or_method, expected an nn.Module"),
        (lambda: FusionModel(encoders(), head, {"image": 2}), ValueError, "sizes is .*, expected the number of features of each of image"),
        (lambda: FusionModel(encoders(), head, SIZES | {"text": 0}), ValueError, "sizes is "),
        (
            lambda: FusionModel(encoders(), head, SIZES | {"text": 4})(x),
            ValueError,
            r"the encoder of 'text' gives shape \(12, 5\), expected \(12, 4\)",
        ),
        (lambda: early()(x["text"]), TypeError, "inputs is a Tensor, expected a dict"),
        (lambda: early()({"txt": x["text"]}), ValueError, "inputs has 'txt', expected names among image, sound, text"),
        (lambda: early()(x, {"text": present["text"].float()}), ValueError, r"present\['text'\] is torch.float32"),
        (lambda: early().loss(x, present["text"], target), TypeError, "present is a Tensor, expected a dict from names to bool tensors"),
        (lambda: early().loss(x, target[1:], present), ValueError, r"target is torch.int64 \(11,\), expected int64 \(12,\)"),
    ]:
        with pytest.raises(error, match=message):
            call()


def test_features_of_the_helper_are_zero_where_absent():
    features, there, _ = features_of()
    assert all((f[~there[:, i]] == 0).all() and (f[there[:, i]] != 0).all() for i, f in enumerate(features.values()))
