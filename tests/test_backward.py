"""backward: several losses, all shared parameters, one problem."""

import copy

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import mmfast as mf

X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
        self.heads = nn.ModuleList([nn.Linear(3, n) for n in (1, 2, 1)])

    def losses(self, x=X):
        y = self.trunk(x)
        return [((i + 1) * head(y) - i).square().mean() for i, head in enumerate(self.heads)]


def model():
    torch.manual_seed(0)
    return Model()


def jacobian(losses, params):
    """Each loss's gradient as one vector in float64."""
    rows = []
    for loss in losses:
        grads = torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)
        rows.append(torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(grads, params, strict=True)]).double())
    return rows


def flat(params):
    return torch.cat([p.grad.flatten() for p in params]).double()


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("make", [mf.UPGrad, mf.PCGrad, mf.PCD, mf.MGDA, mf.Sum, lambda: mf.TrimmedMean(1)])
def test_the_shared_gradient_is_that_of_one_long_vector(make, norm):
    torch.manual_seed(0)
    one = make()
    two = copy.deepcopy(one)
    net = model()
    shared = list(net.trunk.parameters())
    for _ in range(2):
        net.zero_grad()
        losses = net.losses()
        wanted = mf.resolve(jacobian(losses, shared), two, preserve_norm=norm)
        heads = [
            torch.autograd.grad(loss, list(head.parameters()), retain_graph=True) for loss, head in zip(losses, net.heads, strict=True)
        ]
        stats = mf.backward(losses, one, preserve_norm=norm)
        torch.testing.assert_close(flat(shared), wanted, rtol=1e-4, atol=1e-6)
        for head, grads in zip(net.heads, heads, strict=True):
            for p, g in zip(head.parameters(), grads, strict=True):
                torch.testing.assert_close(p.grad, g)
        if stats is not None:
            assert stats.weights.shape == (3,) and torch.allclose(
                stats.norms, torch.stack([g.norm() for g in jacobian(net.losses(), shared)]), rtol=1e-4
            )


def test_sum_is_the_usual_backward_pass_and_gradients_accumulate():
    net, plain = model(), model()
    for part in X.split(4):
        mf.backward(net.losses(part), mf.Sum())
        sum(plain.losses(part)).backward()
    for p, q in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_losses_by_name_and_missing_ones():
    net = model()
    a, _, c = net.losses()
    wanted = mf.resolve([jacobian([x], list(net.trunk.parameters()))[0] for x in (a, c)], mf.UPGrad())
    stats = mf.backward({"image": a, "text": None, "sound": c}, mf.UPGrad())
    torch.testing.assert_close(flat(net.trunk.parameters()), wanted, rtol=1e-4, atol=1e-6)
    assert stats.weights[1] == 0 and "image" in str(stats) and net.heads[1].weight.grad is None


RULES_BY_PLACE = [
    lambda: mf.GradNorm(alpha=1.0),
    lambda: mf.NSGD(),
    lambda: mf.UPGrad(every=3),
    lambda: mf.UPGrad(pref=[0.2, 0.3, 0.5]),
    lambda: mf.PCGrad(order="fixed"),
    lambda: mf.MoCo(),
]


