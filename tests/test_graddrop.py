"""GradDrop with one leak for all rows, or one for each: the formula element by element, how often each sign passes, and who is a row's leak."""

import copy

import pytest
import torch

import mmfast as mf

LEAKS = [0.0, 0.25, 1.0, 0.6]


def either_sign(J, leaks):
    """The two results that an element may have: the positive gradients pass and the negative ones leak, or the other way round."""
    leak = torch.as_tensor(leaks, dtype=torch.float64).view(-1, 1)
    up, down = J.clamp(min=0), J.clamp(max=0)
    return (up + leak * down).sum(0), (leak * up + down).sum(0)


@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
@pytest.mark.parametrize("leak", [0.3, LEAKS], ids=["one", "each"])
def test_every_element_is_of_one_sign_and_drawn_by_its_purity(leak, backend):
    torch.manual_seed(0)
    J = torch.randn(4, 3, dtype=torch.float64).repeat_interleave(20_000, 1)  # three elements, many draws of each
    out = mf.resolve(list(J), mf.GradDrop(leak), backend=backend)
    up, down = either_sign(J, [leak] * 4 if leak == 0.3 else leak)
    passed_up = (out - up).abs() < 1e-12
    assert (passed_up | ((out - down).abs() < 1e-12)).all()
    purity = 0.5 * (1 + J.sum(0) / J.abs().sum(0))
    for n in range(3):
        one = slice(20_000 * n, 20_000 * (n + 1))
        torch.testing.assert_close(passed_up[one].double().mean(), purity[one][0], rtol=0, atol=0.015)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_both_forms_decide_alike(dtype):
    """Bit for bit, with rows that are missing in a mask, in samples of it, or None: a row takes its own leak along."""
    grads = [torch.randn(3, 1501).to(dtype) for _ in range(4)]
    ours = mf.GradDrop(LEAKS)
    theirs = copy.deepcopy(ours)
    for mask in (None, torch.tensor([True, False, True, True]), torch.rand(3, 4) < 0.7):
        a, b = (mf.resolve(grads, rule, mask=mask, backend=name) for rule, name in ((ours, "cpu"), (theirs, "reference")))
        assert torch.equal(a, b)
    gone = [grads[0], None, grads[2], grads[3]]
    a, b = mf.resolve(gone, ours, backend="auto"), mf.resolve(gone, theirs, backend="reference")
    without = copy.deepcopy(ours)
    without.rng[1] -= 1
    hidden = mf.resolve(grads, without, mask=torch.tensor([True, False, True, True]))
    assert torch.equal(a, b) and torch.equal(a, hidden)


def test_the_peer_lets_the_same_through():
    """With all purities 0 or 1 nothing is left to the draw."""
    aggregation = pytest.importorskip("torchjd.aggregation")
    J = torch.rand(4, 50).add(0.1) * torch.where(torch.rand(50) < 0.5, 1.0, -1.0)
    J[2] *= -0.0  # a row of zeros has no sign
    theirs = aggregation.GradDrop(leak=torch.tensor(LEAKS))(J)
    torch.testing.assert_close(mf.resolve(list(J), mf.GradDrop(LEAKS)), theirs)


def test_names_and_checkpoints():
    assert repr(mf.GradDrop(LEAKS)) == "GradDrop(leak=(0.0, 0.25, 1.0, 0.6))" and repr(mf.GradDrop()) == "GradDrop(leak=0.0)"
    grads = list(torch.randn(4, 40))
    torch.testing.assert_close(mf.resolve(grads, mf.GradDrop([1.0] * 4)), sum(grads))
    rule = mf.GradDrop(LEAKS)
    other = mf.GradDrop(LEAKS)
    other.load_state_dict(rule.state_dict())
    assert torch.equal(mf.resolve(grads, rule), mf.resolve(grads, other))
