"""The self-check: what passes, what is left out, what is kept, and what it must not disturb. tests/ptx runs it on the CUDA kernels themselves."""

import contextlib
import json
import os
import subprocess
import sys
import warnings

import pytest
import torch

import mmfast as mf
from mmfast.backends import choice, cpu, cuda, ladder, library, proof, verdict
from mmfast.backends.target import Target
from mmfast.backends.verdict import Result

pytestmark = pytest.mark.skipif(not library.available, reason=f"nothing compiled to test: {library.missing_reason}")
GPU = torch.device("cuda", 0)


class Damaged:
    """The functions of a backend with one of them replaced."""

    def __init__(self, **replaced):
        self.replaced = replaced

    def __getattr__(self, name):
        return self.replaced.get(name) or getattr(cpu, name)


class Fake(Target):
    """A GPU played by the CPU operators: all paths, each of which may be made to fail in its own way."""

    exact = True
    paths = ("two_pass", "overlap", "persistent", "cluster", "per_sample", "heads", "elementwise")
    faults: dict = {}  # noqa: RUF012 of a test, by path
    climbed: list = []  # noqa: RUF012

    def __init__(self, device=GPU):
        super().__init__("cuda", ladder.CPU, Damaged(resolve=self.resolve, heads=self.heads, graddrop=self.graddrop))
        self.path = ""

    @contextlib.contextmanager
    def taking(self, path):
        self.path = path
        self.climbed.append(path)
        yield

    def _damaged(self, out):
        fault = self.faults.get(self.path)
        if isinstance(fault, Exception):
            raise fault
        if fault == "wrong":
            out.view(-1)[-1] += 1
        if fault == "die":
            os._exit(17)
        return out

    def resolve(self, *args):
        out, info = cpu.resolve(*args)
        return self._damaged(out), info

    def heads(self, *args):
        out, info = cpu.heads(*args)
        return out, self._damaged(info)

    def graddrop(self, *args):
        return self._damaged(cpu.graddrop(*args))

    def finished(self):
        return self.faults.get(self.path) != "hang"

    def alive(self):
        return "context" not in str(self.faults.get(self.path))


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A machine with one GPU, whose kernels are `Fake`; gives what was allowed of its paths."""
    allowed = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(Fake, "faults", {})
    monkeypatch.setattr(Fake, "climbed", [])
    monkeypatch.setattr(proof, "CudaTarget", Fake)
    monkeypatch.setattr(verdict, "facts", lambda device: {"library": "x"})
    monkeypatch.setattr(cuda, "why_not", lambda index=None: None)
    monkeypatch.setattr(cuda, "code", lambda index: "machine")
    monkeypatch.setattr(cuda, "allow", lambda index, paths: allowed.append(set(paths)))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(ladder, "problems", lambda path, thorough, all_of=ladder.problems: all_of(path, thorough)[:3])
    new_process(monkeypatch)
    return allowed


def new_process(monkeypatch):
    """What a process knows at its start: nothing."""
    for name in ("_serves", "_results", "_reasons"):
        monkeypatch.setattr(proof, name, {})
    monkeypatch.setattr(proof, "_told", set())
    Fake.climbed.clear()


def serving(expect=None):
    """Which backend serves what needs each path, with the warning that is expected."""
    with pytest.warns(UserWarning, match=expect) if expect else warnings.catch_warnings():
        return {needs: choice.choose(GPU, "auto", 3, needs) for needs in ("two_pass", "heads", "elementwise")}


ALL_CUDA = dict.fromkeys(("two_pass", "heads", "elementwise"), "cuda")


def test_a_device_that_passes_serves_auto_and_is_tested_once_per_machine(gpu, monkeypatch):
    assert serving() == ALL_CUDA and gpu == [set(Fake.paths)] and Fake.climbed == list(Fake.paths)
    assert serving() == ALL_CUDA and len(Fake.climbed) == len(Fake.paths)
    new_process(monkeypatch)
    assert serving() == ALL_CUDA and Fake.climbed == [] and gpu[-1] == set(Fake.paths)
    new_process(monkeypatch)
    monkeypatch.setattr(verdict, "facts", lambda device: {"library": "another build"})
    assert serving() == ALL_CUDA and Fake.climbed == list(Fake.paths)


@pytest.mark.parametrize("fault", ["wrong", RuntimeError("the CUDA kernel persistent did not start: out of resources")])
@pytest.mark.parametrize("path", Fake.paths)
def test_a_path_that_fails_is_left_out_and_said_once(path, fault, gpu, monkeypatch):
    Fake.faults[path] = fault
    why = "not the bits of the CPU|tolerance" if fault == "wrong" else "did not start"
    expected = ALL_CUDA | ({path: "reference"} if path in ALL_CUDA else {})
    assert serving(rf"leaves out the {path} kernels.*({why}).*doctor --check") == expected
    assert serving() == expected
    assert gpu == ([] if path == "two_pass" else [set(Fake.paths) - {path}])
    new_process(monkeypatch)  # it is kept, and said again
    assert serving(f"leaves out the {path} kernels") == expected and not Fake.climbed


def test_a_hang_ends_the_test_and_the_next_process_tests_the_rest(gpu, monkeypatch):
    Fake.faults["persistent"] = "hang"
    assert serving("leaves out the persistent kernels.*did not end") == ALL_CUDA | {"heads": "reference", "elementwise": "reference"}
    assert gpu == [{"two_pass", "overlap"}]  # what was not tested is not taken
    new_process(monkeypatch)
    assert serving("leaves out the persistent kernels") == ALL_CUDA
    assert Fake.climbed == ["cluster", "per_sample", "heads", "elementwise"] and gpu[-1] == set(Fake.paths) - {"persistent"}


def test_an_error_that_kills_the_context_ends_the_test(gpu, monkeypatch):
    Fake.faults["cluster"] = RuntimeError("an illegal memory access: the context is dead")
    assert serving("leaves out the cluster kernels.*illegal memory access")["heads"] == "reference"
    assert Fake.climbed == ["two_pass", "overlap", "persistent", "cluster"]
    new_process(monkeypatch)
    assert serving("leaves out the cluster kernels") == ALL_CUDA


def in_another_process(code, *faults):
    """Runs `code` after this file's `gpu` was set up there by hand, with faults by path; gives its exit status."""
    script = f"""
import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})
from unittest.mock import patch
import test_verify as t, torch
t.Fake.faults = dict({faults!r})
t.proof.CudaTarget, t.verdict.facts = t.Fake, lambda device: {{"library": "x"}}
t.cuda.why_not, t.cuda.code, t.cuda.allow = lambda index=None: None, lambda index: "machine", lambda index, paths: None
torch.cuda.is_current_stream_capturing = lambda: False
{code}
"""
    return subprocess.run([sys.executable, "-c", script], env=os.environ, check=False, capture_output=True, text=True)