@pytest.mark.parametrize("collected", [False, True])
@pytest.mark.parametrize("make", RULES_BY_PLACE)
def test_a_dict_in_another_order(make, collected):
    """What a rule keeps of a loss, or prefers, stays that loss's."""
    names, found = ("image", "text", "sound"), []
    for turns in (False, True):
        net, rule, seen = model(), make(), []
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        for step in range(5):
            optimizer.zero_grad()
            losses = dict(zip(names, net.losses(), strict=True))
            order = names[step % 3 :] + names[: step % 3] if turns else names
            if collected:
                with mf.collect(order, rule, net.parameters()) as of:
                    for name in names:
                        with of(name):
                            losses[name].backward(retain_graph=True)
                stats = of.stats
            else:
                stats = mf.backward({name: losses[name] for name in order}, rule)
            optimizer.step()
            seen += [p.detach().clone() for p in net.parameters()] + ([] if stats is None else [stats.weights])
        found.append(seen)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_other_losses_than_those_that_a_rule_knows():
    net, rule, plain = model(), mf.GradNorm(alpha=1.0), mf.UPGrad()
    a, b, c = net.losses()
    for resolver in (rule, plain):
        mf.backward({"a": a, "b": b}, resolver, retain_graph=True)
    mf.backward({"c": c, "b": b}, plain, retain_graph=True)  # keeps nothing
    before = flat(net.parameters())
    message = r"losses has the names c, b, but GradNorm\(.*\) keeps what it saw of a, b; expected these, None for a loss that is missing; or call reset"
    with pytest.raises(ValueError, match=message):
        mf.backward({"c": c, "b": b}, rule, retain_graph=True)
    with pytest.raises(ValueError, match="but GradNorm"), mf.collect(["a", "b", "c"], rule, net.parameters()):
        pass
    assert torch.equal(flat(net.parameters()), before)
    rule.reset()
    mf.backward({"c": c, "b": b}, rule)


def test_tasks_on_samples_of_their_own():
    """Each loss sees its own half of the batch."""
    net = model()
    first, second = net.losses(X[:4])[0], net.losses(X[4:])[1]
    shared = list(net.trunk.parameters())
    wanted = mf.resolve(jacobian([first, second], shared), mf.CAGrad(0.5))
    mf.backward([first, second], mf.CAGrad(0.5))
    torch.testing.assert_close(flat(shared), wanted, rtol=1e-4, atol=1e-6)


def test_given_parameters_are_resolved_and_others_get_the_sum():
    net = model()
    last, first = net.trunk[2], net.trunk[0]
    losses = net.losses()
    wanted = mf.resolve(jacobian(losses, list(last.parameters())), mf.MGDA())
    plain = sum(jacobian(losses, list(first.parameters())))
    mf.backward(losses, mf.MGDA(), params=last.parameters())
    torch.testing.assert_close(flat(last.parameters()), wanted, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(flat(first.parameters()), plain, rtol=1e-4, atol=1e-6)


def test_a_parameter_that_one_loss_does_not_reach_counts_as_zero_there():
    a, b = torch.ones(3, requires_grad=True), torch.ones(2, requires_grad=True)
    losses = [(a * 2).sum() + b.sum(), -a.sum(), (b * b).sum()]
    wanted = mf.resolve(jacobian(losses, [a, b]), mf.UPGrad())
    mf.backward(losses, mf.UPGrad())
    torch.testing.assert_close(flat([a, b]), wanted, rtol=1e-4, atol=1e-6)


def test_the_graph_stays_where_it_is_asked_to():
    net = model()
    losses = net.losses()
    mf.backward(losses, mf.MGDA(), retain_graph=True)
    sum(losses).backward()
    losses = net.losses()
    mf.backward(losses, mf.MGDA())
    with pytest.raises(RuntimeError, match="second time"):
        sum(losses).backward()


def test_many_losses():
    """One loss a sample, up to the limit of a Gramian."""
    net = model()
    losses = list(net.trunk(torch.randn(256, 4)).square().mean(1).unbind(0))
    wanted = mf.resolve(jacobian(losses, list(net.trunk.parameters())), mf.MGDA())
    mf.backward(losses, mf.MGDA())
    assert (flat(net.trunk.parameters()) - wanted).norm() <= 1e-3 * max(
        g.norm() for g in jacobian(list(net.trunk(X).square().mean(1)), list(net.trunk.parameters()))
    )


def test_sparse_gradients():
    table = nn.Embedding(5, 3, sparse=True)
    rows = table(torch.tensor([0, 1]))
    dense = torch.autograd.grad(rows[0].sum() * 2, table.weight, retain_graph=True)[0].to_dense()
    other = torch.autograd.grad((rows * rows).sum(), table.weight, retain_graph=True)[0].to_dense()
    mf.backward([rows[0].sum() * 2, (rows * rows).sum()], mf.UPGrad())
    torch.testing.assert_close(table.weight.grad, mf.resolve([dense, other], mf.UPGrad()))


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda net, losses: mf.backward([], mf.MGDA()), ValueError, "holds 0 losses"),
        (lambda net, losses: mf.backward([None, None], mf.MGDA()), ValueError, "all None"),
        (lambda net, losses: mf.backward([losses[0], 1.0], mf.MGDA()), TypeError, r"losses\[1\] is a float"),
        (lambda net, losses: mf.backward([losses[0].detach()], mf.MGDA()), ValueError, r"losses\[0\] has shape \(\) and no graph"),
        (lambda net, losses: mf.backward(sum(losses), mf.MGDA()), TypeError, "losses is one number, expected a list or dict of the losses"),
        (lambda net, losses: mf.backward(mf.MGDA(), losses), TypeError, "losses is a MGDA, expected a list or dict"),
        (
            lambda net, losses: mf.backward(losses, mf.MGDA(), nn.Linear(2, 1)),
            TypeError,
            "params is a Linear, expected a list of parameters",
        ),
        (lambda net, losses: mf.backward(losses, mf.MGDA(), params=[3]), TypeError, r"params\[0\] is a int"),
        (lambda net, losses: mf.backward(losses, mf.MGDA(), params=[losses[0]]), ValueError, r"params\[0\] is no leaf"),
        (lambda net, losses: mf.backward(losses, mf.MGDA(), params=[net.heads[0].weight] * 2), ValueError, "holds a parameter twice"),
        (lambda net, losses: mf.backward(losses, mf.Krum(1)), ValueError, "Krum|n_byzantine"),
    ],
)
def test_errors_write_nothing(call, error, message):
    net = model()
    with pytest.raises(error, match=message):
        call(net, net.losses())
    assert all(p.grad is None for p in net.parameters())


