"""The operators as torch sees them: schemas, fakes, compilation, unwritten memory, instruction sets, very long gradients."""

import os
import subprocess
import sys

import pytest
import torch

import mmfast as mf
from mmfast.backends import library

pytestmark = pytest.mark.skipif(not library.available, reason=str(library.missing_reason))


def gradients(k=3, shape=(4, 6)):
    return [torch.randn(shape) for _ in range(k)]


RNG = torch.tensor([7, 0])


def heads(delta, k=3):
    """Arguments of the operator of linear branches."""
    delta = delta[:, :70]
    return delta, torch.ones(delta.shape[1], 5), torch.arange(delta.shape[1]) * k // delta.shape[1]


CALLS = {
    "gram": lambda g: (torch.ops.mmfast.gram.default, (g, [], None, 0)),
    "gram sample": lambda g: (torch.ops.mmfast.gram.default, (g, [1], torch.ones(4, len(g) + 1, dtype=torch.bool), 1)),
    "combine": lambda g: (torch.ops.mmfast.combine.default, (g, [], None, torch.ones(len(g), dtype=torch.float64), 0)),
    "weights": lambda g: (
        torch.ops.mmfast.weights.default,
        (torch.eye(3, dtype=torch.float64), None, [6, 1], [0.0], None, None, False, 2e-16),
    ),
    "weights with state": lambda g: (
        torch.ops.mmfast.weights.default,
        (torch.eye(3, dtype=torch.float64), None, [5, 1], [0.5], torch.zeros(9, dtype=torch.float64), RNG, True, 2e-16),
    ),
    "resolve": lambda g: (torch.ops.mmfast.resolve.default, (g, [], None, [6, 1], [0.0], None, None, 0, False, True)),
    "resolve sample": lambda g: (torch.ops.mmfast.resolve.default, (g, [0], None, [4, 2], [0.0, 0.0], None, RNG, 1, True, True)),
    "graddrop": lambda g: (torch.ops.mmfast.graddrop.default, (g, [], None, [0.0], RNG)),
    "trimmed_mean": lambda g: (torch.ops.mmfast.trimmed_mean.default, (g, [], None, 1)),
    "heads": lambda g: (torch.ops.mmfast.heads.default, (*heads(g[0]), None, [6, 1], [0.0], None, None, 3, 0, True)),
    "log_prob": lambda g: (
        torch.ops.mmfast.log_prob.default,
        (g[0][:, :6], torch.ones(2, 4), torch.ones(2, 4), torch.tensor([[0, 2], [4, 1], [5, 2], [7, 1]]), torch.ones(4), True),
    ),
    "log_prob_backward": lambda g: (
        torch.ops.mmfast.log_prob_backward.default,
        (torch.ones(4, 4), g[0][:, :6], torch.tensor([[0, 2], [4, 1], [5, 2], [7, 1]])),
    ),
    "heads sample": lambda g: (
        torch.ops.mmfast.heads.default,
        (*heads(g[0]), torch.ones(4, 3, dtype=torch.bool), [4, 2], [0.0, 0.0], None, RNG, 3, 1, True),
    ),
}


@pytest.mark.parametrize("layout", ["plain", "permuted", "expanded"])
@pytest.mark.parametrize("name", list(CALLS))
def test_opcheck(name, layout):
    grads = gradients()
    if layout == "permuted":
        grads = [g.T.contiguous().T for g in grads]
    elif layout == "expanded":
        grads = [g[:1].expand(4, 6) for g in grads]
    op, args = CALLS[name](grads)
    torch.library.opcheck(op, args)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic):
    """One graph, no break, the result of eager."""

    def step(x, y, z):
        return mf.resolve([x.sin(), y.cos(), z], mf.MGDA()) * 2

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n in (8, 40):
        grads = gradients(3, (n, 6))
        torch.testing.assert_close(compiled(*grads), step(*grads))


