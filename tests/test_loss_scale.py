"""A loss scale that changes from call to call (torch.amp.GradScaler) changes no rule with state: the result is that of the unscaled run."""

import pytest
import torch
from torch import nn

import mmfast as mf

BACKENDS = ["auto", "reference"]
RULES = {
    "GradNorm": lambda: mf.GradNorm(alpha=1.0, lr=0.1, update_at=3),
    "GradNorm at once": lambda: mf.GradNorm(alpha=0.5, lr=0.1, update_at=1),
    "NSGD": lambda: mf.NSGD(update_at=2),
    "GradVac": mf.GradVac,
    "PCD": lambda: mf.PCD(tau=0.3, beta=0.9),
    "CRMOGM": lambda: mf.CRMOGM(mf.MGDA()),
    "CRMOGM of unit gradients": lambda: mf.CRMOGM(mf.MGDA(normalize="l2")),
    "CRMOGM of NashMTL": lambda: mf.CRMOGM(mf.NashMTL()),
    "CRMOGM of FairGrad": lambda: mf.CRMOGM(mf.FairGrad(0.5)),
    "CRMOGM of two": lambda: mf.CRMOGM(mf.Compose(mf.NashMTL(), mf.FairGrad(1.0))),
    "CRMOGM of CRMOGM": lambda: mf.CRMOGM(mf.CRMOGM(mf.NashMTL(max_norm=1.0))),
    "Compose": lambda: mf.Compose(mf.GradVac(), mf.CRMOGM(mf.NashMTL()), mf.GradNorm(alpha=1.0, lr=0.1, update_at=2)),
}
CALLS, K = 14, 4


def masks(coming):
    """Modalities that come and go: first some that never meet, then pairs, then all."""
    if not coming:
        return [None] * CALLS
    first = [[0], [1, 2], [0], [3], [1, 3], [0, 2]]
    kept = [torch.isin(torch.arange(K), torch.tensor(rows)) for rows in first] + [torch.rand(K) < 0.6 for _ in range(CALLS - 8)]
    return kept + [torch.ones(K, dtype=torch.bool)] * 2


def run(make, scales, calls, rows, **kwargs):
    torch.manual_seed(1)
    rule = make()
    return [
        mf.resolve(list(g * scale), rule, mask=mask, preserve_norm=True, **kwargs) / scale
        for scale, g, mask in zip(scales, calls, rows, strict=True)
    ]


@pytest.mark.parametrize("coming", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("make", RULES.values(), ids=RULES.keys())
def test_a_run_is_the_unscaled_run(make, backend, coming):
    calls = [torch.randn(K, 3, 7, dtype=torch.float64) * torch.rand(K, 1, 1, dtype=torch.float64).mul(4).exp() for _ in range(CALLS)]
    rows, scales = masks(coming), (2.0 ** torch.randint(-12, 17, (CALLS,))).tolist()
    for per in ("batch", "sample") if backend == "auto" else ("batch",):
        kwargs = {"per": per, "backend": backend}
        for ours, plain in zip(run(make, scales, calls, rows, **kwargs), run(make, [1.0] * CALLS, calls, rows, **kwargs), strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-8, atol=1e-8 * plain.abs().max().item())


@pytest.mark.parametrize("make", RULES.values(), ids=RULES.keys())
def test_both_forms_remember_the_same(make):
    calls = [torch.randn(K, 9, dtype=torch.float64) * (i + 1) for i in range(CALLS)]
    rows, scales = masks(True), [3.0 ** (i % 5 - 2) for i in range(CALLS)]
    for ours, theirs in zip(run(make, scales, calls, rows), run(make, scales, calls, rows, backend="reference"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-7 * theirs.abs().max().item())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", [[1.0, 1.0], [1.0, 100.0]])
@pytest.mark.parametrize(
    "rule", [lambda: mf.GradNorm(alpha=1.0, lr=0.1, update_at=1), lambda: mf.NSGD(update_at=1)], ids=["GradNorm", "NSGD"]
)
def test_a_branch_that_comes_late_under_another_scale(rule, lengths, backend):
    """As if one unit had held for all: gradients that keep their lengths have not changed."""
    J = torch.diag(torch.tensor(lengths))
    found = []
    for scales in ((1.0, 1.0), (2.0**16, 2.0**10)):
        ours = rule()
        for call in range(30):
            scale = scales[call >= 4]
            out = mf.resolve([J[0] * scale, J[1] * scale if call >= 4 else None], ours, backend=backend) / scale
        found.append(out)
    assert torch.equal(*found)
    if lengths == [1.0, 1.0]:
        torch.testing.assert_close(out, torch.ones(2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_norms_rest_under_scales_that_round(backend):
    rule = mf.GradNorm(alpha=1.0, lr=0.1, update_at=1)
    for call in range(30):
        scale = 3.7 ** (call % 5)
        g = [torch.tensor([0.3, 0.1]) * scale, torch.tensor([-0.1, 0.3]) * scale if call >= 3 else None]
        mf.resolve(g, rule, backend=backend)
    assert (rule.state[:2] == 0).all()


def test_gradscaler_trains_as_without():
    """Through a block: unscaled parameters' gradients, whatever the scaler did, a skipped step included."""
    found = []
    for scales in ([1.0] * 8, [2.0**12, 2.0**12, 2.0**11, 2.0**13, 2.0**3, 2.0**3, 2.0**4, 2.0**16]):
        torch.manual_seed(3)
        shared, block = (
            nn.Linear(5, 6),
            mf.ImpartialityBlock([nn.Linear(6, 2) for _ in range(3)], mf.GradNorm(alpha=1.0, lr=0.1, update_at=2)),
        )
        optimizer = torch.optim.SGD([*shared.parameters(), *block.parameters()], lr=0.05)
        for call, scale in enumerate(scales):
            outputs = block(shared(torch.randn(7, 5)).tanh())
            loss = sum(outputs[i].sub(1).square().mean() for i in range(3) if call >= 3 or i < 2)
            optimizer.zero_grad()
            (loss * scale).backward()
            for p in (*shared.parameters(), *block.parameters()):
                p.grad = None if p.grad is None else p.grad / scale
            optimizer.step()
        found.append(torch.cat([p.detach().flatten() for p in shared.parameters()]))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)
