"""Where gradient modulation scales: behind encoders, in blocks; nothing waits for a device, and what is kept lives on."""

import copy
import pickle

import pytest
import torch
from modulation_models import KINDS, C, Late, Shared, batch, data, gradients, loss_of, step
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import mmfast as mf


def test_encoders_get_their_beta_and_the_fusion_does_not():
    torch.manual_seed(0)
    scale = mf.OGM(alpha=0.4)
    model = Late(scale)
    plain = Late(None)
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if not name.startswith("scale.")})
    for seed in range(3):
        ours, theirs = step(model, scale, *data(seed)), step(plain, None, *data(seed))
        assert scale.beta.min() < 1 == scale.beta.max()
        for name, gradient in theirs.items():
            beta = scale.beta[int(name.split(".")[1])] if name.startswith("encoders") else 1.0
            torch.testing.assert_close(ours[name], (beta * gradient).float(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("per", ["batch", "sample"])
@pytest.mark.parametrize("where", ["block", "heads", "attach"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_block_does_what_it_does_with_these_numbers(kind, where, per):
    """G -> beta G beta: as with the same beta given as fixed numbers, which the step before has not."""
    torch.manual_seed(1)
    scale = KINDS[kind](2)
    model = Shared(where, mf.UPGrad(), scale, per=per).double()
    for seed in range(3):
        x, labels = data(seed)
        ours = step(model, scale, x.double(), labels)
        fixed = Shared(where, mf.UPGrad(), scale.beta.clamp(min=1e-300).tolist(), per=per).double()
        fixed.load_state_dict(model.state_dict(), strict=False)
        for name, gradient in step(fixed, None, x.double(), labels).items():
            torch.testing.assert_close(ours[name], gradient, rtol=1e-10, atol=1e-14)


class Watch(TorchDispatchMode):
    """Raises where a value would leave its device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), func
        out = func(*args, **(kwargs or {}))
        devices = {x.device for x in (*args, out) if isinstance(x, torch.Tensor)}
        assert len(devices) <= 1, (func, devices)
        return out


@pytest.mark.parametrize("where", ["encoders", "block", "heads", "attach"])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_waits(kind, where, monkeypatch):
    scale = KINDS[kind](2)
    model = Late(scale) if where == "encoders" else Shared(where, mf.Sum(), scale)
    x, labels = data()

    def refuse(*_, **__):
        raise AssertionError("a tensor's value was asked for")

    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "numpy", "cpu"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    with Watch():
        logits = model(x)
        scale.update(logits, labels)
        loss_of(logits, labels).backward()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_of_16_bits_are_rounded_once(dtype):
    scale = mf.OGM()
    scale.beta.copy_(torch.tensor([1e-9, 1 / 3]))
    features = [torch.zeros(3, dtype=dtype, requires_grad=True) for _ in range(2)]
    incoming = torch.tensor([1e4, -3e3, 7.0], dtype=dtype)
    torch.autograd.backward(scale(features), [incoming, incoming])
    for feature, beta in zip(features, scale.beta, strict=True):
        assert torch.equal(feature.grad, (incoming.double() * beta).to(dtype))


def test_features_of_any_form():
    scale = mf.OGM()
    scale.beta.copy_(torch.tensor([0.5, 0.25]))
    x = torch.ones(2, requires_grad=True)
    z = torch.ones(2, dtype=torch.complex64, requires_grad=True)
    (mean, spread), other = scale([(2 * x, 3 * x), {"z": 4 * z, "n": 3}])
    (mean.sum() + spread.sum() + other["z"].real.sum()).backward()
    assert torch.equal(x.grad, torch.full((2,), 2.5)) and torch.equal(z.grad, torch.ones(2, dtype=torch.complex64))
    assert all(torch.equal(a, b) for a, b in zip(scale([x, x]), [x, x], strict=True))
    with torch.no_grad():
        assert scale([x, z])[0] is x


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_and_copies(kind, tmp_path):
    """What is kept goes on where it was: in a block's checkpoint, in attach's, in a copy and in a pickle, each of which then goes its own way."""
    scale = KINDS[kind](2)
    model = Shared("block", mf.GradVac(), scale)
    for seed in range(2):
        step(model, scale, *data(seed))
    torch.save(model.state_dict(), tmp_path / "model.pt")
    loaded = Shared("heads", mf.GradVac(), KINDS[kind](2))
    loaded.load_state_dict(torch.load(tmp_path / "model.pt"))
    handle = Shared("attach", mf.GradVac(), KINDS[kind](2)).attached[0]
    handle.load_state_dict(
        {name[6:]: value for name, value in model.state_dict().items() if not name.startswith(("encoder.", "block.branches."))}
    )
    twin = copy.deepcopy(model)
    others = [loaded.block.modulation, handle.modulation, twin.block.modulation, pickle.loads(pickle.dumps(scale))]
    before, (logits, labels) = scale.beta.clone(), batch(2, 7, scale=0.2)
    scale.update(logits, labels)
    for other in others:
        assert torch.equal(other.beta, before)
        other.update(logits, labels)
        assert torch.equal(other.beta, scale.beta)
    scale.reset()
    assert scale.beta.tolist() == [1.0, 1.0] and scale.beta.tolist() != others[2].beta.tolist()
    x, labels = data(8)
    ours = step(twin, others[2], x, labels)
    for name, gradient in step(model, scale, x, labels).items():
        assert torch.equal(ours[name], gradient) == (kind == "OGM"), name  # which keeps nothing between steps


def test_a_checkpoint_of_plain_branches_leaves_it_alone():
    scale = mf.OGM()
    block = mf.ImpartialityBlock([nn.Linear(6, C), nn.Linear(6, C)], "upgrad", local=scale)
    scale.beta.fill_(0.5)
    block.load_state_dict(nn.ModuleList([nn.Linear(6, C), nn.Linear(6, C)]).state_dict())
    assert scale.beta.tolist() == [0.5, 0.5]


def test_dtypes_and_devices():
    scale = mf.OGM()
    model = Late(scale)
    scale.beta.fill_(1 / 3)
    for cast in (model.half, model.bfloat16, model.double, model.float):
        cast()
        assert scale.beta.dtype == torch.float64 and scale.beta[0] == 1 / 3
    model.to("meta")
    assert scale.beta.is_meta and scale.beta.dtype == torch.float64
    model.to_empty(device="cpu")
    scale.reset_parameters()
    assert scale.beta.tolist() == [1.0, 1.0]
    init = []
    model.apply(lambda module: init.append(type(module)))
    assert mf.OGM in init


def test_a_forgotten_update_is_told_once():
    scale = mf.OGM()
    model = Late(scale)
    x, labels = data()
    loss_of(model(x), labels).backward()  # before the first one there is nothing to scale
    step(model, scale, x, labels)
    model(x)  # an evaluation
    step(model, scale, x, labels)
    logits = model(x)
    with pytest.warns(UserWarning, match="OGM.update was not called between this forward and backward pass"):
        loss_of(logits, labels).backward()
    step(model, None, x, labels)
    other = Late(mf.OGM())
    step(other, other.scale, x, labels)
    other.scale.reset()
    step(other, None, x, labels)


@pytest.mark.parametrize("where", ["encoders", "block", "heads", "attach"])
def test_activation_checkpointing_and_accumulation(where):
    torch.manual_seed(0)
    scale = mf.OGM(alpha=0.4)
    model = Late(scale) if where == "encoders" else Shared(where, mf.Sum(), scale)
    ours = step(model, scale, *data(), lambda x: checkpoint(model, x, use_reentrant=False))
    beta = scale.beta.clone()
    for name, gradient in step(model, scale, *data()).items():
        torch.testing.assert_close(ours[name], gradient)
    assert torch.equal(beta, scale.beta)
    logits = model(data(3)[0])  # a second part of the batch, with a beta of its own
    scale.update(logits, data(3)[1])
    loss_of(logits, data(3)[1]).backward()
    both = gradients(model)
    for name, gradient in step(model, scale, *data(3)).items():
        torch.testing.assert_close(both[name], ours[name] + gradient)
