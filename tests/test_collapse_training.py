"""Agop beside training: neither notices the other, in whatever it is wrapped."""

import copy
import gc
import warnings

import pytest
import torch
from jacobians import Pass, assert_close, mlp, oracle
from torch import nn

import mmfast as mf


def training(watched, seed=0):
    """Three steps of a model with dropout and a block whose rule has a state; all that they leave behind."""
    torch.manual_seed(seed)
    layer = nn.Linear(8, 8)
    body = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), layer, nn.ReLU(inplace=True), nn.Dropout(0.3))
    block = mf.ImpartialityBlock(nn.ModuleList([nn.Linear(8, 2), nn.Linear(8, 3)]), mf.GradNorm(update_at=1))
    model = nn.ModuleList([body, block])
    optimizer = torch.optim.Adam(model.parameters())
    agop = mf.collapse.Agop(layer, probes=2) if watched else None
    handle = mf.collapse.watch(layer, {"a": 4, "b": 4}, every=1) if watched else None
    for x in torch.randn(3, 16, 5):
        outputs = block(body(x))
        if agop:
            agop.add(torch.cat(outputs, 1))
            assert all(p.grad is None for p in model.parameters())
        sum(y.square().mean() for y in outputs).backward()
        optimizer.step()
        optimizer.zero_grad()
    if handle:
        assert len(handle.records) == 3
    return [*model.state_dict().values(), block.stats().gram, torch.get_rng_state(), *map(len, (model.state_dict(), body._modules))]


def test_training_does_not_notice():
    for with_it, without in zip(training(True), training(False), strict=True):
        assert torch.equal(torch.as_tensor(with_it), torch.as_tensor(without))


def test_a_block_passes_plain_gradients():
    """Random signs reach all branches of a block: what is averaged are the model's derivatives, not a rule's."""
    body = nn.Sequential(nn.Linear(5, 4), nn.Tanh())
    block = mf.ImpartialityBlock(nn.ModuleList([nn.Linear(4, 1), nn.Linear(4, 1)]), mf.UPGrad())
    x = torch.randn(40, 5)
    with mf.collapse.Agop(body[0], probes=64) as agop:
        agop.add(torch.cat(block(body(x)), 1))
    wide = copy.deepcopy(nn.Sequential(body, nn.Linear(4, 2))).double()
    wide[1].weight.data = torch.cat([head.weight for head in block.branches]).double()
    expected = oracle(x, wide)
    assert float((agop.matrix - expected).norm() / expected.norm()) < 0.05


def test_hooks_are_gone():
    model, x = mlp(4, 4, 1), torch.randn(6, 5)
    keys = list(model.state_dict())
    for where in (model[2], model[2:4]):
        with mf.collapse.Agop(where) as agop:
            assert list(model.state_dict()) == keys
            twin = copy.deepcopy(nn.ModuleList([where]))[0]  # has the hook, and is another module
            with pytest.raises(ValueError, match="outputs does not come from a call of"):
                agop.add(twin(model[:2](x)))
        assert not where._forward_hooks and not where._forward_pre_hooks
        with pytest.raises(ValueError, match="outputs does not come from a call of"):
            agop.add(model(x))
    with mf.collapse.Agop(model[2]) as agop:
        agop.add(model(x))


def test_forward_passes_in_between():
    """Only calls behind the outputs count: not those of another batch, nor under no_grad."""
    model, x, y = mlp(4, 4, 2), torch.randn(6, 5), torch.randn(8, 5)
    alone = mf.collapse.Agop(model[2])
    alone.add(model(x))
    agop = mf.collapse.Agop(model[2])
    outputs, other = model(x), model(y)
    with torch.no_grad():
        model(y)
    agop.add(outputs)
    assert torch.equal(agop.matrix, alone.matrix)
    agop.add(other)
    assert agop.samples == 14


def test_memory_does_not_grow():
    """What is kept and what lies about is the same after ten batches and after fifty, with nothing of a graph."""

    def held():
        gc.collect()
        return sum(t.numel() for t in gc.get_objects() if type(t) is torch.Tensor)

    model = mlp(16, 8, 3)
    agop, seen = mf.collapse.Agop(model[2]), []
    for n in range(50):
        agop.add(model(torch.randn(100, 5)))
        if n in (9, 49):
            seen.append(held())
    assert seen[0] == seen[1] and agop.samples == 5000


def test_batch_norm_in_training_is_told():
    x, message = torch.randn(8, 5), "a batch norm in training mode between the layer and the outputs"
    model = nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1))
    agop = mf.collapse.Agop(model[1])
    with pytest.warns(UserWarning, match=message):
        agop.add(model(x))
    agop.add(model(x))  # once
    behind, norm = mf.collapse.Agop(model[4]), mf.collapse.Agop(model.eval()[1])
    norm.add(model(x))
    wide = copy.deepcopy(model).double()
    assert_close(norm.matrix, oracle(wide[0](x.double()).detach(), wide[1:]))
    behind.add(model.train()(x))  # it lies before the layer
    other = nn.Sequential(nn.Conv1d(2, 3, 1), nn.InstanceNorm1d(3), nn.Flatten())
    mf.collapse.Agop(other[0]).add(other(torch.randn(4, 2, 6)))


def test_autocast():
    model, x = mlp(16, 16, 1), torch.randn(64, 5)
    exact, low = mf.collapse.Agop(model[2]), mf.collapse.Agop(model[2])
    exact.add(model(x))
    with torch.autocast("cpu", torch.bfloat16):
        low.add(model(x))
    assert_close(low.matrix, exact.matrix, 0.05)  # bfloat16 knows 1/256
    wide = mf.collapse.Agop(model[2])
    outputs = model(x)
    with torch.autocast("cpu", torch.bfloat16):  # a call in there of what was computed outside
        wide.add(outputs)
        assert torch.equal(wide.matrix, exact.matrix)


def test_distributed_data_parallel():
    if not torch.distributed.is_available():
        pytest.skip("this torch has no process groups")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model, x = mlp(4, 4, 2), torch.randn(6, 5)
        plain = mf.collapse.Agop(model[2])
        plain.add(model(x))
        ddp = nn.parallel.DistributedDataParallel(model)
        with mf.collapse.Agop(model[2]) as agop, mf.collapse.watch(model[2], {"a": 4}, every=1) as watch:
            for _ in range(2):
                outputs = ddp(x)
                agop.add(outputs)
                outputs.sum().backward()
        assert_close(agop.matrix, plain.matrix, 1e-6)
        assert len(watch.records) == 2
    finally:
        torch.distributed.destroy_process_group()


def test_compiled_model():
    model, x = mlp(4, 4, 2), torch.randn(6, 5)
    plain = mf.collapse.Agop(model[2])
    plain.add(model(x))
    plain.remove()
    for where in (model[2], Pass(model[2])):
        with mf.collapse.Agop(where) as agop, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            agop.add(torch.compile(nn.Sequential(*model[:2], where, *model[3:]), backend="aot_eager")(x))
        assert_close(agop.matrix, plain.matrix, 1e-6)
