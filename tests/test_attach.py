"""attach: a block in a model as it stands, equal to one that is built in."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

import mmfast as mf

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


class Model(nn.Module):
    """An encoder and three heads, called as somebody else wrote it."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 5), nn.Tanh())
        self.heads = nn.ModuleList([nn.Linear(5, n) for n in (1, 2, 3)])

    def forward(self, x, present=(True, True, True)):
        y = self.encoder(x)
        return [head(y) if there else None for head, there in zip(self.heads, present, strict=True)]


def model(seed=0):
    torch.manual_seed(seed)
    return Model()


def loss(outputs):
    return sum((i + 1) * (out - i).square().sum() for i, out in enumerate(outputs) if out is not None)


def grads(module):
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def built_in(rule, present=(True, True, True), **options):
    """The gradients of the same model with a fork written into it."""
    same = model()
    per, norm = options.get("per", "batch"), options.get("preserve_norm", True)
    aliases = mf.fork(same.encoder(X), 3, rule, per=per, preserve_norm=norm)
    loss([head(a) if there else None for head, a, there in zip(same.heads, aliases, present, strict=True)]).backward()
    return grads(same)


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], msg=name)


@pytest.mark.parametrize("options", [{}, {"per": "sample"}, {"per": "batch_sum"}, {"preserve_norm": False}])
@pytest.mark.parametrize("make", [mf.UPGrad, mf.PCGrad, mf.PCD, lambda: mf.GradDrop(0.1)])
def test_it_is_a_block_that_is_built_in(make, options):
    if options.get("per") == "batch_sum" and not isinstance(make(), mf.UPGrad | mf.PCGrad | mf.PCD):
        pytest.skip("GradDrop has no batch sums")
    torch.manual_seed(1)
    one = make()
    two = copy.deepcopy(one)
    for _ in range(2):  # a rule's state goes on
        mine = model()
        with mf.attach(mine.heads, one, **options):
            loss(mine(X)).backward()
        assert_same(grads(mine), built_in(two, **options))


@pytest.mark.parametrize("present", [(True, False, True), (False, True, False)])
def test_a_branch_that_is_not_called_is_missing(present):
    mine = model()
    with mf.attach(mine.heads, mf.UPGrad()) as block:
        loss(mine(X, present)).backward()
        if sum(present) > 1:
            assert (block.stats().weights != 0).tolist() == list(present)
    assert_same(grads(mine), built_in(mf.UPGrad(), present))


def test_removing_restores_the_model_and_its_checkpoints():
    mine = model()
    keys, hooks = list(mine.state_dict()), [len(h._forward_pre_hooks) + len(h._forward_hooks) for h in mine.heads]
    block = mf.attach(mine.heads, mf.PCD(), local=[1.0, 2.0, 0.5])
    assert list(mine.state_dict()) == keys
    outputs = mine(X)
    loss(outputs).backward()
    block.remove()
    assert [len(h._forward_pre_hooks) + len(h._forward_hooks) for h in mine.heads] == hooks
    mine.zero_grad()
    loss(mine(X)).backward()
    plain = model()
    loss(plain(X)).backward()
    assert_same(grads(mine), grads(plain))
    assert all(torch.equal(a, b) for a, b in zip(outputs, plain(X), strict=True))
    state = block.state_dict()
    again = mf.attach(model().heads, mf.PCD(), local=[1.0, 2.0, 0.5])
    again.load_state_dict(state)
    assert torch.equal(again.resolver.state, block.resolver.state)


def test_the_local_step():
    mine, same = model(), model()
    with mf.attach(mine.heads, mf.MGDA(), local=[1.0, 2.0, 0.5]):
        loss(mine(X)).backward()
    block = mf.ImpartialityBlock(same.heads, mf.MGDA(), local=[1.0, 2.0, 0.5])
    loss(block(same.encoder(X))).backward()
    assert_same(grads(mine), grads(same))


class Pyramid(nn.Module):
    """Heads that look at two tensors, handed over in a dict, a tuple and by keyword; the last has a third input of its own."""

    def __init__(self):
        super().__init__()
        self.low, self.high, self.own = nn.Linear(4, 3), nn.Linear(4, 5), nn.Linear(4, 2)
        self.a, self.b, self.c = nn.Linear(8, 1), nn.Linear(8, 1), nn.Linear(10, 1)
        self.heads = [Takes(self.a), Takes(self.b), Takes(self.c)]

    def forward(self, x):
        low, high, own = self.low(x), self.high(x), self.own(x)
        return [self.heads[0]({"low": low, "high": high}), self.heads[1]((low, [high])), self.heads[2](low, high=high, own=own)]


class Takes(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, features, high=None, own=None):
        parts = (
            list(features.values())
            if isinstance(features, dict)
            else [features[0], features[1][0]]
            if isinstance(features, tuple)
            else [features, high]
        )
        return self.layer(torch.cat([*parts, *([own] if own is not None else [])], 1))


