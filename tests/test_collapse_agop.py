"""Agop against per-sample Jacobians in float64, in every place where a layer can stand; and that training does not notice it."""

import copy
import gc
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import mmfast as mf
from mmfast.collapse.products import ROWS, Products


def oracle(layer_input, rest):
    """Mean of J'J by torch.func.jacrev in float64, sample by sample: `rest` takes the layer's input of one sample to its outputs; positions are summed over."""
    total = 0
    for h in layer_input.double():
        J = torch.func.jacrev(lambda h: rest(h.unsqueeze(0)).flatten())(h)
        J = J.reshape(-1, J.shape[-1])
        total = total + J.T @ J
    return (total / len(layer_input)).detach()


def assert_close(found, expected, tolerance=1e-5):
    """Relative to the diagonal, as the docstring promises."""
    scale = expected.diagonal().sqrt()
    assert found.dtype == torch.float64 and not found.requires_grad
    assert torch.equal(found, found.T)
    assert float(((found - expected).abs() / torch.outer(scale, scale)).max()) < tolerance


def mlp(inside, out, C):
    """Encoder, the layer, head."""
    return nn.Sequential(nn.Linear(5, inside), nn.Tanh(), nn.Linear(inside, out), nn.Tanh(), nn.Linear(out, C))


class Pass(nn.Module):
    """A layer whose forward is not torch's: the gradient is taken at its input."""

    def __init__(self, inside):
        super().__init__()
        self.inside = inside

    def forward(self, x):
        return self.inside(x)


@pytest.mark.parametrize("C", [1, 3])
@pytest.mark.parametrize("inside, out", [(7, 6), (6, 7), (4, 20)])  # the last is differentiated at its output and multiplied out
def test_linear_layer(inside, out, C):
    model, x = mlp(inside, out, C), torch.randn(30, 5)
    wide = copy.deepcopy(model).double()
    expected = oracle(wide[:2](x.double()).detach(), wide[2:])
    for where in (model[2], Pass(model[2])):
        seen = nn.Sequential(*model[:2], where, *model[3:])
        with mf.collapse.Agop(where) as agop:
            for part in x.split([11, 1, 18]):
                agop.add(seen(part))
        assert agop.samples == 30
        assert_close(agop.matrix, expected)
    assert repr(agop) == "Agop(Pass, probes=None, samples=30)"


def test_many_rows_and_changed_weights():
    """Beyond a block of rows, with a weight that changes: behind many rows, behind few, and back to an earlier one."""
    model = mlp(6, 5, 1)
    states = [copy.deepcopy(mlp(6, 5, 1).state_dict()) for _ in range(3)]
    total, n, agop = 0, 0, mf.collapse.Agop(model[2])
    for state, rows in ((0, ROWS + 100), (1, 40), (2, 3), (0, 5)):
        model.load_state_dict(states[state])
        x = torch.randn(rows, 5)
        agop.add(model(x))
        wide = copy.deepcopy(model).double()
        h = wide[:2](x.double()).detach().requires_grad_()
        (J,) = torch.autograd.grad(wide[2:](h).sum(), h)
        total, n = total + J.T @ J, n + rows
        assert_close(agop.matrix, (total / n).detach())


def test_wide_layer_at_full_size():
    """1,024 columns: more than one panel; products in float32, compared with float64."""
    model, x = nn.Sequential(nn.Linear(1024, 700), nn.ReLU(), nn.Linear(700, 1)), torch.randn(2500, 1024)
    with mf.collapse.Agop(model[0]) as agop:
        agop.add(model(x))
    W = model[0].weight.double()
    J = ((model[0](x) > 0).double() * model[2].weight.double()) @ W
    expected = (J.T @ J / 2500).detach()
    assert_close(agop.matrix, expected)
    assert float((agop.matrix - expected).norm() / expected.norm()) < 1e-6


@pytest.mark.parametrize(
    "conv, shape",
    [(nn.Conv1d(3, 4, 3, padding=1, stride=2), (3, 9)), (nn.Conv2d(2, 5, (3, 2), padding_mode="circular", padding=1), (2, 5, 4))],
)
def test_convolution(conv, shape):
    """Columns are those of a patch, as its weight's are; against the same as a linear layer on patches."""
    head, x = nn.Sequential(nn.Tanh(), nn.Flatten(), nn.LazyLinear(2)), torch.randn(12, *shape)
    head(conv(x))
    with mf.collapse.Agop(conv) as agop:
        agop.add(head(conv(x)))
    wide, y = copy.deepcopy(head).double(), copy.deepcopy(conv).double()(x.double()).detach()
    delta = torch.stack([torch.func.jacrev(lambda y: wide(y.unsqueeze(0)).flatten())(one) for one in y])
    rows = delta.movedim(2, -1).reshape(-1, delta.shape[2])
    W = conv.weight.detach().double().flatten(1)
    assert_close(agop.matrix, (W.T @ rows.T @ rows @ W / 12).detach())
    assert 0 < agop.distance() < 2**0.5