def test_nothing_is_shared():
    one, two = nn.Linear(4, 1), nn.Linear(4, 1)
    assert mf.backward([one(X).sum(), two(X).sum()], mf.UPGrad()) is None
    torch.testing.assert_close(one.weight.grad, X.sum(0, keepdim=True))


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("make", [mf.UPGrad, mf.PCGrad, mf.PCD, mf.MGDA, mf.Sum])
def test_low_memory_gives_the_same(make, norm):
    torch.manual_seed(0)
    one = make()
    two = copy.deepcopy(one)
    net, other = model(), model()
    for part in X.split(4):  # states and random streams go on, gradients accumulate
        stats = mf.backward(net.losses(part), one, preserve_norm=norm, low_memory=True)
        wanted = mf.backward(other.losses(part), two, preserve_norm=norm)
        torch.testing.assert_close(stats.gram, wanted.gram, rtol=1e-5, atol=1e-8)
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)


def test_low_memory_leaves_heads_plain_and_missing_losses_out():
    net, other = model(), model()
    a, _, c = net.losses()
    stats = mf.backward({"image": a, "text": None, "sound": c}, mf.MGDA(), low_memory=True, retain_graph=True)
    mf.backward({"image": other.losses()[0], "text": None, "sound": other.losses()[2]}, mf.MGDA())
    assert stats.weights[1] == 0 and net.heads[1].weight.grad is None
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    (a + c).backward()  # the graph was kept
    with pytest.raises(TypeError, match="low_memory keeps a Gramian only, and TrimmedMean"):
        mf.backward(net.losses(), mf.TrimmedMean(1), low_memory=True)


class Largest(TorchDispatchMode):
    """How many numbers in memory of the parameters' sizes were alive at once."""

    def __init__(self, params):
        super().__init__()
        self.sizes, self.most = {p.nbytes for p in params}, 0
        self.alive = {p.untyped_storage()._cdata: None for p in params}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor) and (storage := x.untyped_storage()).nbytes() in self.sizes:
                self.alive.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes() // 4))
        self.alive = {key: x for key, x in self.alive.items() if x is None or not x[0].expired()}
        self.most = max(self.most, sum(x[1] for x in self.alive.values() if x is not None))
        return out


