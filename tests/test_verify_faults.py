"""What the self-check must outlive: a device that hangs, a caller who interrupts, memory that is full, ranks that test again, a GPU beside another kind."""

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import test_verify
import torch
from test_verify import ALL_CUDA, GPU, Fake, lines_of_two_ranks, new_process, serving

import mmfast as mf
from mmfast.backends import choice, cpu, cuda, ladder, library, proof, target, verdict
from mmfast.ops import verify as verifying

pytestmark = test_verify.pytestmark
gpu = test_verify.gpu  # the fixture


def kept():
    return verdict.Kept({"library": "x"}).load()


@pytest.fixture
def started(monkeypatch):
    """The paths of the problems that were begun, in order."""
    paths = []
    for kind in (ladder.Resolve, ladder.Heads, ladder.Elementwise):

        def run(problem, functions, device, seed, run=kind.run):
            paths.extend(Fake.climbed[-1:] if isinstance(functions, test_verify.Damaged) else [])
            return run(problem, functions, device, seed)

        monkeypatch.setattr(kind, "run", run)
    return paths


@pytest.mark.parametrize("path", Fake.paths)
def test_no_problem_begins_on_a_device_that_hangs(path, gpu, started):
    """torch waits for the stream of whatever it copies from the host: for ever."""
    Fake.faults[path] = "hang"
    serving(f"leaves out the {path} kernels.*did not end within two seconds")
    assert started.count(path) == 1 and Fake.climbed[-1] == path
    assert not kept()["cuda", path].passed and kept()["cuda", path].problems == 1


@pytest.mark.parametrize("path", ["two_pass", "per_sample", "heads", "elementwise"])
def test_what_the_caller_has_begun_before_is_no_hang(path, gpu, monkeypatch):
    """With CUDA_DEVICE_MAX_CONNECTIONS=1 all streams stand in one queue, which may hold seconds of a training step."""
    queued = ["a training step"]

    class Event:
        def record(self, stream):
            pass

        def query(self):
            return not queued

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: queued.clear())
    for name in ("device", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda _: contextlib.nullcontext())
    monkeypatch.setattr(target, "PATIENCE", 0.05)
    result, usable = proof.climb(target.GpuTarget("triton", ladder.CPU, cpu), path)
    assert result.passed and usable, result


@pytest.mark.parametrize("dtype", ladder.DTYPES[:3])
def test_problems_that_a_path_does_not_take_on_a_device_are_passed_over(dtype, gpu, monkeypatch):
    """A GPU with less shared memory than the H100, say: what it takes decides."""
    assert proof.NOT_TAKEN in (Path(__file__).parent.parent / "csrc/ops_cuda.cpp").read_text()

    def resolve(self, grads, *args, right=Fake.resolve):
        if self.path == "per_sample" or (self.path == "cluster" and grads[0].dtype == dtype):
            raise RuntimeError(
                f"mmfast::resolve: the path that is forced, by MMFAST_CUDA_PATH or for this thread, {proof.NOT_TAKEN}\nand so on"
            )
        return right(self, grads, *args)

    monkeypatch.setattr(Fake, "resolve", resolve)
    assert serving("leaves out the per_sample kernels.*refused every launch") == ALL_CUDA
    assert kept()["cuda", "cluster"].passed and kept()["cuda", "cluster"].problems == 2
    assert gpu == [set(Fake.paths) - {"per_sample"}]


@pytest.mark.parametrize("path", ["two_pass", "cluster", "elementwise"])
def test_an_interrupted_test_is_no_verdict(path, gpu, monkeypatch):
    def finished(self):
        if self.path == path:
            raise KeyboardInterrupt
        return True

    with monkeypatch.context() as interrupting:
        interrupting.setattr(Fake, "finished", finished)
        with pytest.raises(KeyboardInterrupt):
            choice.choose(GPU, "auto", 3)
    assert not list(verdict.folder().glob("*.running"))
    new_process(monkeypatch)
    assert serving() == ALL_CUDA and Fake.climbed == list(Fake.paths)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 MiB"), RuntimeError("the CUDA kernel solve did not start: out of memory")])  # fmt: skip
@pytest.mark.parametrize("path", ["two_pass", "per_sample", "heads"])
def test_full_memory_is_no_verdict_for_other_processes(path, error, gpu, monkeypatch):
    Fake.faults[path] = error
    found = serving(f"leaves out the {path} kernels.*out of memory")
    assert [needs for needs, backend in found.items() if backend != "cuda"] == [path] * (path in found)
    assert kept().keys() == {("cuda", p) for p in Fake.paths if p != path}
    Fake.faults.clear()
    new_process(monkeypatch)
    assert serving() == ALL_CUDA and Fake.climbed == [path]


