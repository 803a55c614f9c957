"""The self-check over the CUDA kernels themselves: what the stand-in device plays, "auto" leaves out."""

import contextlib
import warnings

import pytest
import torch

import mmfast as mf
from mmfast.backends import choice, cuda, ladder, proof, target, verdict
from ptx import cases, device

PATHS = ("two_pass", "overlap", "persistent", "cluster", "per_sample", "heads", "elementwise")
# of each path: a kernel, and how it is launched there
KERNELS = {
    "two_pass": ("combine_kernel", "plain"),
    "overlap": ("combine_kernel", "dependent"),
    "persistent": ("persistent_kernel", "cooperative"),
    "cluster": ("persistent_kernel", "cluster"),
    "per_sample": ("persistent_kernel", "plain"),
    "heads": ("products_kernel", "plain"),
    "elementwise": ("trimmed_kernel", "plain"),
}


class StandIn(target.Target):
    """What `target.CudaTarget` is to a GPU."""

    exact = True

    def __init__(self, place):
        super().__init__("cuda", ladder.CPU, device.functions())
        self.paths = tuple(path for path in PATHS[:5] if path in cuda.paths(place.index)) + PATHS[5:]

    @contextlib.contextmanager
    def taking(self, path):
        with target.forced(path):
            yield

    def finished(self):
        return not device.busy()

    def alive(self):
        with contextlib.suppress(RuntimeError):
            device.functions().gram([torch.ones(3)], [], None, "batch")
            return True
        return False


@pytest.fixture
def gpu(monkeypatch, tmp_path, request):
    """A machine with a GPU of the given kind, on which nothing was tested yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cuda, "_exports", device.exports)
    monkeypatch.setattr(proof, "CudaTarget", StandIn)
    monkeypatch.setattr(verdict, "facts", lambda place: {"device": str(place)})
    monkeypatch.setattr(cuda, "why_not", lambda index=None: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for name in ("_serves", "_results", "_reasons"):
        monkeypatch.setattr(proof, name, {})
    monkeypatch.setattr(proof, "_told", set())
    with device.chip(getattr(request, "param", "H100")):
        yield torch.device("cuda", device.number())
        cuda.allow(device.number(), PATHS)


def few(monkeypatch):
    """Three problems of each path: the first of them calls what the faults are in."""
    monkeypatch.setattr(
        ladder, "problems", lambda path, thorough, all_of=ladder.problems: all_of(path, thorough)[-3 if path == "elementwise" else 0 :][:3]
    )


@pytest.mark.parametrize("gpu", device.CHIPS, indirect=True)
def test_kernels_that_are_right_pass_and_serve(gpu, monkeypatch):
    if "overlap" not in cuda.paths(gpu.index) and not cases.LONG:
        few(monkeypatch)
    assert choice.choose(gpu, "auto", 3) == choice.choose(gpu, "auto", 3, "heads") == choice.choose(gpu, "auto", 3, "elementwise") == "cuda"
    results = verdict.Kept({"device": str(gpu)}).load()
    assert {path for _, path in results} >= {"two_pass", "persistent", "per_sample", "heads", "elementwise"} and all(
        r.passed for r in results.values()
    )
    assert (
        (("cuda", "cluster") in results) == (("cuda", "overlap") in results) == ("overlap" in cuda.paths(gpu.index))
    )  # A100 and L4 have neither


# a GeForce RTX 5090 in numbers, and two processors of a small GPU: what the largest problems need a path does not have there
SMALLER = {
    "clusters, 99 KB": {
        "processors": 170,
        "shared_block": 101376,
        "shared_processor": 102400,
        "capability": 120,
        "cluster": 8,
        "blocks": 24,
    },
    "two processors": {"processors": 2, "shared_block": 101376, "shared_processor": 102400, "capability": 87, "cluster": 0, "blocks": 16},
}


@pytest.mark.parametrize("numbers", SMALLER.values(), ids=SMALLER)
def test_a_path_is_tested_by_the_problems_that_a_gpu_has_room_for(numbers, monkeypatch):
    monkeypatch.setattr(cuda, "_exports", device.exports)
    with device.chip("H100", **numbers):
        there = StandIn(torch.device("cuda", device.number()))
        found = {path: proof.climb(there, path) for path in there.paths if path in ("persistent", "cluster", "per_sample")}
        assert ("cluster" in found) == (numbers["cluster"] > 0)
        for path, (result, usable) in found.items():
            assert result.passed and usable and result.problems >= 4, (path, result)
        assert min(result.problems for result, _ in found.values()) < len(ladder.problems("cluster", False))


def taken(per="batch"):
    """How a small call is launched now, of the ways that a fault can leave out."""
    device.launched()
    grads = [torch.randn(3, 4099) for _ in range(3)]
    with device.serving():
        assert torch.equal(mf.resolve(grads, mf.MGDA(), per, backend="cpu"), mf.resolve(grads, mf.MGDA(), per))
    return {(name.split()[0], name.split()[1]) for name in device.launched()}


@pytest.mark.parametrize("kind", ["wrong", "refuse", "sticky", "hang"])
@pytest.mark.parametrize("path", PATHS)
def test_a_path_that_fails_is_left_out(path, kind, gpu, monkeypatch):
    if (path, kind) == ("overlap", "refuse"):
        pytest.skip("such a launch is made again without overlap: test_cuda_launch.py")
    few(monkeypatch)
    kernel, mode = KERNELS[path]
    with device.fault(kind, kernel, mode), pytest.warns(UserWarning, match=f"leaves out the {path} kernels"):
        found = {needs: choice.choose(gpu, "auto", 3, needs) for needs in ("two_pass", "heads", "elementwise")}
    if path in found:
        assert found[path] == "reference"
    if kind in ("wrong", "refuse"):  # the others are served all the same
        assert [needs for needs, backend in found.items() if backend != "cuda"] == ([path] if path in found else [])
    if path in ("overlap", "persistent", "cluster", "per_sample"):
        assert found["two_pass"] == "cuda"
        launched = taken("sample" if path == "per_sample" else "batch")
        assert not any(kernel in name and mode == how for name, how in launched), launched
    results = verdict.Kept({"device": str(gpu)}).load()
    assert not results["cuda", path].passed and results["cuda", path].why


def test_nothing_left_out_nothing_said(gpu, monkeypatch):
    few(monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choice.choose(gpu, "auto", 3) == "cuda"
    assert any("persistent_kernel" in name and how == "cluster" for name, how in taken())
