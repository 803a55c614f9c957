"""watch: what it records is what the functions say of the same tensors; when it looks; that it can be drawn."""

import copy
import sys

import pytest
import torch
from torch import nn

import mmfast as mf

MODALITIES = {"image": 5, "sound": 3}


def run(model, where, steps, every=1, x=None, **options):
    """Trains for some steps; returns the watch, what went through the layer and its gradients."""
    seen, optimizer = [], torch.optim.SGD(model.parameters(), 0.1)
    hook = where.register_forward_hook(lambda module, args, output: seen.append((args[0].detach().clone(), output.detach().clone())))
    watch = mf.collapse.watch(where, MODALITIES, every=every, **options)
    grads, weights = [], []
    for _ in range(steps):
        weights.append(where.weight.detach().clone())
        model(torch.randn(16, 8) if x is None else x).square().mean().backward()
        grads.append(where.weight.grad.clone())
        optimizer.step()
        optimizer.zero_grad()
    hook.remove()
    return watch, seen, grads, weights


def test_records_are_what_the_functions_say():
    fusion = nn.Linear(8, 6)
    model = nn.Sequential(nn.Linear(8, 8), fusion, nn.Hardtanh(-0.1, 0.1, inplace=True), nn.Linear(6, 2))  # the output is written over
    watch, seen, grads, weights = run(model, fusion, 5, every=2)
    assert [record.step for record in watch.records] == [0, 2, 4]
    for record in watch.records:
        (x, y), grad = seen[record.step], grads[record.step]
        image, sound = x.split([5, 3], 1)
        matrices = {"image": image, "sound": sound, "fused": y, "gradient": grad}
        assert record.effective_rank == {name: float(mf.collapse.effective_rank(z)) for name, z in matrices.items()}
        assert record.numerical_rank == {name: float(mf.collapse.numerical_rank(z)) for name, z in matrices.items()}
        torch.testing.assert_close(record.similarity, mf.collapse.similarity([image, sound]), rtol=0, atol=0)
        assert torch.equal(record.participation, mf.collapse.participation(weights[record.step], [5, 3]))
    assert watch.shares().shape == (6, 2)
    torch.testing.assert_close(1 / watch.shares().square().sum(1), mf.collapse.participation(fusion.weight, [5, 3]))


def test_planted_ranks_are_seen():
    """Features of rank two and one in sixteen samples: the fused ones have three, and so has the gradient."""
    fusion = nn.Linear(8, 6, bias=False)
    x = torch.cat([torch.randn(16, 2) @ torch.randn(2, 5), torch.randn(16, 1) @ torch.randn(1, 3)], 1)
    watch, *_ = run(nn.Sequential(fusion, nn.Tanh(), nn.Linear(6, 4)), fusion, 2, x=x)
    assert watch.records[1].numerical_rank == {"image": 2, "sound": 1, "fused": 3, "gradient": 3}


def test_which_steps_count():
    """Not evaluation, not under no_grad, not a forward pass without a backward one; two micro-batches are two steps."""
    fusion = nn.Linear(8, 6)
    model = nn.Sequential(fusion, nn.Dropout(0.5))
    with mf.collapse.watch(fusion, MODALITIES, every=1) as watch:
        x = torch.randn(4, 8)
        with torch.no_grad():
            model(x)
        model.eval()
        model(x).sum().backward()
        assert not watch.records
        model.train()
        model(torch.randn(9, 8))
        model(x).sum().backward()
        model(x).sum().backward()
        assert [record.step for record in watch.records] == [1, 2]
        assert watch.records[0].effective_rank["fused"] <= 4
    model(x).sum().backward()
    assert len(watch.records) == 2
    assert not fusion._forward_hooks and not fusion.weight._backward_hooks and list(model.state_dict()) == ["0.weight", "0.bias"]


def test_a_copy_of_the_model_is_not_watched():
    fusion = nn.Linear(8, 6)
    with mf.collapse.watch(fusion, MODALITIES, every=1) as watch:
        copy.deepcopy(fusion)(torch.randn(4, 8)).sum().backward()
        assert not watch.records and watch._features is None