@pytest.mark.parametrize("low, copies", [(False, 9), (True, 2)])
def test_memory(low, copies):
    """K = 8: at most K + 1 gradients of the shared parameters, or two with low_memory."""
    torch.manual_seed(0)
    net = nn.Sequential(*[nn.Sequential(nn.Linear(29, 31), nn.Tanh(), nn.Linear(31, 29)) for _ in range(8)])
    losses = [(net(torch.randn(2, 29)) - i).square().mean() for i in range(8)]
    n = sum(p.numel() for p in net.parameters())
    with Largest(list(net.parameters())) as seen:
        mf.backward(losses, mf.MGDA(), low_memory=low)
    assert seen.most == copies * n


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("heads", ["own", "shared"])
def test_gradients_that_autograd_hands_out_twice(heads, low):
    """One tensor for both summands, or one number for all elements: each parameter has memory of its own, and accumulates and is clipped as after backward()."""

    def train(step):
        torch.manual_seed(0)
        trunk, a, b, c = (nn.Parameter(torch.randn(3, 2)) for _ in range(4))
        for _ in range(2):
            y = trunk.sin() + (a + b if heads == "shared" else 0)
            losses = [(y + (a + b)).square().sum(), y.cos().sum() + 2 * c.sum()]
            step(losses)
        params = [trunk, a, b, c]
        assert len({p.grad.data_ptr() for p in params}) == 4 and all(p.grad.is_contiguous() for p in params)
        nn.utils.clip_grad_norm_(params, 1.0)
        return flat(params)

    torch.testing.assert_close(
        train(lambda losses: mf.backward(losses, mf.Sum(), low_memory=low)), train(lambda losses: sum(losses).backward())
    )


def test_draws_go_to_the_parameters_of_the_last_run():
    """The order of the parameters that losses share is the graph's, not that of addresses: it decides the order of sums, and who gets which draw."""
    runs = []
    for _ in range(4):
        torch.manual_seed(0)
        net = nn.Sequential(*[nn.Sequential(nn.Linear(29, 31), nn.Tanh(), nn.Linear(31, 29)) for _ in range(8)])
        mf.backward([(net(torch.randn(2, 29)) - i).square().mean() for i in range(4)], mf.GradDrop())
        runs.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    assert all(torch.equal(run, runs[0]) for run in runs)


@pytest.mark.parametrize("low", [False, True])
def test_each_layer_is_a_problem_of_its_own(low):
    net = model()
    losses = net.losses()
    layers = [net.trunk[0], net.trunk[2]]
    wanted = [mf.resolve(jacobian(losses, list(layer.parameters())), mf.MGDA()) for layer in layers]
    heads = sum(jacobian(losses, list(net.heads.parameters())))
    unused = nn.Linear(1, 1)
    stats = mf.backward(losses, mf.MGDA(), params=[*(layer.parameters() for layer in layers), list(unused.parameters())], low_memory=low)
    for layer, gradient in zip(layers, wanted, strict=True):
        torch.testing.assert_close(flat(layer.parameters()), gradient, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(flat(net.heads.parameters()), heads)
    assert stats.weights.shape == (3, 3) and stats.missing[2].all() and "image" not in str(stats) and unused.weight.grad is None


@pytest.mark.parametrize(
    "params, rule, error, message",
    [
        (lambda t: [[t[0].weight], t[2].weight], mf.MGDA(), TypeError, r"params\[1\] is a Parameter, expected a list"),
        (lambda t: [[t[0].weight], [t[2].weight, 3]], mf.MGDA(), TypeError, r"params\[1\]\[1\] is a int"),
        (lambda t: [[t[0].weight], [t[0].weight]], mf.MGDA(), ValueError, "twice"),
        (lambda t: [[t[0].weight], [t[2].weight]], mf.PCD(), ValueError, "PCD.* keeps state of one problem, but params holds 2"),
    ],
)
def test_layers_that_do_not_fit(params, rule, error, message):
    net = model()
    with pytest.raises(error, match=message):
        mf.backward(net.losses(), rule, params=params(net.trunk))
