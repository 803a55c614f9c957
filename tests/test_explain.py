"""mf.explain says what resolve would do, from shapes alone."""

import pytest
import torch

import mmfast as mf
from mmfast.backends import cpu, cuda, library
from mmfast.ops.explain import _cuda

compiled = pytest.mark.skipif(not library.available, reason=f"nothing compiled: {library.missing_reason}")
GRADS = [torch.full((4, 250), float("nan")) for _ in range(3)]


def test_the_floor_is_one_read_of_each_gradient_and_one_write():
    found = mf.explain([*GRADS, None], mf.MGDA(), bandwidth=32.0)
    assert found.floor_bytes == (3 + 1) * 1000 * 4
    assert found.floor_us == pytest.approx(found.floor_bytes / 32e9 * 1e6)
    assert mf.explain(GRADS, mf.MGDA()).floor_us is None
    assert "0.5 µs at 32 GB/s" in str(found) and "16 kB" in str(found)


@compiled
def test_the_compiled_paths_on_the_cpu():
    whole, samples = mf.explain(GRADS, mf.UPGrad()), mf.explain(GRADS, mf.UPGrad(), per="sample")
    assert whole.backend == "cpu" and cpu.isa() in whole.why and whole.launches is None
    assert (whole.read, whole.written) == (2 * 12000, 4000)
    assert samples.path == "sample by sample" and samples.read == 12000
    assert mf.explain([torch.ones(1, 10**6)] * 2, mf.UPGrad(), per="sample").read == 2 * 8 * 10**6
    assert mf.explain(GRADS, mf.GradDrop()).written == 4000
    assert "Gramian" in whole.path and "Gramian" not in mf.explain(GRADS, mf.Mean()).path


@compiled
def test_a_resolver_of_the_users_own():
    class Halves(mf.Resolver):
        def forward(self, G, mask=None):
            return torch.full(G.shape[:-1], 0.5, dtype=torch.float64)

    assert "Halves's own torch code" in mf.explain(GRADS, Halves()).path


def test_plain_torch_is_said_to_be_so():
    found = mf.explain(GRADS, mf.MGDA(), backend="reference")
    assert found.backend == "reference" and found.read is None and "not counted" in str(found)


def test_nothing_moves_on():
    rule = mf.PCGrad()
    before = rule.rng.clone()
    mf.explain(GRADS, rule)
    assert torch.equal(rule.rng, before) and rule.state is None


def test_what_resolve_refuses_is_refused():
    with pytest.raises(ValueError, match="backend"):
        mf.explain(GRADS, mf.MGDA(), backend="quantum")
    with pytest.raises(ValueError, match="per"):
        mf.explain(GRADS, mf.MGDA(), per="token")
    with pytest.raises(ValueError, match="grads"):
        mf.explain([None, None], mf.MGDA())
    with pytest.raises((ValueError, TypeError), match="mask"):
        mf.explain(GRADS, mf.MGDA(), mask=torch.ones(2, dtype=torch.bool))
    with pytest.raises((RuntimeError, ValueError), match="cuda"):
        mf.explain(GRADS, mf.MGDA(), backend="cuda")


@pytest.mark.skipif(
    not library.built_with_cuda or torch.cuda.is_available(), reason="asks for a build with CUDA on a machine without a GPU"
)
def test_the_cuda_plan_can_be_asked_without_a_gpu():
    """No device has no cooperative launch."""
    for per in (0, 1, 2):
        assert cuda.plan(0, 4, 3, 3, 10, 100, 0, per) == ("two_pass", 24000, 4000, 4)

    def launches(rule, per="batch", k=3):
        return _cuda(GRADS[0], k, k, rule.chain(), per, None)

    assert launches(mf.MGDA())[1:] == (24000, 4000, 4)
    assert launches(mf.PCGrad())[3] == 5  # its counter moves on
    assert launches(mf.MGDA(), k=9)[3] == 5  # two shapes of tiles
    assert launches(mf.MGDA(), "batch_sum")[1:] == (24000 + 3 * 250 * 4, 4000 + 3 * 250 * 4, 5)
    assert "zero" in launches(mf.Mean())[0]