def test_a_convolution_in_low_precision():
    fusion, x = nn.Conv2d(8, 6, 3, padding=1), torch.randn(2, 8, 5, 5)
    with mf.collapse.watch(fusion, MODALITIES, every=1) as watch, torch.autocast("cpu", torch.bfloat16):
        fusion(x).float().square().mean().backward()
    record = watch.records[0]
    rows = x.movedim(1, -1).reshape(-1, 8)
    assert record.effective_rank["image"] == float(mf.collapse.effective_rank(rows[:, :5]))
    assert record.effective_rank["gradient"] == float(mf.collapse.effective_rank(fusion.weight.grad.flatten(1)))
    assert record.participation.shape == (6,)


def test_a_step_that_overflows():
    fusion = nn.Linear(8, 6)
    with mf.collapse.watch(fusion, MODALITIES, every=1) as watch:
        (fusion(torch.randn(4, 8)).sum() * torch.inf).backward()
    assert watch.records[0].effective_rank["gradient"] != watch.records[0].effective_rank["gradient"]
    assert watch.records[0].effective_rank["image"] > 0


def test_table_and_figure(tmp_path):
    fusion = nn.Linear(8, 6)
    watch, *_ = run(nn.Sequential(fusion, nn.Tanh()), fusion, 3)
    lines = str(watch).splitlines()
    assert lines[0].startswith("step 2") and [line.split()[0] for line in lines[1:5]] == ["image", "sound", "fused", "gradient"]
    assert lines[1].split()[-1] == "5" and lines[3].split()[-1] == lines[4].split()[-1] == "6"
    assert "of 2; collision bound 0.28" in lines[5]
    pytest.importorskip("matplotlib")
    watch.plot(tmp_path / "watch.png")
    assert (tmp_path / "watch.png").stat().st_size > 10_000
    empty = mf.collapse.watch(nn.Linear(8, 6), MODALITIES)
    assert str(empty) == "nothing recorded yet"
    empty.plot(str(tmp_path / "empty.png"))
    assert (tmp_path / "empty.png").exists()


def test_without_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="a drawing needs matplotlib: pip install matplotlib"):
        mf.collapse.watch(nn.Linear(8, 6), MODALITIES).plot(tmp_path / "none.png")


@pytest.mark.parametrize(
    "layer, modalities, options, error, message",
    [
        (3, MODALITIES, {}, TypeError, "fusion_layer is a int, expected an nn.Module"),
        (nn.ReLU(), MODALITIES, {}, TypeError, "fusion_layer is a ReLU, expected an nn.Linear or convolution"),
        (nn.Conv1d(8, 6, 1, groups=2), MODALITIES, {}, TypeError, "a convolution in 2 groups"),
        (nn.Linear(8, 6).requires_grad_(False), MODALITIES, {}, TypeError, "fusion_layer is a Linear, expected .* whose weight is a parameter of its own that wants a gradient"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(8, 6)), MODALITIES, {}, TypeError, "fusion_layer is a ParametrizedLinear, expected an nn.Linear"),
        (nn.Linear(8, 6), [5, 3], {}, TypeError, "modalities is a list, expected a dict of widths by name"),
        (nn.Linear(8, 6), {"image": 5, "sound": 2}, {}, ValueError, r"modalities add up to 7 columns, expected 8, those of fusion_layer's weight \(6, 8\)"),
        (nn.Linear(8, 6), {"image": 5, "sound": "3"}, {}, TypeError, r"modalities is \[5, '3'\], expected whole numbers"),
        (nn.Linear(8, 6), {"image": 5, "fused": 3}, {}, ValueError, "modalities has an entry 'fused'"),
        (nn.Linear(8, 6), MODALITIES, {"every": 0}, ValueError, "every is 0, expected a positive number"),
    ],
)  # fmt: skip
def test_errors(layer, modalities, options, error, message):
    with pytest.raises(error, match=message):
        mf.collapse.watch(layer, modalities, **options)