def test_tokens_and_several_calls():
    """A layer at each position, and twice in a pass: the sum over both."""
    layer, x = nn.Linear(4, 4), torch.randn(9, 3, 4)
    both = mf.collapse.Agop(layer)
    both.add(torch.tanh(layer(torch.tanh(layer(x)))).flatten(1)[:, :5])
    wide = copy.deepcopy(layer).double()
    end = lambda h: torch.tanh(wide(h)).flatten(1)[:, :5]
    first = lambda h: end(torch.tanh(wide(h)))
    expected = oracle(x, first) + oracle(torch.tanh(wide(x.double())).detach(), end)
    assert_close(both.matrix, expected)


@pytest.mark.parametrize("own", [False, True])
def test_what_goes_round_the_layer_does_not_count(own):
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.before, self.layer = nn.Linear(4, 4), Pass(nn.Linear(4, 4)) if own else nn.Linear(4, 4)

        def forward(self, x):
            h = self.before(x)
            return torch.tanh(h + self.layer(h)).sum(1)

    model, x = Residual(), torch.randn(8, 4)
    with mf.collapse.Agop(model.layer) as agop:
        agop.add(model(x))
    wide = copy.deepcopy(model).double()
    h = wide.before(x.double()).detach()
    delta = 1 - torch.tanh(h + wide.layer(h)).square()
    J = (delta @ (wide.layer.inside if own else wide.layer).weight).detach()
    assert_close(agop.matrix, J.T @ J / 8)


@pytest.mark.parametrize("kind", ["in place", "by keyword", "sequence", "layer norm", "float64", "checkpoint"])
def test_other_places(kind):
    x, tolerance = torch.randn(10, 5), 1e-5
    model = mlp(6, 6, 2)
    where = model[2]
    if kind == "in place":  # what comes next writes into the layer's output, and into what the layer gave back
        model[3] = nn.Hardtanh(-0.5, 0.5, inplace=True)
    if kind == "sequence":  # of modules as one layer
        where = model[2:4]
        model = nn.Sequential(*model[:2], where, model[4])
    if kind == "layer norm":
        where = model[3] = nn.LayerNorm(6)
    if kind == "float64":
        model, x, tolerance = model.double(), x.double(), 1e-12
    call = model
    if kind == "checkpoint":
        call = lambda x: model[4:](checkpoint(model[2:4], model[:2](x), use_reentrant=False))
    if kind == "by keyword":
        where, inner = Pass(model[2]), model[3:]
        call = lambda x: inner(where(x=model[:2](x)))
    with mf.collapse.Agop(where) as agop:
        outputs = call(x)
        agop.add(outputs)
    outputs.sum().backward()  # the graph is still there
    wide = copy.deepcopy(model).double()
    begin = 3 if kind == "layer norm" else 2
    assert_close(agop.matrix, oracle(wide[:begin](x.double()).detach(), wide[begin:]), tolerance)


@pytest.mark.parametrize("shape", [(6,), (6, 1), (6, 2, 3)])
def test_shapes_of_outputs(shape):
    size = torch.Size(shape[1:]).numel()
    model, x = mlp(4, 4, size), torch.randn(6, 5)
    wide = copy.deepcopy(model).double()
    with mf.collapse.Agop(model[2]) as agop:
        agop.add(model(x).reshape(shape))
    assert_close(agop.matrix, oracle(wide[:2](x.double()).detach(), wide[2:]))


def test_probes_are_unbiased():
    """The mean of 400 draws is within 4.5 standard errors of the exact matrix, element by element, and would not be with signs that are shared among samples or outputs."""
    model, x = mlp(4, 3, 5), torch.randn(6, 5)
    exact, drawn = mf.collapse.Agop(model[2]), mf.collapse.Agop(model[2], probes=1)
    outputs = model(x)
    exact.add(outputs)
    found = []
    for _ in range(400):
        before = drawn.matrix * drawn.samples if drawn.samples else 0
        drawn.add(outputs)
        found.append((drawn.matrix * drawn.samples - before) / len(x))
    found = torch.stack(found)
    error = found.std(0) / 400**0.5
    assert float(((found.mean(0) - exact.matrix).abs() / error).max()) < 4.5
    assert float(error.max() / exact.matrix.max()) < 0.05  # a bias of a fifth would be seen
    assert drawn.samples == 2400


