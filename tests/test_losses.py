"""Losses of losses: the formulas, what is learned and kept, and the peer's results over several epochs."""

import copy
import math

import pytest
import torch

import mmfast as mf
from mmfast import losses as ours

scalarization = pytest.importorskip("torchjd.scalarization")
K = 3


def some(seed=0, k=K):
    return torch.rand(k, generator=torch.Generator().manual_seed(seed)) + 0.1


def value_and_gradient(module, losses):
    losses = losses.clone().requires_grad_()
    total = module(losses)
    (gradient,) = torch.autograd.grad(total, losses)
    return total.detach(), gradient


PAIRS = [
    (lambda: ours.GeometricMean(), lambda: scalarization.GeometricMean()),
    (lambda: ours.GLS(), lambda: scalarization.GeometricMean()),
    (lambda: ours.STCH(0.3), lambda: scalarization.STCH(0.3)),
    (lambda: ours.STCH(1e-3, [1.0, 2.0, 3.0], [0.0, 0.1, 0.0]), lambda: scalarization.STCH(1e-3, torch.tensor([1.0, 2, 3]), torch.tensor([0, 0.1, 0]))),
    (lambda: ours.COSMOS(2.0, [1.0, 2.0, 3.0]), lambda: scalarization.COSMOS(2.0, torch.tensor([1.0, 2, 3]))),
    (lambda: ours.PBI(3.0, [1.0, 2.0, 3.0]), lambda: scalarization.PBI(3.0, torch.tensor([1.0, 2, 3]))),
    (lambda: ours.PBI(3.0, [1.0, 0.0, 3.0], [0.1, 0.1, 0.1]), lambda: scalarization.PBI(3.0, torch.tensor([1.0, 0, 3]), torch.full((3,), 0.1))),
    (lambda: ours.UW(K), lambda: scalarization.UW(K)),
    (lambda: ours.IMTLL(K), lambda: scalarization.IMTLL(K)),
    (lambda: ours.DWA(K), lambda: scalarization.DWA()),
    (lambda: ours.FAMO(K), lambda: scalarization.FAMO(K)),
]  # fmt: skip


@pytest.mark.parametrize("mine, theirs", PAIRS)
def test_the_peer_gives_the_same(mine, theirs):
    mine, theirs = mine(), theirs()
    with torch.no_grad():
        for p, q in zip(mine.parameters(), theirs.parameters(), strict=False):
            p.copy_(torch.tensor([0.3, -0.2, 0.7]))
            q.copy_(p)
    for seed in range(3):
        for a, b in zip(value_and_gradient(mine, some(seed)), value_and_gradient(theirs, some(seed)), strict=True):
            torch.testing.assert_close(a, b)


def test_dwa_over_epochs():
    mine, theirs = ours.DWA(K, temperature=0.7), scalarization.DWA(temperature=0.7)
    for epoch in range(5):
        for batch in range(3):
            torch.testing.assert_close(mine(some(10 * epoch + batch)), theirs(some(10 * epoch + batch)))
        mine.step()
        theirs.step()
        if epoch == 2:  # an epoch without a batch does not count, and a checkpoint holds what is kept
            mine.step()
            state = copy.deepcopy(mine.state_dict())
            mine = ours.DWA(K, temperature=0.7)
            mine.load_state_dict(state)
    mine.reset()
    assert torch.equal(mine.weights(), torch.ones(K))


def test_famo_over_steps():
    mine, theirs = ours.FAMO(K, lr=0.1, weight_decay=0.01), scalarization.FAMO(K, lr=0.1, weight_decay=0.01)
    for step in range(20):
        for a, b in zip(value_and_gradient(mine, some(step)), value_and_gradient(theirs, some(step)), strict=True):
            torch.testing.assert_close(a, b)
        mine.update(some(step) * some(100 + step))
        theirs.update(some(step) * some(100 + step))
        if step == 9:
            state = copy.deepcopy(mine.state_dict())
            mine = ours.FAMO(K, lr=0.1, weight_decay=0.01)
            mine.load_state_dict(state)
    mine.reset()
    torch.testing.assert_close(mine.weights(), torch.full((K,), 1 / K))
    mine.update(some())
    assert mine.weights().isnan().all()  # nothing came before: no number is made up


def test_gradnorm_moves_along_its_loss():
    """The step's gradient against autograd's of the paper's objective, with the target held still."""
    module = ours.GradNorm(K, alpha=1.5, lr=0.01)
    first, norms = some(1), some(2) * 3
    module(first)
    for step in range(8):
        now, before = some(20 + step), module.weights()
        module(now)
        w = before.clone().requires_grad_()
        rate = now / first
        target = ((w * norms).mean() * (rate / rate.mean()) ** 1.5).detach()
        (gradient,) = torch.autograd.grad((w * norms - target).abs().sum(), w)
        adam = copy.deepcopy(module.scale)
        adam.step(gradient)
        module.update(norms)
        torch.testing.assert_close(module.weights(), adam.value * K / adam.value.sum())
    assert math.isclose(module.weights().sum().item(), K, rel_tol=1e-6)


def test_gradnorm_brings_gradients_to_one_length():
    """With alpha = 0 all weighted norms meet, whatever the losses do."""
    module, norms = ours.GradNorm(K, alpha=0.0, lr=0.01), torch.tensor([1.0, 2.0, 4.0])
    for _ in range(2000):
        module(some())
        module.update(norms)
    torch.testing.assert_close(module.weights() * norms, torch.full((K,), 12 / 7), rtol=0.05, atol=0.0)


