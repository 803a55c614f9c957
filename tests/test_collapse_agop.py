"""Agop against per-sample Jacobians in float64, in every place where a layer can stand."""

import copy

import pytest
import torch
from jacobians import Pass, assert_close, mlp, oracle
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import mmfast as mf
from mmfast.collapse.products import ROWS, Products


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


@pytest.mark.parametrize("look", [False, True])
def test_many_rows_and_changed_weights(look):
    """Beyond a block of rows, with a weight that changes in place: behind many rows, behind few, and back to an earlier one; whether or not the matrix was looked at."""
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
        if look:
            assert_close(agop.matrix, total / n)
    assert_close(agop.matrix, total / n)


def test_a_wide_output_is_multiplied_out():
    """No matrix of the output's width is made where the input is narrower by far."""
    model = mlp(4, 50, 1)
    with mf.collapse.Agop(model[2]) as agop:
        agop.add(model(torch.randn(3, 5)))
    assert agop._outputs.buffer is None and agop._inputs.buffer.shape[1] == 4


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


@pytest.mark.parametrize("power", [False, True])
def test_weights_that_are_computed(power):
    """By a parametrization, whose state is left alone, or put in place of the layer's for one call."""
    model, x = mlp(4, 3, 1), torch.randn(9, 5)
    if power:
        nn.utils.parametrizations.spectral_norm(model[2])
    with mf.collapse.Agop(model[2]) as agop:
        for factor in (1.0, 3.0):
            weights = {} if power else {"2.weight": model[2].weight * factor}
            twin = copy.deepcopy(model)
            twin(x)
            state = twin.state_dict()
            agop.add(torch.func.functional_call(model, weights, (x,)))
            assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    wide, expected = copy.deepcopy(model).double().eval(), 0
    h = wide[:2](x.double()).detach()
    for factor in (1.0, 1.0 if power else 3.0):
        expected = expected + oracle(h, lambda h: wide[3:](F.linear(h, factor * wide[2].weight, wide[2].bias))) / 2  # noqa: B023
    assert_close(agop.matrix, expected, 0.1 if power else 1e-5)  # the power iteration goes on at each call


def test_two_weights_in_one_pass():
    """Each call's gradient goes with its own weight; and the same outputs may be added again after a look."""
    model, x = mlp(4, 3, 2), torch.randn(9, 5)
    tripled = {"2.weight": model[2].weight * 3}
    apart, agop = mf.collapse.Agop(model[2]), mf.collapse.Agop(model[2])
    apart.add(model(x))
    apart.add(torch.func.functional_call(model, tripled, (x,)))
    outputs = model(x) + torch.func.functional_call(model, tripled, (x,))
    for _ in range(2):
        agop.add(outputs)
        assert_close(agop.matrix, 2 * apart.matrix, 1e-6)


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


class Doubled(nn.Linear):
    """Its output is not its input times its weight."""

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("kind", ["in place", "by keyword", "sequence", "layer norm", "subclass", "hook before", "float64", "checkpoint"])
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
    if kind == "subclass":
        where = model[2] = Doubled(6, 6)
    if kind == "hook before":
        where.register_forward_hook(lambda module, args, output: 2 * output)
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
    rows = (
        (torch.randn(2 * ROWS + 321, 300) + (scale < 1)) * torch.logspace(-3, 0, 300) * scale
    )  # also rows of one sign, whose rounding adds up
    expected = rows.double().T @ rows.double()
    found = []
    for size in (ROWS, len(rows), 1000, [100, len(rows) - 100]):
        products = Products()
        for part in rows.split(size):
            products.add(part)
        found.append(products.matrix())
        assert products.filled == 0
    assert all(torch.equal(found[0], other) for other in found)
    assert_close(found[0], expected, 2e-6)


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
    outputs.sum().backward(retain_graph=True)
    torch.optim.SGD(model[2].parameters(), 0.1).step()
    with pytest.raises(RuntimeError, match="weight was changed in place after the forward pass"):
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
