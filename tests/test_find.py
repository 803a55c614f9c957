"""find_blocks: where gradients of different terms meet, in graphs whose answer is known."""

import time

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import mmfast as mf
from mmfast.blocks import notices

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


class Model(nn.Module):
    """A trunk in two stages; two decoders on the second, and one that a skip connection feeds from the first."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.ModuleList([nn.Linear(4, 5), nn.Linear(5, 3)])
        self.decoders = nn.ModuleDict(
            {"image": nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1)), "text": nn.Linear(3, 1), "sound": nn.Linear(5, 1)}
        )

    def forward(self, x, wrap=lambda f, x: f(x)):
        first = torch.tanh(wrap(self.trunk[0], x))
        latent = wrap(self.trunk[1], first)
        return (
            {"image": self.decoders["image"](latent), "text": self.decoders["text"](latent), "sound": self.decoders["sound"](first)},
            first,
            latent,
        )


def model():
    torch.manual_seed(0)
    return Model()


def terms(outputs):
    return {name: (out - i).square().sum() for i, (name, out) in enumerate(outputs.items())}


@pytest.mark.parametrize("wrap", [lambda f, x: f(x), lambda f, x: checkpoint(f, x, use_reentrant=False)])
def test_a_latent_and_a_skip_connection(wrap):
    net = model()
    outputs, first, latent = net(X, wrap)
    losses = terms(outputs)
    found = mf.find_blocks(losses, net)
    assert [(b.producer, b.shape, b.terms) for b in found] == [
        ("trunk.1 (Addmm)", (6, 3), ("image", "text")),
        ("trunk.0 (Tanh)", (6, 5), ("image", "text", "sound")),
    ]
    assert found[0].branches == ("decoders.image", "decoders.text")
    assert found[0].attach_line() == "mf.attach([model.decoders.image, model.decoders.text], mf.UPGrad())"
    for block, y in zip(found, (latent, first), strict=True):
        grads = [torch.autograd.grad(losses[name], y, retain_graph=True)[0] for name in block.terms]
        torch.testing.assert_close(block.norms, torch.stack([g.norm() for g in grads]).double())
        flat = torch.stack([g.flatten() / g.norm() for g in grads]).double()
        torch.testing.assert_close(block.cosines, flat @ flat.T, rtol=1e-5, atol=1e-6)
    assert all(p.grad is None for p in net.parameters())
    sum(losses.values()).backward()  # the graph is still there
    assert all(p.grad is not None for p in net.parameters())


def test_the_line_that_it_suggests_puts_a_block_there():
    plain, attached = model(), model()
    found = mf.find_blocks(terms(plain(X)[0]), plain)
    handle = eval(found[0].attach_line("attached"), {"mf": mf, "attached": attached})
    sum(terms(attached(X)[0]).values()).backward()
    assert handle.stats().weights.shape == (2,)
    sum(terms(plain(X)[0]).values()).backward()
    assert not torch.allclose(plain.trunk[1].weight.grad, attached.trunk[1].weight.grad)


class Layered(nn.Module):
    """Keeps its layers in a list, which nobody calls."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3, 2), nn.Linear(2, 1)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def test_it_suggests_modules_that_are_called():
    net = nn.ModuleDict({"encoder": nn.Linear(4, 3), "decoders": nn.ModuleDict({"image": Layered(), "text": Layered()})})
    y = net["encoder"](X)
    (block,) = mf.find_blocks({name: decoder(y).square().sum() for name, decoder in net["decoders"].items()}, net)
    assert block.branches == ("decoders.image", "decoders.text")
    with pytest.raises(TypeError, match=r"branches\[0\] is a ModuleList, which has no forward and is never called"):
        mf.attach([net["decoders"]["image"].layers, net["decoders"]["text"]], mf.UPGrad())


def test_shared_weights_and_losses_in_a_list():
    head = nn.Linear(4, 1)
    found = mf.find_blocks([head(X).sum(), head(X + 1).square().sum()], head)
    assert {(b.producer, b.shape, b.terms) for b in found} == {
        ("parameter weight", (1, 4), ("0", "1")),
        ("parameter bias", (1,), ("0", "1")),
    }
    assert all(b.attach_line() is None for b in found)


def test_two_tensors_of_one_node_and_views_of_one_tensor():
    encoder = nn.Linear(4, 6)
    mean, spread = encoder(X).chunk(2, 1)
    z = mean + spread.exp()
    found = mf.find_blocks({"a": z.sum(), "b": (mean * 2).square().sum(), "c": spread.square().sum()})
    # the mean, the spread, and what both are parts of
    assert sorted((b.terms, b.shape) for b in found) == [(("a", "b"), (6, 3)), (("a", "b", "c"), (6, 6)), (("a", "c"), (6, 3))]
    y = encoder(X)
    (block,) = mf.find_blocks([y.flatten().sum(), y.view(-1).square().sum(), y[:, :2].sum()])
    assert block.shape == (6, 6) and block.terms == ("0", "1", "2")


