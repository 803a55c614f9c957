"""The command line: what works without torch, what is set before it, how commands end."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

import mmfast
from mmfast import cli, console, doctor

PACKAGE = Path(mmfast.__file__).parent


def command(*arguments, folder="", python=(), start=("-m", "mmfast")):
    """A command in a process of its own; modules in `folder` come first, and with -S what is installed beside mmfast is not there."""
    with tempfile.TemporaryDirectory() as place:
        Path(place, "mmfast").symlink_to(PACKAGE)
        environment = os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{place}"}
        environment.pop("OMP_WAIT_POLICY", None)
        return subprocess.run([sys.executable, *python, *start, *arguments], capture_output=True, text=True, env=environment, check=False)


@pytest.fixture(params=["module", "script"])
def start(request, tmp_path):
    """The two ways to start a command."""
    if request.param == "module":
        return ("-m", "mmfast")
    script = tmp_path / "bin" / "mmfast"
    script.parent.mkdir()
    script.write_text("from mmfast.cli import main\nmain()\n")
    return (str(script),)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--version"], 0, f"mmfast {mmfast.__version__}\n"),
        (["--help"], 0, "mmfast COMMAND --help"),
        (["-h"], 0, "  doctor   Prints what"),
        ([], 2, "Usage: mmfast COMMAND"),
        (["doctor"], 0, "not installed: mmfast computes nothing without it; pip install 'torch>=2.10'"),
        (["doctor", "--help"], 0, "Usage: mmfast doctor"),
        (["doctor", "now"], 2, "doctor takes --check, --thorough and --json, got now"),
        (["doctor", "--check"], 2, "nothing can be tested: ModuleNotFoundError: No module named 'torch'"),
        (["doctor", "--json"], 0, '"torch": "not installed: mmfast computes nothing'),
        (["demo"], 2, "mmfast demo needs torch, typer, rich, scikit-learn, matplotlib: pip install 'mmfast[demo]'"),
        (["train", "--help"], 2, "mmfast train needs torch, typer, rich, scipy: pip install 'mmfast[train]'"),
        (["report"], 2, "mmfast report needs torch"),
        (["plot", "--help"], 0, "usage: mmfast plot [-h] [--html] [--out OUT] csv"),
        (["plot", "run.csv"], 2, "mmfast plot needs matplotlib: pip install 'mmfast[plot]'"),
        (["dance"], 2, "there is no command 'dance'; there are demo, train, report, plot, doctor"),
    ],
)
def test_on_the_standard_library_alone(start, arguments, code, message):
    run = command(*arguments, python=("-S",), start=start)  # -S: without site-packages
    assert (run.returncode, message in run.stdout + run.stderr) == (code, True), run.stdout + run.stderr
    assert (run.stderr == "") == (code == 0 or not arguments) and "Traceback" not in run.stderr


def test_doctor_without_torch_names_all_that_is_missing():
    lines = dict(line.split(None, 1) for line in command("doctor", python=("-S",)).stdout.replace("mmfast demo", "demo").splitlines())
    assert lines["demo"] == "not available: needs typer, rich, scikit-learn, matplotlib; pip install 'mmfast[demo]'"


def test_doctor_with_a_torch_that_does_not_load(tmp_path):
    (tmp_path / "torch.py").write_text("raise OSError('libgomp.so.1: cannot open shared object file')\n")
    run = command("doctor", folder=tmp_path)
    assert run.returncode == 0 and "does not load (OSError: libgomp.so.1" in run.stdout and not run.stderr


@pytest.mark.parametrize("arguments", [[], ["--json"], ["--check"]])
def test_doctor_where_a_gpu_does_not_answer(arguments, monkeypatch, capsys):
    """It is what somebody runs then."""

    def fails(*_):
        raise RuntimeError("CUDA-capable device(s) is/are busy or unavailable")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("current_device", "get_device_name", "is_current_stream_capturing"):
        monkeypatch.setattr(torch.cuda, name, fails)
    if arguments == ["--check"]:
        with pytest.raises(SystemExit) as end:
            doctor.doctor(arguments)
        assert end.value.code == 2 and "nothing can be tested: RuntimeError: CUDA-capable device(s)" in capsys.readouterr().err
        return
    doctor.doctor(arguments)
    said = capsys.readouterr().out
    assert "does not answer: RuntimeError: CUDA-capable device(s)" in said and "mmfast demo" in said
    assert not arguments or json.loads(said)["torch"] == torch.__version__


def test_doctor_without_numpy_is_quiet(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['numpy'] = None\n")
    run = command("doctor", folder=tmp_path)
    assert run.returncode == 0 and "backend reference" in run.stdout and run.stderr == ""


def test_without_torch_the_library_says_what_it_needs():
    run = command(python=("-S",), start=("-c", "import mmfast"))
    assert "ModuleNotFoundError: mmfast needs torch: pip install 'torch>=2.10'" in run.stderr


def test_a_command_of_another_module_is_not_taken_for_ours(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "__init__.py").write_text("import mmfast\n")
    (tmp_path / "other" / "__main__.py").write_text("import mmfast\nprint(mmfast.Sum)\n")
    assert "Sum" in command("mmfast", folder=tmp_path, start=("-m", "other")).stdout


@pytest.mark.parametrize("name", ["demo", "train"])
def test_waiting_threads_do_not_spin(tmp_path, start, name):
    """The policy stands before torch loads its OpenMP."""
    (tmp_path / "torch.py").write_text("import os\nprint('torch sees', os.environ.get('OMP_WAIT_POLICY'))\nraise SystemExit\n")
    assert command(name, folder=tmp_path, start=start).stdout == "torch sees passive\n"


def test_the_users_own_policy_stays(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["mmfast", "demo"])
    monkeypatch.setattr(cli, "make_app", lambda: lambda: None)
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    cli.main()
    assert os.environ["OMP_WAIT_POLICY"] == "active"


def test_progress_is_lines_where_there_is_no_terminal(capsys, monkeypatch):
    now = 0.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    with console.Progress() as progress:
        for now in range(0, 101, 5):
            progress("slow", now, 100, "half" if now == 50 else "")
        progress("quick", 3, 3, "all")
        progress("quick", 3, 3, "all")
    assert capsys.readouterr().out.splitlines() == ["slow: 0%", "slow: 30%", "slow: 60%", "slow: 90%", "slow: 100%", "quick: 100%, all"]


def test_progress_is_bars_in_a_terminal(monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    with console.Progress() as progress:
        progress("[task]", 1, 2, "[remark]")
        progress("[task]", 2, 2, keep=False)
        (task,) = progress._bars.tasks
        assert (task.description, task.completed, task.visible) == ("[task]", 2, False)
    monkeypatch.setenv("TERM", "dumb")
    assert console.Progress()._bars is None


def test_a_script_of_ones_own_named_mmfast_has_the_library(tmp_path):
    script = tmp_path / "mmfast"
    script.write_text("import mmfast as mf\nprint(mf.MGDA())\n")
    assert command(start=(str(script),)).stdout.startswith("MGDA(")