def test_several_shared_inputs_are_one_problem_and_private_ones_pass():
    torch.manual_seed(0)
    mine = Pyramid()
    same = copy.deepcopy(mine)
    with mf.attach(mine.heads, mf.UPGrad()):
        loss(mine(X)).backward()
    low, high, own = same.low(X), same.high(X), same.own(X)
    branches = mf.fork([low, high], 3, mf.UPGrad())
    heads = zip((same.a, same.b), branches, strict=False)
    outputs = [head(torch.cat(both, 1)) for head, both in heads] + [same.c(torch.cat([*branches[2], own], 1))]
    loss(outputs).backward()
    assert_same({k: v for k, v in grads(mine).items() if "heads" not in k}, grads(same))


def test_branches_called_more_than_once():
    """With one tensor, both calls are one branch; with another, that is a block of its own."""
    mine, same = model(), model()
    with mf.attach(mine.heads, mf.UPGrad()):
        first, second = mine.encoder(X), mine.encoder(X + 1)
        (loss([h(first) for h in mine.heads]) + loss([h(first) for h in mine.heads[:2]]) + loss([h(second) for h in mine.heads])).backward()
    rule, ys = mf.UPGrad(), (same.encoder(X), same.encoder(X + 1))
    a, b = (mf.fork(y, 3, rule) for y in ys)
    (
        loss([h(y) for h, y in zip(same.heads, a, strict=True)])
        + loss([h(y) for h, y in zip(same.heads[:2], a[:2], strict=True)])
        + loss([h(y) for h, y in zip(same.heads, b, strict=True)])
    ).backward()
    assert_same(grads(mine), grads(same))


VIEWS = {
    "first token": lambda y: y.unflatten(1, (1, 5))[:, 0],
    "reshaped": lambda y: y.reshape(2, 3, 5),
    "transposed": lambda y: y.t().unsqueeze(0).squeeze(0).transpose(0, 1),
    "piece": lambda y: y.split(5, 1)[0],
}


@pytest.mark.parametrize("show", VIEWS)
def test_each_branch_with_a_view_of_its_own_that_is_the_same(show):
    """As where a loop over decoders writes decoder(z.reshape(...)): no two of the tensor objects are one."""
    mine, same = model(), model()
    with mf.attach(mine.heads, mf.UPGrad()):
        y = mine.encoder(X)
        loss([head(VIEWS[show](y)) for head in mine.heads]).backward()
    view = VIEWS[show](same.encoder(X))
    loss([h(a) for h, a in zip(same.heads, mf.fork(view, 3, mf.UPGrad()), strict=True)]).backward()
    assert_same(grads(mine), grads(same))


def test_views_of_several_tensors_in_turns():
    """Decoders outside, tensors inside: the second decoder still finds what the first was called with, though nobody holds those views."""
    mine, same, rule = model(), model(), mf.UPGrad()
    with mf.attach(mine.heads, mf.UPGrad()):
        ys = [mine.encoder(X), mine.encoder(X + 1)]
        loss([head(y.view(6, 5)) + 0 * i for head in mine.heads for i, y in enumerate(ys)]).backward()
    forks = [mf.fork(same.encoder(x).view(6, 5), 3, rule) for x in (X, X + 1)]
    loss([head(forks[i][h]) for h, head in enumerate(same.heads) for i in range(2)]).backward()
    assert_same(grads(mine), grads(same))


def test_views_that_are_not_the_same():
    """Another part, the aliases of a block before it, a tensor changed in between, one that has a hook: each keeps its own way back."""
    inner, y = nn.ModuleList([nn.Linear(2, 1), nn.Linear(2, 1)]), torch.randn(3, 4, requires_grad=True)
    with mf.attach(inner, mf.UPGrad()) as block:
        a, b = mf.fork(y * 1, 2, mf.Mean(), preserve_norm=False)
        calls = [
            lambda: (y[:, :2], y[:, 2:]),
            lambda: (a[:, :2], b[:, :2]),
            lambda: changed_between(y * 1),
            lambda: hooked(y * 1),
        ]
        for i, call in enumerate(calls):
            block._open.clear()
            with torch.no_grad():
                takers = len(block._met)
            for head, x in zip(inner, call(), strict=True):
                head(x)
            assert [set(s) for s in list(block._met)[takers:]] == [{0}, {1}], i


def changed_between(y):
    yield y[:, :2]
    y.mul_(2)
    yield y[:, :2]


def hooked(y):
    one, two = y[:, :2], y[:, :2]
    two.register_hook(lambda g: g * 2)
    return one, two


def test_branches_that_share_no_input_are_said():
    mine = model()
    with mf.attach(mine.heads, mf.UPGrad()):
        y = mine.encoder(X)
        with pytest.warns(
            UserWarning, match="share no input: each was called with a tensor object of its own.*hand all of them the same tensor"
        ):
            loss([head(y.clone()) for head in mine.heads]).backward()
        loss([head(mine.encoder(X).clone()) for head in mine.heads]).backward()  # said once