def test_where_nothing_meets():
    one, two = nn.Linear(4, 1), nn.Linear(4, 1)
    found = mf.find_blocks([one(X).sum(), two(X).sum()])
    assert len(found) == 0 and "no tensor" in str(found)
    y = nn.Linear(4, 2)(X)
    assert len(mf.find_blocks([(y.sum() + y.square().sum())])) == 0  # one term alone


def test_gradients_of_zero_have_no_direction():
    y = nn.Linear(4, 2)(X)
    (block,) = mf.find_blocks({"a": y.sum(), "b": (y * 0).sum()})
    assert block.norms[1] == 0 and block.cosines[0, 1].isnan() and abs(block.cosines[0, 0] - 1) < 1e-6


def blocks_of(kind, rule):
    torch.manual_seed(0)
    encoder, heads = nn.Linear(4, 3), [nn.Linear(3, 1), nn.Linear(3, 2)]
    if kind == "block":
        block = mf.ImpartialityBlock(heads, rule)
        return encoder, lambda y: block(y), block
    if kind == "heads":
        block = mf.LinearHeads(3, [1, 2], rule)
        return encoder, lambda y: block(y), block
    if kind == "attach":
        return encoder, lambda y: [head(y) for head in heads], mf.attach(heads, rule)
    return encoder, lambda y: [head(a[0]) for head, a in zip(heads, mf.fork([y, y * 1], 2, rule), strict=True)], None


@pytest.mark.parametrize("kind", ["block", "heads", "attach", "several"])
def test_blocks_on_the_way_are_looked_through(kind):
    """Plain gradients, no warning; state, stream and record stay as they are."""
    rule = mf.Compose(mf.PCD(), mf.PCGrad())
    encoder, run, block = blocks_of(kind, rule)
    sum(out.square().sum() for out in run(encoder(X))).backward()
    kept = {name: value.clone() for name, value in rule.state_dict().items()}
    recorded = block.stats().weights if block is not None else None
    first = torch.tanh(X @ torch.ones(4, 4)).requires_grad_()
    y = encoder(first * 1)
    outputs = run(y)
    losses = [out.square().sum() for out in outputs] + [first.sum()]
    found = mf.find_blocks(losses)
    at_y = next(b for b in found if b.shape == (6, 3))
    assert at_y.terms == ("0", "1")
    with notices.taking_apart():
        grads = [torch.autograd.grad(loss, y, retain_graph=True)[0] for loss in losses[:2]]
    torch.testing.assert_close(at_y.norms, torch.stack([g.norm() for g in grads]).double())
    assert next(b for b in found if b.producer == "a leaf tensor").terms == ("0", "1", "2")
    assert all(torch.equal(kept[name], value) for name, value in rule.state_dict().items())
    assert block is None or torch.equal(block.stats().weights, recorded)


def test_time_is_linear_in_the_graph():
    times = {2_000: [], 20_000: []}
    for length in (2_000, 20_000) * 3:
        y = nn.Linear(4, 3)(X)
        a = b = y
        for _ in range(length // 2):
            a, b = a + 1, b * 1.0001
        losses = [a.sum(), b.sum()]
        start = time.process_time()
        (block,) = mf.find_blocks(losses)
        times[length].append(time.process_time() - start)
        assert block.shape == (6, 3)
    short, long = map(min, times.values())  # other work on the machine slows both, at times
    assert long < 3 and long < 40 * short  # ten times the nodes; 10,000 of them are to take less than a second


def test_the_table_and_the_drawing(tmp_path):
    pytest.importorskip("matplotlib")
    net = model()
    found = mf.find_blocks(terms(net(X)[0]), net)
    text = str(found)
    assert "trunk.1 (Addmm)  [6, 3]" in text and "cosines" in text and "mf.attach([model.decoders.image, model.decoders.text]" in text
    assert str(found[0]) in text and len(found[:1]) == 1
    found.plot(tmp_path / "found.png")
    assert (tmp_path / "found.png").stat().st_size > 5000
    mf.find_blocks([X.clone().requires_grad_().sum()]).plot(tmp_path / "none.png")


@pytest.mark.parametrize(
    "losses, error, message",
    [
        ({}, ValueError, "losses is empty"),
        ({"a": 1.0}, TypeError, r"losses\[a\] is a float, expected a tensor"),
        (
            [torch.ones(2, requires_grad=True) * 2],
            ValueError,
            r"losses\[0\] has shape \(2,\) and a graph, expected one number with a graph",
        ),
        ([torch.ones(())], ValueError, r"losses\[0\] has shape \(\) and no graph"),
    ],
)
def test_errors(losses, error, message):
    with pytest.raises(error, match=message):
        mf.find_blocks(losses)
