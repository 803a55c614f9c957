"""Every rule by a warp of the kernels' PTX: its weights, state and random stream are those of the CPU."""

import pytest
import torch
from problems import gramian
from rule_table import RULES
from test_cuda import LIBM, gradients

from mmfast import ops
from ptx import device
from ptx.cases import LONG, assert_resolved_alike, count, twins


@pytest.mark.parametrize("name", RULES)
def test_weights(name):
    """Three calls, for state and random stream go on; a masked row in one of them."""
    row = RULES[name]
    for k in (row.min_k, row.min_k + 3, 13, 34, 64) if LONG else (row.min_k + 1, 9):
        one, two = twins(lambda k=k: row.make(k), k)
        if one.chain() is None:
            pytest.skip(f"{name} works element by element")
        mask = torch.ones(k, dtype=torch.bool)
        mask[-1] = row.min_k == k
        for m, norm in ((None, False), (mask, True), (None, False)):
            G = torch.stack([gramian(k, seed=s) for s in range(3 if LONG else 2)])
            expected = ops.weights(G, one, m, preserve_norm=norm, backend="cpu")
            with device.serving():
                found = ops.weights(G, two, m, preserve_norm=norm, backend="cpu")
            torch.testing.assert_close(found, expected, rtol=1e-9 if name.startswith(LIBM) else 0, atol=0, equal_nan=True)
            count()


@pytest.mark.skipif(not LONG, reason="make ptx runs it")
@pytest.mark.parametrize("chip", device.CHIPS)
@pytest.mark.parametrize("name", RULES)
def test_resolve(name, chip, monkeypatch):
    """In one launch where there is one, and by the general kernels."""
    row = RULES[name]
    for k in (row.min_k, row.min_k + 3, 13, 34):
        if row.make(k).chain() is None:
            pytest.skip(f"{name} works element by element")
        for per, shape in (("batch", (2, 701)), ("sample", (3, 2503)), ("batch_sum", (3, 301))):
            mask = torch.rand(shape[0], k) < 0.8 if per != "batch" else torch.arange(k) != 0 if k > row.min_k else None
            for path in ("two_pass", ""):
                monkeypatch.setenv("MMFAST_CUDA_PATH", path)
                one, two = twins(lambda k=k: row.make(k), k)
                with device.chip(chip):
                    for _ in range(2):
                        assert_resolved_alike(one, two, gradients(k, shape, torch.float32), per, mask, k == 13, not name.startswith(LIBM))
