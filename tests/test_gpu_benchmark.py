"""The measurements for a GPU, run on the CPU: with tiny sizes, with what torch.cuda would do stood in for, and against lines whose verdict is known."""

import inspect
import shutil
import sys
from dataclasses import replace
from time import perf_counter

import pytest
import torch

import mmfast as mf
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import launches, model, sanitize, summary
from benchmarks.gpu.cases import RULES, auto_takes
from benchmarks.gpu.device import COPIES, Gpu, Host
from benchmarks.gpu.lines import Line, Writer, read
from benchmarks.gpu.run import DRY, FULL, Run
from mmfast.backends import cuda, library

ALL = {"ceiling", "beyond", "on chip", "small", "step", "rivals", "grid", "plain"}


@pytest.fixture(autouse=True)
def _shorter(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda call, **_: call)
    for name in ("UPGrad", "CAGrad"):
        monkeypatch.delitem(RULES, name)  # which take long in plain torch
    for name in ("MMFAST_CUDA_PATH", "MMFAST_CUDA_OVERLAP"):
        monkeypatch.delenv(name, raising=False)


def run(device, seconds=600.0):
    lines = []
    Run(device, DRY, lines.append, seconds).all()
    return lines


def test_dry_run(tmp_path, capsys):
    assert command.main([str(tmp_path / "gpu.csv"), "--dry"]) == 0
    lines, env = read(tmp_path / "gpu.csv")
    assert {line.section for line in lines} == ALL and env["gpu"] == "dry run"
    assert all(line.median_us or "torchjd" in line.note for line in lines), [line for line in lines if line.note]
    for name in ("MGDA, TorchJD", "two passes, torch.compile", "MGDA, plain torch", "MGDA, no overlap"):
        assert any(line.what == f"resolve {name}" for line in lines), name
    summary.main(tmp_path)
    table = capsys.readouterr().out.partition("## Goals")[2]
    assert all(goal.name in table for goal in summary.GOALS) and "not measured" not in table


def test_without_a_gpu_it_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cuda, "why_not", lambda: "no GPU")
    assert command.main([str(tmp_path / "gpu.csv")]) == 3
    assert "no GPU" in capsys.readouterr().err


class Event:
    def __init__(self, enable_timing=False):
        assert enable_timing

    def record(self):
        self.time = perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return 1e3 * (end.time - self.time)


class Stream:
    cuda_stream = 7

    def __init__(self, *_):
        self.graph = None

    def wait_stream(self, other):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


class Graph:
    def __init__(self, *args, **kwargs):
        inspect.signature(torch.cuda.graphs.CUDAGraph.__new__).bind(None, *args, **kwargs)
        self.ready = False

    def raw_cuda_graph(self):
        return 1

    def instantiate(self):
        self.ready = True

    def replay(self):
        assert self.ready


