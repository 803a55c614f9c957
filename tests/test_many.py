"""More gradients than a kernel takes: 512 and 1024 of them, one for each sample's loss, against float64."""

import copy

import numpy as np
import pytest
import torch
from rule_table import RULES
from torch import nn

import mmfast as mf
from mmfast.ops.resolve import resolve_info


def jacobian(k, n, seed=0):
    """Rows [k, n] that share eight directions, so that many conflict, with norms over a factor of ten."""
    generator = torch.Generator().manual_seed(seed)
    J = torch.randn(k, 8, generator=generator) @ torch.randn(8, n, generator=generator) / 4 + torch.randn(k, n, generator=generator)
    return J * torch.logspace(-1, 0, k).unsqueeze(1)


def relative(found, wanted, size):
    return float((found.double() - wanted).norm() / size)


@pytest.mark.parametrize("k", [257, 512, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_gramian_and_the_sum_are_those_of_float64(k, dtype):
    J = jacobian(k, 300).to(dtype)
    w = torch.randn(k, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    long = J.double().numpy().astype(np.longdouble)  # float64's own product is off by 3e-15
    wanted = torch.from_numpy((long @ long.T).astype(np.float64))
    norms = wanted.diagonal().sqrt()
    G = mf.gram(J)
    assert G.shape == (k, k) and torch.equal(G, G.T)
    assert ((G - wanted) / norms.outer(norms)).abs().max() < (4e-15 if dtype == torch.float64 else 1e-6)
    found = mf.combine(list(J), w)
    assert found.dtype == dtype
    assert relative(found, w @ J.double(), w.abs() @ norms) < {torch.bfloat16: 1e-3, torch.float32: 1e-7, torch.float64: 4e-15}[dtype]


def test_each_entry_has_the_bits_of_a_smaller_gramian():
    J = jacobian(300, 5000)
    G = mf.gram(J)
    rows = torch.arange(0, 300, 7)
    assert torch.equal(G[rows][:, rows], mf.gram(J[rows]))


MOST = ["Mean", "MGDA", "ConFIG", "AlignedMTL"]
CASES = [(name, 512) for name in [*MOST, "PCGrad fixed", "DualProj", "IMTLG", "Krum", "NashMTL"]] + [("UPGrad", 264)]
CASES += [(name, 1024) for name in MOST]


@pytest.mark.parametrize("name, k", CASES)
def test_rules_keep_their_conditions(name, k):
    """By each rule's own conditions on the float64 Gramian, without its code; the resolved gradient is that of these weights."""
    row = RULES[name]
    J = jacobian(k, 2 * k).double()
    G = J @ J.T
    out, info = resolve_info(list(J), row.make(k))
    w = info[:k]
    if row.residual:
        assert row.residual(G, w) < 1e-7
    else:
        torch.testing.assert_close(w, torch.full_like(w, 1 / k))
    assert relative(out, w @ J, w.abs() @ G.diagonal().sqrt()) < 1e-13


@pytest.mark.parametrize("name", ["MGDA", "PCGrad", "ConFIG", "AlignedMTL"])
def test_the_compiled_solvers_and_plain_torch_agree(name):
    one = RULES[name].make(300)
    two = copy.deepcopy(one)
    J = jacobian(300, 700)
    found, wanted = mf.resolve(J, one), mf.resolve(J.double(), two, backend="reference")
    size = J.norm(dim=1).sum() if name == "PCGrad" else wanted.norm()
    assert relative(found, wanted, size) < 1e-3


@pytest.mark.parametrize("per", ["batch", "sample", "batch_sum"])
@pytest.mark.parametrize("norm", [False, True])
def test_missing_rows_and_masks(per, norm):
    k, there = 300, [i for i in range(300) if i % 5]
    grads = [torch.randn(4, 3, generator=torch.Generator().manual_seed(i)) if i % 5 else None for i in range(k)]
    few = [g.double() for g in grads if g is not None]
    for mask in (None, torch.arange(k) % 7 != 1, torch.rand(4, k, generator=torch.Generator().manual_seed(0)) < 0.8):
        small = None if mask is None else mask[..., there]
        found = mf.resolve(grads, mf.Mean(), per, mask, preserve_norm=norm)
        torch.testing.assert_close(found.double(), mf.resolve(few, mf.Mean(), per, small, preserve_norm=norm), rtol=1e-4, atol=1e-5)
        full = [torch.zeros(4, 3) if g is None else g for g in grads]
        G = mf.gram(full, per, mask=mask)
        torch.testing.assert_close(G[..., there, :][..., there], mf.gram(few, per, mask=small), rtol=1e-5, atol=1e-5)


def test_lists_of_tensors():
    J = jacobian(400, 60)
    grads = [[row[:24].view(4, 6), row[24:]] for row in J]
    first, second = mf.resolve(grads, mf.MGDA())
    wanted = mf.resolve(J.double(), mf.MGDA())
    torch.testing.assert_close(torch.cat([first.flatten(), second]).double(), wanted, rtol=0, atol=1e-3 * float(J.norm(dim=1).min()))


def test_one_loss_for_each_sample():
    """By `backward`, at the parameters of a network."""
    k = 512
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    losses = list(net(torch.randn(k, 4)).square().mean(1).unbind(0))
    params = list(net.parameters())
    J = torch.stack([torch.cat([g.flatten() for g in torch.autograd.grad(loss, params, retain_graph=True)]) for loss in losses]).double()
    w = mf.weights((J @ J.T).float(), mf.PCGrad(order="fixed"))
    mf.backward(losses, mf.PCGrad(order="fixed"))
    found = torch.cat([p.grad.flatten() for p in params])
    assert relative(found, w @ J, (w @ J).norm()) < 1e-4


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: mf.resolve([torch.ones(2)] * 300, mf.TrimmedMean(1)), ValueError, r"300 gradients, expected 1 to 256 for TrimmedMean"),
        (lambda: mf.resolve([torch.ones(2)] * 4097, mf.Mean()), ValueError, "4097 gradients, expected 1 to 4096"),
        (lambda: mf.weights(torch.ones(4097, 4097), mf.Mean()), ValueError, "expected K from 1 to 4096"),
        (lambda: mf.resolve([torch.ones(2)] * 299 + [torch.ones(3)], mf.Mean()), ValueError, r"^grads\[299\] has shape \(3,\)"),
        (lambda: mf.resolve([None] * 300, mf.Mean()), ValueError, "all 300 gradients are missing"),
        (lambda: mf.fork(torch.ones(2), 300, mf.Mean()), ValueError, "k is 300, expected 1 to 256 branches"),
    ],
)
def test_limits(call, error, message):
    with pytest.raises(error, match=message):
        call()
