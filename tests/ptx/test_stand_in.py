"""What the stand-in for the CUDA runtime plays: devices, faults, versions."""

import pytest
import torch

import mmfast as mf
from ptx import device


def grads(k=3, n=5000):
    return [torch.randn(1, n) for _ in range(k)]


def resolve(g, rule=None, **more):
    with device.serving():
        return mf.resolve(g, rule or mf.MGDA(), backend="cpu", **more)


def kernels():
    """What was launched, as (a part of the kernel's name, mode)."""
    names = ("persistent", "gram", "fold", "solve", "combine", "lengths", "advance")
    return {(next(n for n in names if f"{n}_kernel" in name.split()[0]), name.split()[1]) for name in device.launched()}


def test_each_device_takes_its_own_path():
    g = grads()
    device.launched()
    found = {}
    for name in device.CHIPS:
        with device.chip(name):
            assert torch.equal(resolve(g), mf.resolve(g, mf.MGDA()))
            found[name] = kernels()
    assert found == {"H100": {("persistent", "cluster")}, "A100": {("persistent", "cooperative")}, "L4": {("persistent", "cooperative")}}


def test_overlap_is_asked_for_where_the_device_has_it(monkeypatch):
    monkeypatch.setenv("MMFAST_CUDA_PATH", "two_pass")
    device.launched()
    for name, mode in (("H100", "dependent"), ("A100", "plain")):
        with device.chip(name):
            resolve(grads())
        assert {("gram", "plain"), ("fold", mode), ("solve", mode), ("combine", mode)} == kernels()


@pytest.mark.parametrize("mode", ["plain", "cooperative"])
def test_a_wrong_result(mode, monkeypatch):
    monkeypatch.setenv("MMFAST_CUDA_PATH", "two_pass" if mode == "plain" else "persistent")
    g = grads()
    with device.fault("wrong", "gram_kernel" if mode == "plain" else "persistent_kernel", mode):
        assert not torch.equal(resolve(g), mf.resolve(g, mf.MGDA()))
    assert torch.equal(resolve(g), mf.resolve(g, mf.MGDA()))


def test_an_error_that_kills_the_context():
    with device.fault("sticky", "solve_kernel"):
        resolve(grads())  # one launch, of another kernel
        for _ in range(2):
            with pytest.raises(RuntimeError, match="CUDA error 700"):
                resolve(grads(9))
        with pytest.raises(RuntimeError, match="CUDA error 700"):
            resolve(grads())
    resolve(grads(9))


def test_a_launch_that_is_refused(monkeypatch):
    with device.fault("refuse", "persistent_kernel", "cluster"):
        g = grads()
        assert torch.equal(resolve(g), mf.resolve(g, mf.MGDA()))  # the general kernels do it
    monkeypatch.setenv("MMFAST_CUDA_PATH", "two_pass")
    with device.fault("refuse", "combine_kernel"), pytest.raises(RuntimeError, match="combine did not start: CUDA error 701"):
        resolve(grads())


def test_a_launch_that_hangs():
    with device.fault("hang", "persistent_kernel"):
        assert not device.busy()
        assert resolve(grads()).isnan().all()
        assert device.busy()
    assert not device.busy()


def test_no_code_for_the_device():
    with device.versions(image=False), device.chip("H100", processors=7), pytest.raises(RuntimeError, match="CUDA error 209"):
        resolve(grads())