def test_a_path_that_killed_its_process_is_not_tried_again(gpu, monkeypatch):
    run = in_another_process("t.choice.choose(t.GPU, 'auto', 3)", ("per_sample", "die"))
    assert run.returncode == 17, run.stderr
    assert serving("leaves out the per_sample kernels.*process that tested it before was gone") == ALL_CUDA
    assert "per_sample" not in Fake.climbed and gpu == [set(Fake.paths) - {"per_sample"}]
    assert not list((verdict.folder()).glob("*.running"))


def test_a_process_that_finds_another_testing_does_not_wait(gpu):
    with verdict.Kept({"library": "x"}).testing() as alone:
        assert alone
        assert serving() == ALL_CUDA and Fake.climbed == list(Fake.paths)  # for itself
        assert verdict.Kept({"library": "x"}).load() == {}


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"key": {"library": "x"}}', '{"key": {"library": "x"}, "results": [{"path": 3}]}',
                                  '{"key": {"library": "y"}, "results": []}', '{"key": {"library": "x"}, "results": [{"backend": "cuda", "path": "two_pass", "passed": "no"}]}'])  # fmt: skip
def test_a_damaged_file_counts_as_none(text, gpu, monkeypatch):
    serving()
    verdict.Kept({"library": "x"}).file.write_text(text)
    new_process(monkeypatch)
    assert serving() == ALL_CUDA and Fake.climbed == list(Fake.paths)
    assert verdict.Kept({"library": "x"}).load().keys() == {("cuda", path) for path in Fake.paths}