MAKERS = [
    lambda: ours.DWA(K, temperature=0.7),
    lambda: ours.FAMO(K),
    lambda: ours.GradNorm(K),
    lambda: ours.STCH(0.3, [0.1, 0.2, 0.7], [0.01, 0.02, 0.03]),
    lambda: ours.COSMOS(2.0, [0.1, 0.2, 0.7]),
    lambda: ours.PBI(3.0, [0.1, 0.2, 0.7]),
]


def train(module, steps, start=0):
    for step in range(start, start + steps):
        total = module(some(step))
        if isinstance(module, ours.FAMO):
            module.update(some(1000 + step))
        if isinstance(module, ours.GradNorm):
            module.update(some(2000 + step))
        if isinstance(module, ours.DWA) and step % 300 == 299:
            module.step()
    return total


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", MAKERS)
def test_a_model_of_16_bits_does_not_round_what_is_kept(make, dtype):
    """Over 300 calls a count, or a sum, in bfloat16 would stand still."""
    plain, module = make(), torch.nn.ModuleDict({"weighted": make(), "layer": torch.nn.Linear(2, 2)}).to(dtype)
    assert module["layer"].weight.dtype == dtype
    torch.testing.assert_close(train(module["weighted"], 700), train(plain, 700), rtol=0, atol=0)
    assert all(b.dtype == torch.float32 for b in module["weighted"].buffers() if b.is_floating_point())
    module.double()
    assert all(b.dtype == torch.float64 for b in module["weighted"].buffers() if b.is_floating_point())
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        assert all(b.dtype == torch.float32 for b in make().buffers() if b.is_floating_point())
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("make", MAKERS)
def test_autocast_rounds_nothing(make):
    """The losses of a step are float32, and often weighted inside of autocast; PBI takes what is nearly the same apart."""
    for losses in (some(), torch.tensor([0.1, 0.2001, 0.7])):
        wanted, module = value_and_gradient(make(), losses), make()
        with torch.autocast("cpu", torch.bfloat16):
            found = value_and_gradient(module, losses)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("make", MAKERS)
def test_memory_of_to_empty_is_made_anew(make):
    """On the meta device and back, as wrappers for large models do it."""
    module = make()
    train(module, 5)
    module = module.to("meta").to_empty(device="cpu")
    for part in module.modules():
        for buffer in part.buffers(recurse=False):
            buffer.fill_(7)
    for part in module.modules():
        part.reset_parameters()
    torch.testing.assert_close(train(module, 40), train(make(), 40), rtol=0, atol=0)


@pytest.mark.parametrize("make", MAKERS[:3])
def test_an_evaluation_leaves_no_trace(make):
    module, plain = make(), make()
    for epoch in range(3):
        for m in (module, plain):
            train(m.train(), 300, 300 * epoch)
        state = copy.deepcopy(module.state_dict())
        module.eval()
        assert module(torch.full((K,), 1e3)).isfinite()
        for name, value in module.state_dict().items():
            torch.testing.assert_close(value, state[name], equal_nan=True)
    torch.testing.assert_close(module.weights(), plain.weights())


def test_learned_scales_reach_their_optimum():
    for module, wanted in ((ours.UW(K), lambda s: s.exp()), (ours.IMTLL(K), lambda s: (-s).exp())):
        optimizer = torch.optim.Adam(module.parameters(), 0.05)
        for _ in range(800):
            optimizer.zero_grad()
            module(some()).backward()
            optimizer.step()
        torch.testing.assert_close(wanted(module.scale.detach()), some(), rtol=1e-3, atol=1e-4)
        module.reset_parameters()
        assert not module.scale.any()


def test_largest_values_do_not_overflow():
    assert ours.STCH(1e-6)(torch.tensor([1e6, 3e6])).item() == pytest.approx(1.5e6)
    assert ours.GeometricMean()(torch.tensor([1e30, 1e30])).item() == pytest.approx(1e30, rel=1e-4)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: ours.UW(2)(torch.ones(3)), r"losses is torch.float32 \(3,\), expected a floating-point tensor \[2\]"),
        (lambda: ours.UW(2)([torch.ones(())] * 2), "losses is a list, expected a tensor"),
        (lambda: ours.DWA(2)(torch.ones(2, dtype=torch.int64)), "losses is torch.int64"),
        (lambda: ours.GeometricMean()(torch.ones(())), r"losses is torch.float32 \(\), expected a floating-point tensor \[K\]"),
        (lambda: ours.FAMO(0), "k is 0, expected the number of losses"),
        (lambda: ours.STCH(0.0), "mu is 0.0, expected a positive number"),
        (lambda: ours.STCH(1.0, [1.0, -1.0]), "weights is .*, expected K numbers, none negative"),
        (lambda: ours.PBI(1.0, [1.0, 1.0], [0.0]), "reference has 1 numbers, expected 2"),
        (lambda: ours.PBI(-1.0, [1.0]), "theta is -1.0"),
        (lambda: ours.COSMOS(-1.0, [1.0]), "penalty is -1.0"),
        (lambda: ours.COSMOS(1.0, [1.0, math.nan]), "weights is .*, expected K finite numbers"),
        (lambda: ours.DWA(2, temperature=0.0), "temperature is 0.0"),
        (lambda: ours.GradNorm(2, alpha=-1.0), "alpha is -1.0"),
        (lambda: ours.GradNorm(2).update(torch.ones(3)), "losses is torch.float32"),
    ],
)
def test_errors(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()


def test_with_a_block():
    """Losses are weighed, gradients resolved: both in one backward pass."""
    heads, uw = mf.LinearHeads(4, [1, 1], mf.UPGrad()), ours.UW(2)
    x = torch.randn(5, 4, requires_grad=True)
    losses = torch.stack([out.square().mean() for out in heads(x)])
    uw(losses).backward()
    assert x.grad.isfinite().all() and uw.scale.grad.isfinite().all() and heads.stats() is not None