def test_probes_of_one_output_are_exact_and_repeat():
    model, x = mlp(4, 3, 1), torch.randn(6, 5)
    exact, drawn = mf.collapse.Agop(model[2]), mf.collapse.Agop(model[2], probes=2)
    for agop in (exact, drawn):
        agop.add(model(x))
    assert_close(drawn.matrix, exact.matrix, 1e-6)
    head = nn.Linear(1, 3)
    drawn.reset()
    drawn.add(head(model(x)))
    first = drawn.matrix
    state = torch.get_rng_state()
    drawn.reset()
    drawn.add(head(model(x)))
    assert torch.equal(drawn.matrix, first)
    assert torch.equal(torch.get_rng_state(), state)


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
        assert not where._forward_hooks and not where._forward_pre_hooks
        with pytest.raises(ValueError, match="outputs does not come from a call of"):
            agop.add(model(x))
    with mf.collapse.Agop(model[2]) as agop:
        twin = copy.deepcopy(model)  # has the hook, and is another model
        with pytest.raises(ValueError, match="does not come from a call of Linear"):
            agop.add(twin(x))
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


def test_distance():
    """Of M = W'W it is none, of an orthogonal one the root of two; for a single linear layer M is W'W."""
    layer = nn.Linear(3, 2, bias=False)
    with mf.collapse.Agop(layer) as agop:
        agop.add(layer(torch.randn(4, 3)))
        agop.add(3 * layer(torch.randn(2, 3)))
    W = layer.weight.detach().double()
    torch.testing.assert_close(agop.matrix, (4 + 9 * 2) / 6 * W.T @ W)
    assert agop.distance() < 1e-7
    layer.weight.data[:] = torch.linalg.svd(layer.weight.data)[2][2]
    assert float(agop.distance()) == pytest.approx(2**0.5, abs=1e-6)
    layer.weight.data[:] = 0
    assert agop.distance().isnan()


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e25])
def test_products(scale):
    """Any split gives the same bits; error against float64 relative to the diagonal; numbers whose squares float32 does not have."""
    rows = torch.randn(2 * ROWS + 321, 300) * torch.logspace(-3, 0, 300) * scale
    expected = rows.double().T @ rows.double()
    found = []
    for size in (ROWS, len(rows), 1000, 7 * 97):
        products = Products()
        for part in rows.split(size):
            products.add(part)
        found.append(products.matrix())
        assert products.filled == 0
    assert all(torch.equal(found[0], other) for other in found)
    assert_close(found[0], expected, 1e-6)


def test_gradients_that_are_not_finite():
    model, x = mlp(4, 4, 1), torch.randn(6, 5)
    x[3] = torch.nan
    with mf.collapse.Agop(model[2]) as agop:
        agop.add(model(x))
    assert agop.matrix.isnan().all() and agop.distance().isnan()


def test_errors():
    model, x = mlp(4, 4, 2), torch.randn(6, 5)
    for layer in (3, [nn.Linear(2, 2)]):
        with pytest.raises(TypeError, match=f"layer is a {type(layer).__name__}, expected an nn.Module"):
            mf.collapse.Agop(layer)
    with pytest.raises(TypeError, match="a convolution in 2 groups"):
        mf.collapse.Agop(nn.Conv1d(4, 4, 1, groups=2))
    with pytest.raises(ValueError, match="probes is 0, expected None or a positive number"):
        mf.collapse.Agop(model[2], probes=0)
    agop = mf.collapse.Agop(model[2])
    with pytest.raises(RuntimeError, match="no sample was added yet"):
        agop.matrix  # noqa: B018
    for outputs, error, message in (
        (None, TypeError, "outputs is a NoneType"),
        (torch.ones(3).long(), TypeError, "outputs is torch.int64"),
        (model(x).sum(), ValueError, r"outputs is one number, expected \[B, C\]"),
        (x, ValueError, "outputs has no graph"),
        (model(x).detach(), ValueError, "outputs has no graph"),
        (model[:2](x), ValueError, "does not come from a call of Linear that could be seen"),
    ):
        with pytest.raises(error, match=message):
            agop.add(outputs)
    outputs = model(x)
    outputs.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        agop.add(outputs)
    assert agop.samples == 0
    with mf.collapse.Agop(where := Pass(nn.Identity())), pytest.raises(TypeError, match="called with a list first, expected a tensor"):
        where([x])
    with mf.collapse.Agop(model[1]) as agop:
        agop.add(model(x))
    with pytest.raises(TypeError, match=r"layer is a Tanh, which has no weight \[out, 4\]"):
        agop.distance()