def test_where_nothing_can_be_written_a_verdict_lives_as_long_as_its_process(gpu, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # no folder can be made in it, not even by root
    assert serving() == ALL_CUDA and serving() == ALL_CUDA and Fake.climbed == list(Fake.paths)
    new_process(monkeypatch)
    assert serving() == ALL_CUDA and Fake.climbed == list(Fake.paths)


def test_nothing_is_tested_while_a_graph_is_captured(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert serving("captured.*mmfast.verify") == dict.fromkeys(ALL_CUDA, "reference") and not Fake.climbed
    assert serving() == dict.fromkeys(ALL_CUDA, "reference")  # said once
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert serving() == ALL_CUDA
    new_process(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert serving() == ALL_CUDA and not Fake.climbed  # a verdict that is kept is read


def test_nothing_is_tested_under_torch_compile(gpu):
    def serves_cuda(x):
        return x + 1 if choice.choose(GPU, "auto", 3) == "cuda" else x - 1

    compiled, x = torch.compile(serves_cuda, fullgraph=True, backend="eager"), torch.zeros(2)
    with pytest.warns(UserWarning, match="torch.compile.*mmfast.verify"):
        assert compiled(x)[0] == -1
    assert not Fake.climbed
    serving()
    torch._dynamo.reset()
    assert compiled(x)[0] == 1


@pytest.mark.parametrize("value, tests, then", [("off", 0, 0), ("force", 7, 7), ("", 7, 0)])
def test_the_environment_steers_the_test(value, tests, then, gpu, monkeypatch):
    monkeypatch.setenv("MMFAST_VERIFY", value)
    found = serving("MMFAST_VERIFY=off" if value == "off" else None)
    assert found == (dict.fromkeys(ALL_CUDA, "reference") if value == "off" else ALL_CUDA) and len(Fake.climbed) == tests
    new_process(monkeypatch)
    if value != "off":
        assert serving() == ALL_CUDA and len(Fake.climbed) == then
        monkeypatch.setenv("MMFAST_VERIFY", "off")
        new_process(monkeypatch)
        assert serving() == ALL_CUDA and not Fake.climbed  # what was kept counts


def test_a_word_that_steers_nothing_is_refused(gpu, monkeypatch):
    monkeypatch.setenv("MMFAST_VERIFY", "on")
    with pytest.raises(ValueError, match="MMFAST_VERIFY is 'on', expected off, force or nothing"):
        serving()


def test_a_device_whose_code_the_driver_must_compile_is_not_tested_unasked(gpu, monkeypatch):
    monkeypatch.setattr(cuda, "code", lambda index: "ptx")
    assert serving("compile the kernels.*mmfast.verify") == dict.fromkeys(ALL_CUDA, "reference") and not Fake.climbed


def test_where_cuda_cannot_run_triton_serves_once_it_was_verified(gpu, monkeypatch):
    monkeypatch.setattr(cuda, "why_not", lambda index=None: "built without CUDA")
    verdict.Kept({"library": "x"}).save({("cuda", "two_pass"): Result("cuda", "two_pass", True)})  # whatever it could do before
    assert serving("plain torch serves cuda:0: built without CUDA") == dict.fromkeys(ALL_CUDA, "reference")
    verdict.Kept({"library": "x"}).save(
        {("triton", path): Result("triton", path, path != "heads") for path in ("two_pass", "heads", "elementwise")}
    )
    new_process(monkeypatch)
    assert serving("leaves out the heads kernels of backend 'triton'") == {
        "two_pass": "triton",
        "heads": "reference",
        "elementwise": "triton",
    }
    assert choice.choose(GPU, "auto", 65) == "reference"  # more rows than its kernels take


def test_what_verify_finds_counts_from_then_on(gpu):
    serving()
    Fake.faults["heads"] = "wrong"
    kept = verdict.Kept({"library": "x"})
    with pytest.warns(UserWarning, match="leaves out the heads"):
        proof.replace(GPU, proof.prove(Fake(), kept, {}))
    assert serving() == ALL_CUDA | {"heads": "reference"} and not kept.load()["cuda", "heads"].passed


def test_the_caller_is_not_disturbed(gpu):
    """Its generator, modes and grad mode are as they were, and what runs sees none of them."""
    state, seen = torch.get_rng_state(), []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Watch(), torch.device("meta"), torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
        assert serving() == ALL_CUDA
        assert torch.is_inference_mode_enabled() and torch.is_autocast_enabled("cpu")
    assert torch.equal(state, torch.get_rng_state()) and not seen
    new = torch.func.vmap(lambda x: x + (choice.choose(GPU, "auto", 3) == "cuda"))(torch.zeros(2))
    assert new.tolist() == [1, 1] and torch.is_grad_enabled()


def lines_of_two_ranks(calls, folder):
    """What each of two processes prints, which are ranks of one job: lines of Python that know `rank` and `proof`."""
    script = f"""
import os, time, torch.distributed as dist
from mmfast.backends import proof
rank = int(os.environ["RANK"])
dist.init_process_group("gloo", init_method="file://" + os.environ["STORE"], rank=rank, world_size=2)
{calls}
dist.barrier()
dist.destroy_process_group()
"""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            env=os.environ | {"RANK": str(i), "STORE": str(folder / "store")},
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    return [rank.communicate(timeout=300)[0].splitlines() for rank in ranks]


def test_the_ranks_of_a_job_leave_out_what_any_of_them_does(tmp_path):
    lines = lines_of_two_ranks('print(sorted(proof.agree({"cuda cluster"} if rank else {"cuda heads"})))', tmp_path)
    assert [of[-1] for of in lines] == ["['cuda cluster', 'cuda heads']"] * 2


def test_verify_on_the_cpu_and_what_it_says(monkeypatch):
    report = mf.verify("cpu")
    assert report.passed and {r.path for r in report.results} == {"two_pass", "heads", "elementwise"}
    assert json.loads(report.to_json())["passed"] and "passed" in str(report) and "worst error" in str(report)
    monkeypatch.setattr(cpu, "resolve", lambda *args, right=cpu.resolve: (right(*args)[0] * 1.01, right(*args)[1]))
    report = mf.verify("cpu")
    assert not report.passed and "LEFT OUT: " in str(report) and "more than the tolerance" in str(report)
    with pytest.raises(ValueError, match="device is meta, expected 'cpu' or a GPU"):
        mf.verify("meta")


def test_every_problem_has_a_case_that_a_wrong_kernel_fails():
    """One number in one result, one state that does not move: seen by each rung, thorough or not."""
    for path in Fake.paths:
        for thorough in (False, True):
            for seed, problem in list(enumerate(ladder.problems(path, thorough)))[:: 5 if thorough else 1]:
                wanted = ladder.wanted(problem, cpu, seed)
                assert ladder.differences(problem, wanted, wanted, True) == (0.0, None), str(problem)
                for damaged in range(len(wanted)):
                    found = [x.clone() for x in wanted]
                    found[damaged].view(-1)[-1] += 1 + wanted[damaged].abs().max()
                    assert ladder.differences(problem, found, wanted, True)[1], (str(problem), damaged)


def test_warmup_prepares_and_moves_nothing():
    torch.manual_seed(3)
    rule = mf.PCD()
    assert mf.warmup([(3, 128, 5), (3, 7)], rule, device="cpu") >= 0
    assert rule.state is not None and not rule.state.any()
    random = mf.PCGrad()
    before = random.rng.clone()
    mf.warmup([(3, 4)], random, device="cpu")
    assert torch.equal(random.rng, before)
    with pytest.raises(ValueError, match="shapes has one without numbers"):
        mf.warmup([()], rule, device="cpu")


CALLS = """
import torch, mmfast as mf
g, x = [torch.ones(3)] * 2, torch.ones(1, 2, requires_grad=True)
for call in (lambda: mf.resolve(g, "mgda"), lambda: mf.gram(g), lambda: mf.combine(g, torch.ones(2)), lambda: mf.weights(torch.eye(2), "mgda"),
             lambda: mf.resolve(g, mf.GradDrop()), lambda: sum(o.sum() for o in mf.LinearHeads(2, [1, 1], "mgda")(x)).backward()):
    try:
        call()
        print(mf.explain(g, "mgda").backend)
    except Exception as error:
        print(error)
"""


@pytest.mark.parametrize(
    "value, said",
    [
        ("reference", "reference"),
        ("cpu", "cpu"),
        ("fast", "MMFAST_BACKEND is 'fast', expected one of"),
        ("cuda", "MMFAST_BACKEND 'cuda' is not available" if cuda.why_not() else "MMFAST_BACKEND 'cuda' needs tensors on CUDA"),
    ],
)
def test_a_backend_of_the_environment_is_that_of_calls_that_name_none(value, said):
    run = subprocess.run(
        [sys.executable, "-c", CALLS], env=os.environ | {"MMFAST_BACKEND": value}, check=True, capture_output=True, text=True
    )
    lines = run.stdout.splitlines()
    assert len(lines) == 6 and all(line.startswith(said) for line in lines), lines


def test_doctor_checks_and_speaks_json():
    run = subprocess.run(
        [sys.executable, "-m", "mmfast", "doctor", "--check", "--json"],
        env=os.environ | {"MMFAST_VERIFY": "off"},
        check=False,
        capture_output=True,
        text=True,
    )
    found = json.loads(run.stdout)
    assert run.returncode == 0 and found["check"]["passed"] and found["torch"] == torch.__version__ and found["MMFAST_VERIFY"] == "off"
    plain = subprocess.run([sys.executable, "-m", "mmfast", "doctor"], check=False, capture_output=True, text=True)
    assert plain.returncode == 0 and "backend reference" in plain.stdout and torch.__version__ in plain.stdout
