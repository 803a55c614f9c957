"""A block lives in a training loop like any other module: accumulation, checkpointing, copies, dtypes."""

import copy
import io
import pickle

import pytest
import torch
from block_model import B, ByLength, H, Model, gradients, make_branches, materialised, total
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmfast.blocks.block import ImpartialityBlock
from mmfast.resolvers.projection import GradVac
from mmfast.resolvers.simple import Constant, Mean, Random


@pytest.fixture
def x():
    return torch.randn(B, 4, dtype=torch.float64)


def test_gradient_accumulation(x):
    model = Model()
    first, second = gradients(model, x), gradients(model, 2 * x)
    model.zero_grad()
    for data in (x, 2 * x):
        total(model(data)).backward()
    for name, p in model.named_parameters():
        assert torch.equal(p.grad, first[name] + second[name])


def test_several_blocks_and_a_block_within_a_block(x):
    inner = ImpartialityBlock(make_branches(), Constant([1.0, 0.0, 0.0]), preserve_norm=False)

    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = inner

        def forward(self, y):
            return torch.cat(self.inner(y), -1)

    outer = ImpartialityBlock([Nested(), nn.Linear(H, 1, dtype=torch.float64)], Constant([1.0, 0.0]), preserve_norm=False)
    y = torch.randn(B, H, dtype=torch.float64, requires_grad=True)
    a, b = outer(y)
    (a.square().sum() + b.sum()).backward()
    (expected,) = materialised(y, [inner.branches[0]], [lambda o: o.square().sum()])
    torch.testing.assert_close(y.grad, expected, rtol=1e-12, atol=1e-14)
    assert outer.stats().weights.tolist() == [1, 0] and inner.stats().weights.tolist() == [1, 0, 0]


def test_a_block_used_twice_in_one_pass(x):
    model = Model()
    alone = [gradients(model, x), gradients(model, -x)]
    model.zero_grad()
    (total(model(x)) + total(model(-x))).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, alone[0][name] + alone[1][name], rtol=1e-12, atol=1e-14)
    assert model.block.resolver.calls == 4
    twice = model.block.stats().gram
    gradients(model, x)  # of the two, the call that came first goes back last
    torch.testing.assert_close(twice, model.block.stats().gram)


@pytest.mark.parametrize("used", [(0, 1, 2), (0, 2)])
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(x, reentrant, used):
    model = Model(local=[1.0, 2.0, 3.0])
    expected = gradients(model, x, used)
    stats = model.block.stats()
    leaf = x.requires_grad_()  # the reentrant kind needs an input that has a gradient
    ours = gradients(model, leaf, used, lambda x: checkpoint(model, x, use_reentrant=reentrant))
    for name, grad in expected.items():
        assert torch.equal(ours[name], grad)
    assert torch.equal(model.block.stats().gram, stats.gram) and torch.equal(model.block.stats().missing, stats.missing)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
@pytest.mark.parametrize("resolver", [ByLength, Random, GradVac])
def test_copies_go_on_alike(x, how, resolver):
    model = Model(resolver(), local=[1.0, 2.0, 3.0])
    gradients(model, x)
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        file.seek(0)
        other = Model(resolver(), local=[9.0, 9.0, 9.0])
        other.load_state_dict(torch.load(file))
    assert how == "save" or torch.equal(other.block.stats().gram, model.block.stats().gram)
    one, two = gradients(model, x), gradients(other, x)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not {t.data_ptr() for t in model.state_dict().values()} & {t.data_ptr() for t in other.state_dict().values()}


def test_the_record_is_not_saved():
    model = Model(GradVac(), local=[1.0, 2.0, 3.0])
    keys = {k for k in model.state_dict() if "branches" not in k and k.startswith("block")}
    assert keys == {"block.beta", "block.resolver.state", "block.resolver.rng"}


def test_change_of_dtype(x):
    model = Model(GradVac(), local=[1.0, 2.0, 1 / 3])
    gradients(model, x)
    model.to(torch.bfloat16)
    block = model.block
    assert block.beta.dtype == block.resolver.state.dtype == block.stats().gram.dtype == torch.float64
    assert block.beta.tolist() == [1.0, 2.0, 1 / 3]
    grads = gradients(model, x.to(torch.bfloat16))
    assert all(g.dtype == torch.bfloat16 and g.isfinite().all() for g in grads.values())
    assert {b.device.type for b in model.to("meta").buffers()} == {"meta"}


def test_meta_device(x):
    with torch.device("meta"):
        block = ImpartialityBlock([nn.Linear(H, 1), nn.Linear(H, 2)], Mean(), local=[1.0, 3.0])
    block.to_empty(device="cpu")
    assert block.beta.tolist() == [1.0, 3.0]
    with pytest.raises(RuntimeError, match="no backward pass"):
        block.stats()


def test_autocast(x):
    model = Model(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(x.float())
        assert outputs[0].dtype == torch.bfloat16
    total([o.float() for o in outputs]).backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    assert model.block.stats().weights.isfinite().all()


def test_repr():
    text = repr(Model(Mean(), local=[1.0, 2.0, 1 / 3], per="sample").block)
    assert "per='sample', preserve_norm=True, local=[1, 2, 0.3333]" in text and "(resolver): Mean()" in text