@pytest.fixture
def gpu(monkeypatch):
    """`Gpu` over the CPU: what it asks of torch.cuda and of launches.cu is stood in for."""
    graph = torch.cuda.graph
    for name, stand_in in {
        "get_device_name": lambda: "a GPU",
        "get_device_capability": lambda: (9, 0),
        "current_device": lambda: 0,
        "current_stream": Stream,
        "synchronize": lambda: None,
        "Event": Event,
        "Stream": Stream,
        "stream": lambda stream: stream,
        "CUDAGraph": Graph,
        "graph": lambda *args, **kwargs: inspect.signature(graph.__init__).bind(None, *args, **kwargs) and Stream(),
        "get_device_properties": lambda device: type("Properties", (), {"multi_processor_count": 132}),
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(
        launches, "library", lambda architecture: type("Library", (), {"empty_cooperative": lambda self, blocks, stream: 0})()
    )
    monkeypatch.setattr(launches, "count", lambda architecture, graph: (COPIES if architecture == "sm_90" and graph == 1 else 0, 0))
    monkeypatch.setattr(cuda, "plan", lambda device, size, k, *rest: ("cluster", k * size, size, 1))
    monkeypatch.setattr(Gpu, "device", torch.device("cpu"))
    monkeypatch.setattr(Gpu, "backend", Host.backend)
    return Gpu()


def test_what_is_asked_of_torch_cuda(gpu):
    lines = run(gpu)
    assert {line.section for line in lines} == ALL
    assert not [line.note for line in lines if line.note and "torchjd" not in line.note]
    assert summary.kernels(lines)[0] == 1 and summary.synchronisations(lines)[0] == 0


def test_a_call_that_waits_is_counted_and_the_others_are_timed(gpu, monkeypatch):
    def refuses(*args, **kwargs):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", refuses)
    lines = run(gpu)
    count, where = summary.synchronisations(lines)
    assert count == 10 and "not permitted" in where  # three rules of three sizes, and LinearHeads
    assert any(line.section == "plain" and line.median_us for line in lines)


def test_a_wrong_gramian_is_not_timed(monkeypatch):
    monkeypatch.setattr(mf.ops, "gram", lambda grads, **_: torch.eye(len(grads), dtype=torch.float64))
    lines = run(Host())
    assert not [line for line in lines if line.section in ("beyond", "grid", "plain") and line.median_us]
    assert [line.note for line in lines if line.section == "beyond"] == ["wrong, nothing was timed"]


def test_it_ends_when_its_time_is_over():
    lines = run(Host(), seconds=0.0)
    assert [line.note[:18] for line in lines] == ["the time is over, "]


def test_the_largest_come_first_and_each_row_has_its_sizes():
    def size(k, n, dtype):
        return k * n * dtype.itemsize

    assert all(size(*case) > 29e6 for case in FULL.beyond)
    assert all(16e6 <= size(*case) <= 29e6 for case in FULL.on_chip)
    assert all(size(*case) <= 2 << 20 and case[0] <= 8 for case in FULL.small)
    for sizes in (FULL.beyond, FULL.on_chip, FULL.small, FULL.rivals):
        assert [size(*case) for case in sizes] == sorted((size(*case) for case in sizes), reverse=True)
    assert [n for _, n, _ in FULL.grid] == sorted((n for _, n, _ in FULL.grid), reverse=True)


def test_a_file_that_was_cut_off(tmp_path):
    path = tmp_path / "gpu.csv"
    with path.open("w", newline="") as file:
        out = Writer(file, {"gpu": "a GPU", "date": "today"})
        first = Line("small", "resolve MGDA", 3, 4096, "float32", "graph", "cluster", 5.0, kernels=1, note="a, b")
        out.add(first)
        out.add(replace(first, k=4))
    text = path.read_text()
    path.write_text(text[: len(text) - 9])
    assert read(path) == ([first], {"gpu": "a GPU", "date": "today"})
    assert summary.main(tmp_path) == 0 and summary.main(tmp_path / "..") == 0
    (tmp_path / ".." / "summary.md").unlink()


def lines_of(small, on_chip, beyond, ours):
    """A run with a copy rate of 4 MB a microsecond."""
    case = Line("small", "resolve MGDA", 3, 4096, "float32", "graph", kernels=1, planned_kernels=1, predicted_us=8.0)
    return [
        Line("ceiling", "copy", way="cold", median_us=100.0, predicted_us=100.0, path_bytes=400_000_000),
        Line("ceiling", "empty cooperative launch", way="graph", median_us=2.0, predicted_us=2.5),
        replace(case, median_us=2.5),
        replace(case, median_us=small, k=5),
        replace(case, section="on chip", way="cold", median_us=on_chip, floor_bytes=20_000_000, path_bytes=30_000_000),
        replace(case, section="beyond", way="cold", median_us=beyond, path_bytes=400_000_000),
        Line("step", "plain layer", 5, way="graph", median_us=200.0, predicted_us=200.0),
        Line("step", "LinearHeads", 5, way="graph", median_us=ours, predicted_us=208.0),
    ]


def verdicts(lines):
    return [(round(found[0], 6), goal.verdict(found[0])) for goal in summary.GOALS if (found := goal.measure(lines))]


def test_goals_are_judged():
    assert verdicts(lines_of(4.0, 5.5, 104.0, 204.0)) == [
        (1, "aim"),
        (2.0, "aim"),
        (90.909091, "aim"),
        (96.153846, "aim"),
        (1.02, "aim"),
        (0, "aim"),
    ]
    assert [word for _, word in verdicts(lines_of(4.9, 7.0, 110.0, 209.0))] == ["aim", "aim", "must", "must", "must", "aim"]
    worst = [replace(line, kernels=2) for line in lines_of(5.1, 7.5, 112.0, 211.0)]
    worst.append(Line("step", "LinearHeads", 50, way="graph", note="RuntimeError: waits"))
    assert [word for _, word in verdicts(worst)] == ["below"] * 6
    row = next(line for line in summary.goals(lines_of(4.9, 7.0, 110.0, 209.0)) if "training step" in line)
    assert "| 1.04 x | 1.04 x | 1.05 x | 1.02 x | must |" in row


def test_others_are_held_against_ours():
    case = Line("rivals", "resolve MGDA", 3, 4096, "float32", "cold", median_us=10.0)
    lines = [
        case,
        replace(case, what="resolve MGDA, TorchJD", median_us=200.0),
        replace(case, what="resolve MGDA, TorchJD", k=4),
        replace(case, what="resolve two passes, torch.compile", median_us=30.0),
        replace(case, section="plain", what="resolve MGDA, plain torch", median_us=50.0),
    ]
    ratios = [(name, found[0]) for name, measure, _ in summary.OTHERS if (found := measure(lines))]
    assert [round(ratio, 9) for _, ratio in ratios] == [20, 3, 5]


def test_the_model_is_that_of_the_notes():
    """16 to 29 MB: 6 to 8 us of floor at 4.3 MB a microsecond, and on top of it fold, barrier and solver; a cluster reads 64 KB a block in 0.7 us."""
    assert 6 + 6 < model.microseconds("persistent", 20_000_000, 5_000_000, 1, 1 << 20, 4.3e6) < 8 + 12
    assert 3 < model.microseconds("cluster", 1 << 20, 0, 1, 1 << 17, 4.3e6) - model.LAUNCH < 5
    two_pass = model.microseconds("two_pass", 400_000_000, 30_000_000, 4, 1 << 24, 4.3e6)
    assert 100 < two_pass < 115


@pytest.mark.skipif(not library.available, reason="needs the compiled CPU operators")
def test_sanitized_problems():
    """The same on the CPU twice; plain torch does not have its bits, which must show."""
    assert sanitize.check("cpu", "cpu") == 0
    outcome = sanitize.resolved(mf.MGDA(), sanitize.gradients(3, (1, 9001), torch.float32))
    assert sanitize.differs("MGDA", outcome, "reference", "cpu") and not sanitize.differs("MGDA", outcome, "cpu", "cpu")
    assert sanitize.differs("MGDA", outcome, "unheard of", "cpu")


def test_sanitizers_that_are_not_there(monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert sanitize.main(["memcheck"]) == 3
    assert "not installed" in capsys.readouterr().out


def test_each_sanitizer_runs_by_itself_and_the_worst_status_counts(tmp_path, monkeypatch, capsys):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text('#!/bin/sh\necho "$@"\n[ "$2" != racecheck ] || exit 9\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert sanitize.main(["memcheck", "racecheck"]) == 9
    said = capsys.readouterr().out
    assert "memcheck: --tool memcheck" in said and "racecheck: status 9" in said


def test_auto_takes_what_it_is_told():
    """In every operator: the training step is timed with the CUDA kernels before a GPU has proved them."""
    operators = [sys.modules[f"mmfast.ops.{name}"] for name in ("gram", "combine", "weights", "resolve", "heads", "explain")]
    before = [operator.choose for operator in operators]
    with auto_takes("cuda"):
        assert all(operator.choose(torch.device("cuda"), "auto", 3) == "cuda" for operator in operators)
        assert mf.explain([torch.ones(3)], mf.Mean(), backend="reference").backend == "reference"
    assert [operator.choose for operator in operators] == before


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_launches_compile_and_count(monkeypatch):
    monkeypatch.delenv("LD_PRELOAD", raising=False)  # nvcc does not bear the sanitizers' libraries
    built = launches.build("sm_90")
    assert built == launches.build("sm_90") and built.stat().st_size > 10_000
    with pytest.raises(RuntimeError, match="failed"):
        launches.build("sm_1")
    if not torch.cuda.is_available():
        assert launches.library("sm_90").empty_cooperative(1, None) != 0  # no device
