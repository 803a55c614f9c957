"""What the tests of every path share: how much is run, gradients, and the comparison with the CPU operators."""

import torch
from conftest import LONG  # noqa: F401

from mmfast import ops
from ptx import device

MODES = {"persistent": "cooperative", "cluster": "cluster", "per_sample": "plain"}
compared = 0  # results that were held against the CPU's


def count(n=1):
    global compared
    compared += n


def cancelling(k, shape, dtype):
    """Nearly nothing is left of their sum, so the Gramian does not know its length."""
    grads = [torch.randn(shape) for _ in range(k - 1)]
    return [g.to(dtype) for g in [*grads, -sum(grads) * 1.001 if grads else torch.randn(shape)]]


def twins(make, seed=0):
    """The same resolver twice."""
    torch.manual_seed(seed)
    one = make()
    torch.manual_seed(seed)
    return one, make()


def assert_resolved_alike(one, two, grads, per="batch", mask=None, norm=False, exact=True, info=True):
    """Result, weights and Gramian, state and random stream, bit for bit; within rounding where the GPU's exp, log and pow are used."""
    count()
    how = {"per": per, "mask": mask, "preserve_norm": norm, "backend": "cpu", "with_info": info}
    expected = ops.resolve_info(grads, one, **how)
    with device.serving():
        found = ops.resolve_info(grads, two, **how)
    first = next(g for g in grads if g is not None)
    eps = torch.finfo(first.dtype).eps
    for ours, theirs, rtol in zip(found, expected, (8 * eps, 1e-9), strict=True):
        if theirs is not None and (info or theirs.shape == first.shape):
            atol = 0.0 if exact else 8 * eps * theirs.nan_to_num().abs().amax().item() if theirs.numel() else 0.0
            torch.testing.assert_close(ours, theirs, rtol=0 if exact else rtol, atol=atol if rtol != 1e-9 else 0.0, equal_nan=True)
    for ours, theirs in zip(two.state_dict().values(), one.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0 if exact else 1e-9, atol=0, equal_nan=True)


def path_taken():
    """The path of the launches since it was asked last."""
    modes = {name.split()[1] for name in device.launched() if "persistent_kernel" in name}
    return next((path for path, mode in MODES.items() if mode in modes), "two_pass")
