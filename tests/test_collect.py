"""collect: one backward call for each loss, the right gradient all the same."""

import copy

import pytest
import torch
from test_backward import X, flat, jacobian, model
from torch import nn

import mmfast as mf

NAMES = ["image", "text", "sound"]


def wanted(losses, net, rule, **kwargs):
    """The gradient at the trunk in float64, and the heads' plain ones."""
    d = mf.resolve(jacobian(losses, list(net.trunk.parameters())), rule, **kwargs)
    return d, sum(jacobian(losses, list(net.heads.parameters())))


def assert_right(net, d, heads):
    torch.testing.assert_close(flat(net.trunk.parameters()), d, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(flat(net.heads.parameters()), heads, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("make", [mf.UPGrad, mf.PCGrad, mf.PCD, mf.MGDA, mf.Sum, lambda: mf.TrimmedMean(1)])
def test_one_backward_call_for_each_loss(make, norm):
    torch.manual_seed(0)
    one = make()
    two = copy.deepcopy(one)
    net = model()
    for _ in range(2):
        net.zero_grad()
        d, heads = wanted(net.losses(), net, two, preserve_norm=norm)
        with mf.collect(NAMES, one, net.parameters(), preserve_norm=norm) as collected:
            for i, name in enumerate(NAMES):
                with collected(name):
                    net.losses()[i].backward()  # a forward pass of its own
        assert_right(net, d, heads)
        assert (collected.stats is None) == isinstance(one, mf.TrimmedMean)


def test_disjoint_halves_of_a_batch_and_micro_batches():
    net = model()
    d, heads = wanted([2 * net.losses(X[:4])[0], 2 * net.losses(X[4:])[1]], net, mf.UPGrad())
    with mf.collect(2, mf.UPGrad(), net.parameters()) as collected:
        for parts in zip(X[:4].split(2), X[4:].split(2), strict=True):
            for i, part in enumerate(parts):
                with collected(i):
                    net.losses(part)[i].backward()
    for p in net.heads[2].parameters():  # never reached
        assert p.grad is None
        p.grad = torch.zeros_like(p)
    assert_right(net, d, heads)


def test_gradients_accumulate_over_steps_with_a_loss_scale():
    net, scaler = model(), torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    steps = [wanted(net.losses(part), net, mf.MGDA()) for part in X.split(4)]
    for part in X.split(4):
        with mf.collect(NAMES, mf.MGDA(), net.parameters()) as collected:
            for name, loss in zip(NAMES, net.losses(part), strict=True):
                with collected(name):
                    scaler.scale(loss).backward(retain_graph=True)
    scaler.unscale_(optimizer)
    assert_right(net, *map(sum, zip(*steps, strict=True)))


def test_a_loss_that_does_not_come_is_missing():
    net = model()
    losses = net.losses()
    d, _ = wanted([losses[0], losses[2]], net, mf.ConFIG())
    with mf.collect(NAMES, mf.ConFIG(), net.parameters()) as collected:
        for i in (2, 0):  # in any order
            with collected(NAMES[i]):
                losses[i].backward(retain_graph=True)
    torch.testing.assert_close(flat(net.trunk.parameters()), d, rtol=1e-4, atol=1e-6)
    assert collected.stats.weights[1] == 0 and collected.stats.names == tuple(NAMES)


def test_a_model_with_a_block_in_it():
    """The block passes plain sums on and says nothing of several backward calls: they are resolved at the parameters."""
    torch.manual_seed(0)
    encoder, heads = nn.Linear(4, 3), nn.ModuleList([nn.Linear(3, 1), nn.Linear(3, 2)])
    block = mf.ImpartialityBlock(heads, mf.MGDA())
    params = [*encoder.parameters(), *heads.parameters()]
    d = mf.resolve(jacobian([head(encoder(X)).square().mean() for head in heads], list(encoder.parameters())), mf.UPGrad())
    losses = [out.square().mean() for out in block(encoder(X))]
    with mf.collect(2, mf.UPGrad(), params) as collected:
        for i, loss in enumerate(losses):
            with collected(i):
                loss.backward(retain_graph=True)
    torch.testing.assert_close(flat(encoder.parameters()), d, rtol=1e-4, atol=1e-6)


def test_an_error_leaves_the_gradients_as_they_were():
    net = model()
    sum(net.losses()).backward()
    before = [p.grad for p in net.parameters()]
    values = [g.clone() for g in before]

    def step(caught):
        with mf.collect(NAMES, mf.MGDA(), net.parameters()) as collected:
            with collected("image"):
                net.losses()[0].backward()
            try:
                with collected("text"):
                    net.losses()[1].backward()
                    raise KeyError("a loader ran dry")
            except KeyError:
                if not caught:
                    raise
        return collected

    with pytest.raises(KeyError):
        step(False)
    assert all(p.grad is g and torch.equal(g, v) for p, g, v in zip(net.parameters(), before, values, strict=True))
    assert step(True).stats is None  # the first alone is left: nothing is shared
    net.zero_grad()
    wanted_alone = jacobian([net.losses()[0]], list(net.parameters()))[0]
    step(True)
    torch.testing.assert_close(
        torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in net.parameters()]).double(), wanted_alone
    )


@pytest.mark.parametrize(
    "use, error, message",
    [
        (lambda net: mf.collect([], mf.MGDA(), net.parameters()), ValueError, r"losses is \[\], expected 1 to 4096 names"),
        (lambda net: mf.collect(["a", "a"], mf.MGDA(), net.parameters()), ValueError, "each once"),
        (lambda net: mf.collect(2, mf.Krum(1), net.parameters()), ValueError, "Krum"),
        (lambda net: mf.collect(2, "pcd", net.parameters()), ValueError, "keeps state"),
        (lambda net: mf.collect(2, mf.MGDA(), [3]), TypeError, r"params\[0\] is a int"),
        (lambda net: mf.collect(2, mf.MGDA(), [net.losses()[0]]), TypeError, r"params\[0\] is no leaf"),
    ],
)
def test_arguments_that_do_not_fit(use, error, message):
    with pytest.raises(error, match=message), use(model()):
        pass


def test_names_that_do_not_fit():
    with mf.collect(NAMES, mf.MGDA(), model().parameters()) as collected:
        with pytest.raises(ValueError, match="name is 'video', expected one of"), collected("video"):
            pass
        with collected("text"), pytest.raises(RuntimeError, match="loss 'image' inside that of 'text'"), collected("image"):
            pass


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no process groups")
@pytest.mark.parametrize("bucket_mb", [25, 1e-5])
@pytest.mark.parametrize("zeroed", [False, True])
def test_gradients_in_the_buckets_of_ddp(tmp_path, bucket_mb, zeroed):
    """With gradient_as_bucket_view every pass writes its gradients into the same memory: what was collected before must not be there any more."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        net = model()
        net.forward = net.losses
        wrapped = nn.parallel.DistributedDataParallel(
            net, gradient_as_bucket_view=True, find_unused_parameters=True, bucket_cap_mb=bucket_mb
        )
        for step in range(2):
            wrapped.zero_grad(set_to_none=not zeroed)
            d, heads = wanted(net.losses(), net, mf.UPGrad())
            with mf.collect(NAMES, mf.UPGrad(), net.parameters()) as collected:
                for i in (2, 0, 1):
                    with collected(NAMES[i]):
                        for weight in (0.25, 0.75):  # micro-batches
                            (weight * wrapped(X)[i]).backward()
            assert_right(net, d, heads)
    finally:
        torch.distributed.destroy_process_group()