_POISONED = """
import torch
from test_operators import CALLS, gradients
for name, call in CALLS.items():
    for shape in ((4, 6), (4, 513), (4, 4099)):
        op, args = call(gradients(5, shape))
        results = op(*args)
        for result in results if isinstance(results, tuple) else (results,):
            assert result.isfinite().all(), (name, shape)
print("written")
"""


def test_every_element_is_written():
    """The compiled operators start from memory full of NaN; none of it may be left."""
    run = subprocess.run(
        [sys.executable, "-c", _POISONED],
        env={**os.environ, "MMFAST_POISON": "1", "PYTHONPATH": "tests:."},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stdout.strip() == "written", run.stderr


_BITS = """
import hashlib, torch, mmfast as mf
from mmfast.ops.heads import heads as linear_heads
torch.manual_seed(0)
digest = hashlib.sha256()
rules = [mf.Random(), mf.PCGrad(), mf.GradVac(), mf.MGDA(), mf.CAGrad(), mf.UPGrad(), mf.DualProj(), mf.PCD(), mf.NashMTL(), mf.FairGrad(2.0), mf.IMTLG(),
         mf.AlignedMTL(), mf.ConFIG(), mf.GradNorm(), mf.NSGD(), mf.Krum(1), mf.Compose(mf.NSGD(), mf.PCGrad()), mf.GradDrop(0.1), mf.TrimmedMean(1)]
for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
    for k, shape in [(4, (3, 5)), (5, (2, 2049)), (9, (2, 4100)), (33, (3, 700)), (67, (2, 130))]:
        grads = [torch.randn(shape).to(dtype) for _ in range(k)]
        for per in ("batch", "sample", "batch_sum"):
            digest.update(mf.gram(grads, per).numpy().tobytes())
        for rule in rules:
            rule.reset()
            digest.update(mf.resolve(grads, rule).double().numpy().tobytes())
        for per in ("batch", "sample", "batch_sum"):
            delta = torch.stack(grads, -1)
            info = linear_heads(delta, torch.randn(k, 9).to(dtype), torch.arange(k), mf.MGDA(), k, per, None, True)[1]
            digest.update(info.numpy().tobytes())
from mmfast.models.likelihoods import KINDS, Categorical, Joint, Ordinal
joint = Joint([kind(5) if kind in (Categorical, Ordinal) else kind() for kind in KINDS])
for dtype in (torch.float32, torch.float64):
    raw, x = torch.randn(2, 37, sum(joint.sizes)).mul(4).to(dtype).requires_grad_(), torch.randint(2, (37, len(KINDS))).to(dtype)
    out = joint.log_prob(raw, x, torch.rand(37, len(KINDS)).to(dtype).round())
    for found in (out, *torch.autograd.grad(out.square().sum(), raw)):
        digest.update(found.detach().numpy().tobytes())
print(mf.backends()["cpu"][1], digest.hexdigest())
"""


def test_same_bits_on_every_instruction_set():
    lines = set()
    for isa in ("avx512", "avx2", "portable"):
        run = subprocess.run(
            [sys.executable, "-c", _BITS], env={**os.environ, "MMFAST_CPU_ISA": isa}, capture_output=True, text=True, check=True, cwd="."
        )
        lines.add(run.stdout.strip())
    assert len({line.split()[-1] for line in lines}) == 1, lines
    assert len(lines) >= 2, "only one instruction set ran"


@pytest.mark.skipif(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 14 << 30, reason="needs 14 GB of free memory")
def test_more_than_2_31_elements():
    n = 2**31 + 4099
    g = torch.zeros(n, dtype=torch.bfloat16)
    g[3], g[2**31 + 1], g[-1] = 2, 3, 6
    assert mf.gram([g]).item() == 49
    out = mf.combine([g], torch.tensor([0.5]))
    assert out.shape == (n,) and out[2**31 + 1] == 1.5 and out[-1] == 3