def test_a_first_layer_that_works_in_place():
    heads = [nn.Sequential(nn.ReLU(inplace=True), nn.Linear(5, 1)), nn.Linear(5, 1)]
    encoder = nn.Linear(4, 5)
    with mf.attach(heads, mf.MGDA()):
        y = encoder(X)
        sum(head(y).sum() for head in heads).backward()
    alone = copy.deepcopy(heads)
    (a, b) = mf.fork(encoder(X).detach().requires_grad_(), 2, mf.MGDA())
    assert torch.equal(alone[1](b), heads[1](y)) and torch.equal(alone[0](a.clone()), alone[0](y.detach().clone()))
    changes, y = Changes(), encoder(X)
    with mf.attach([changes, nn.Identity()], mf.MGDA()), pytest.raises(RuntimeError, match="mmfast_attach"):
        changes(y)


class Changes(nn.Module):
    """Writes into its input, and no layer says so."""

    def forward(self, x):
        return x.mul_(2)


def test_nothing_happens_where_no_gradient_is_recorded():
    mine = model()
    with mf.attach(mine.heads, mf.UPGrad()) as block:
        with torch.no_grad():
            assert all(torch.equal(a, b) for a, b in zip(mine(X), model()(X), strict=True))
        mine.encoder.requires_grad_(False)
        loss(mine(X)).backward()
        with pytest.raises(RuntimeError, match="asked for no gradient"):
            block.stats()


class Canary:
    """Lives as long as the graph that it is hung into."""


def test_no_graph_is_kept():
    """Neither after a backward pass, nor after forward passes that are never followed by one."""
    mine = model()
    with mf.attach(mine.heads, mf.UPGrad()) as block:
        for backward in (True, False, False):
            outputs = mine(X, (True, False, True))
            canary = Canary()
            outputs[0].grad_fn.metadata["canary"], ref = canary, weakref.ref(canary)
            del canary
            if backward:
                loss(outputs).backward()
            del outputs
            if not backward:
                mine(X, (True, False, True))
            gc.collect()
            assert len(block._open) <= 1
            if backward:
                assert not block._open and ref() is None


def test_refusals():
    mine = model()
    with mf.attach(mine.heads, mf.MGDA()):
        with pytest.raises(RuntimeError, match="attached branches can't be called inside a transformation of torch.func"):
            torch.func.grad(lambda x: loss(mine(x)))(X)
        with pytest.raises(RuntimeError, match="no gradient of its own"):
            torch.autograd.grad(loss(mine(X)), list(mine.encoder.parameters()), create_graph=True)
    for branches, error, message in (
        (nn.Linear(1, 1), TypeError, "branches is a Linear"),
        ([], ValueError, "branches has 0 modules"),
        ([mine.heads[0], 3], TypeError, r"branches\[1\] is a int"),
        ([mine.heads[0]] * 2, ValueError, "holds a module twice"),
    ):
        with pytest.raises(error, match=message):
            mf.attach(branches, mf.MGDA())
    with pytest.raises(ValueError, match="local has 1 numbers"):
        mf.attach(mine.heads, mf.MGDA(), local=[1.0])


def test_one_backward_call_for_each_loss_is_said():
    mine = model()
    with mf.attach(mine.heads, mf.UPGrad()):
        one, two, _ = mine(X)
        one.sum().backward(retain_graph=True)
        with pytest.warns(UserWarning, match="a second backward call"):
            two.square().sum().backward()


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:torch", "ignore::FutureWarning:torch", "ignore:.*should not be instantiated", "ignore:The .grad attribute"
)
@pytest.mark.parametrize("what", ["branches", "model"])
def test_compiled(what):
    mine = model()
    heads = [torch.compile(head, backend="aot_eager") for head in mine.heads] if what == "branches" else list(mine.heads)
    with mf.attach(heads, mf.UPGrad()):
        if what == "branches":
            y = mine.encoder(X)
            outputs = [head(y) for head in heads]
        else:
            outputs = torch.compile(mine, backend="aot_eager")(X)
        loss(outputs).backward()
    assert_same({k.replace("_orig_mod.", ""): v for k, v in grads(mine).items()}, built_in(mf.UPGrad()))


def test_gradient_accumulation():
    mine, same = model(), model()
    with mf.attach(mine.heads, mf.UPGrad()):
        for part in X.split(3):
            loss(mine(part)).backward()
    rule = mf.UPGrad()
    for part in X.split(3):
        loss([h(y) for h, y in zip(same.heads, mf.fork(same.encoder(part), 3, rule), strict=True)]).backward()
    assert_same(grads(mine), grads(same))


def test_branches_that_are_attached_already():
    """As a cell of a notebook does that is run twice: the last one counts, and a warning says so."""
    net = model()
    mf.attach(list(net.heads), mf.Sum())
    with pytest.warns(UserWarning, match="attached already: b; from now on .* resolves nothing there; call remove"):
        mf.attach({"a": net.encoder, "b": net.heads[0]}, mf.Sum()).remove()
    with pytest.warns(UserWarning, match="attached already: 0, 1, 2;"):
        mf.attach(list(net.heads), mf.IMTLG())
    with pytest.warns(UserWarning, match="share no input"):  # the earlier one sees an alias for each
        loss(net(X)).backward()
    assert all(torch.equal(g, built_in(mf.IMTLG())[name]) for name, g in grads(net).items())