def test_verify_does_not_test_triton_on_a_device_that_an_error_or_a_hang_has_ended(gpu, monkeypatch):
    """Whatever it found there would be kept."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(verifying, "why_no_triton", lambda: None)
    monkeypatch.setattr(verifying, "triton_kernels", lambda: SimpleNamespace(DEVICES=("cuda", "xpu")))
    monkeypatch.setattr(verifying, "CudaTarget", Fake)
    tried = []

    def triton(name, device, functions):
        tried.append(name)
        fake = Fake()
        fake.backend, fake.paths = "triton", ("two_pass", "heads", "elementwise")
        return fake

    monkeypatch.setattr(verifying, "GpuTarget", triton)
    for fault in ("hang", RuntimeError("an illegal memory access: the context is dead")):
        Fake.faults["two_pass"] = fault
        with pytest.warns(UserWarning, match="leaves out the two_pass kernels of backend 'cuda'"):
            report = mf.verify(GPU)
        assert not tried and "no longer serves this process" in report.skipped["triton"] and kept().keys() == {("cuda", "two_pass")}
        new_process(monkeypatch)
        verdict.Kept({"library": "x"}).unmark()
    Fake.faults["two_pass"] = RuntimeError("did not start")  # the device lives
    with pytest.warns(UserWarning, match="leaves out"):
        report = mf.verify(GPU)
    assert tried == ["triton"] and not report.skipped and ("triton", "heads") in kept()


def test_what_triton_interprets_is_no_test_of_a_gpu(gpu, monkeypatch):
    """TRITON_INTERPRET: its kernels take no address of a GPU, and what they give on the CPU is no verdict for processes that compile them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(cuda, "why_not", lambda index=None: "built without CUDA")
    monkeypatch.setattr(verifying, "why_no_triton", lambda: None)
    monkeypatch.setattr(verifying, "GpuTarget", lambda *_: pytest.fail("it was tested"))
    for module in (verifying, choice):
        monkeypatch.setattr(module, "triton_kernels", lambda: SimpleNamespace(DEVICES=("cpu",)))
    report = mf.verify(GPU)
    assert "TRITON_INTERPRET" in report.skipped["triton"] and not report.results and not kept()
    new_process(monkeypatch)
    verdict.Kept({"library": "x"}).save({("triton", "two_pass"): verdict.Result("triton", "two_pass", True)})  # of another process
    assert choice.choose(GPU, "auto", 3) == "reference"
    for module in (verifying, choice):
        monkeypatch.setattr(module, "triton_kernels", lambda: SimpleNamespace(DEVICES=("cuda", "xpu")))
    assert choice.choose(GPU, "auto", 3) == "triton"


@pytest.mark.parametrize("served", [0, 1, 3])
def test_the_device_that_is_asked_for_is_looked_at_and_not_the_current_one(served, monkeypatch):
    """A machine with GPUs of two kinds: kernels have code for one of four alone."""
    exports = SimpleNamespace(mmfast_cuda_why_not=lambda device: None if device == served else b"there is no code for device %d" % device)
    monkeypatch.setattr(cuda, "_exports", lambda: exports)
    monkeypatch.setattr(cuda, "_served", set())
    monkeypatch.setattr(library, "built_with_cuda", True)
    for name in ("is_available", "is_initialized"):
        monkeypatch.setattr(torch.cuda, name, lambda: True)
    for current in range(4):
        monkeypatch.setattr(torch.cuda, "current_device", lambda current=current: current)
        assert (cuda.why_not() is None) == (current == served)
        for index in range(4):
            device = torch.device("cuda", index)
            if index == served:
                assert choice.choose(device, "cuda", 3) == "cuda"
                continue
            with pytest.raises(RuntimeError, match=f"backend 'cuda' is not available.*no code for device {index}"):
                choice.choose(device, "cuda", 3)


def test_auto_looks_at_the_device_of_the_tensors(gpu, monkeypatch):
    monkeypatch.setattr(cuda, "why_not", lambda index=None: "device 0, the current one, is too old" if not index else None)
    assert choice.choose(torch.device("cuda", 1), "auto", 3) == "cuda"
    with pytest.warns(UserWarning, match="plain torch serves cuda:0: device 0, the current one, is too old"):
        assert choice.choose(GPU, "auto", 3) == "reference"


@pytest.mark.parametrize("text", ["[" * 100_000, *(json.dumps({"key": {"library": "x"}, "results": [{"backend": "cuda", "path": "two_pass", "passed": False} | wrong]})
                                  for wrong in ({"path": "two pass"}, {"backend": 3}, {"path": ""}, {"path": None}, {"why": 3}, {"passed": 1}))])  # fmt: skip
def test_a_file_whose_parts_are_nothing_counts_as_none(text, gpu):
    verdict.Kept({"library": "x"}).file.parent.mkdir(parents=True)
    verdict.Kept({"library": "x"}).file.write_text(text)
    assert serving() == ALL_CUDA and Fake.climbed == list(Fake.paths)


AGAIN = """
for turn in range(3):  # the first call, then verify() twice: one rank is slower, and one finds more than it did
    time.sleep(0.5 * (rank == turn % 2))
    print(sorted(proof.agree({"cuda cluster"} if rank and turn == 1 else set())))
"""


def test_ranks_that_test_again_wait_for_what_the_others_find_then(tmp_path):
    assert [of[-3:] for of in lines_of_two_ranks(AGAIN, tmp_path)] == [["[]", "['cuda cluster']", "[]"]] * 2


@pytest.mark.parametrize("shapes", [(3, 128, 512), [3], "3"])
def test_warmup_of_one_shape_in_place_of_a_list_of_them_is_told(shapes):
    with pytest.raises(TypeError, match="shapes holds '?3'?, expected a list of shapes"):
        mf.warmup(shapes, mf.MGDA(), device="cpu")


def test_warmup_takes_the_random_stream_of_an_elementwise_rule_along(monkeypatch):
    """Which comes to the device on first use: a capture refuses that."""
    rule, moved = mf.GradDrop(), []
    monkeypatch.setattr(mf.GradDrop, "stream", lambda self, device, right=mf.GradDrop.stream: (moved.append(self), right(self, device))[1])
    mf.warmup([(3, 4)], rule, device="cpu")
    assert any(one is rule for one in moved) and rule.rng[1] == 0
