"""benchmarks/gpu.sh as far as it goes without a GPU: nobody has time to mend a typing error on a machine that is lent for a quarter of an hour."""

import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu.sh"
TEXT = SCRIPT.read_text()
MINUTES = 9

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


def run(*command, **environment):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])} | environment
    return subprocess.run(command, cwd=ROOT, env=environment, check=False, capture_output=True, text=True)


def array(name):
    """The words of an array of the script, as bash reads them."""
    definition = re.search(rf"^{name}=\(.*?\)$", TEXT, re.MULTILINE | re.DOTALL)[0]
    return run("bash", "-c", f"{definition}\nprintf '%s\\0' \"${{{name}[@]}}\"").stdout.split("\0")[:-1]


def limits():
    return {
        name: int(seconds) for name, seconds in re.findall(r"\[(\w+)\]=(\d+)", re.search(r"^declare -A limit=.*$", TEXT, re.MULTILINE)[0])
    }


def test_bash_reads_it():
    done = run("bash", "-n", str(SCRIPT))
    assert done.returncode == 0, done.stderr
    if shellcheck := shutil.which("shellcheck"):
        done = run(shellcheck, str(SCRIPT))
        assert done.returncode == 0, done.stdout


def test_help():
    done = run("bash", str(SCRIPT), "--help")
    assert done.returncode == 0 and "--pack" in done.stdout and "visit.log" in done.stdout
    assert run("bash", str(SCRIPT), "--unheard-of").returncode != 0


def test_all_steps_together_take_nine_minutes():
    steps = re.findall(r"\bstep (\w+) \"\$python\"", TEXT)
    grace = int(re.search(r"^grace=(\d+)$", TEXT, re.MULTILINE)[1])
    assert list(limits()) == steps
    assert sum(limits().values()) + grace * len(steps) <= 60 * MINUTES - 4  # what is between the steps


def test_the_selections_are_there():
    """So many tests of each, collected by its own options."""
    least = {"cuda_tests": 200, "triton_tests": 90}
    if importlib.util.find_spec("triton") is None:
        del least["triton_tests"]
    calls = [[*array("pytest")[2:], "-n", "0", "--collect-only", *array(name)] for name in least]
    done = run(sys.executable, "-c", f"import pytest\nfor arguments in {calls}: assert pytest.main(arguments) == 0")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    counts = re.findall(r"^(\d+)(?:/\d+)? tests collected", done.stdout, re.MULTILINE)
    assert all(int(count) >= number for count, number in zip(counts, least.values(), strict=True)), counts


def test_what_it_runs_can_be_imported():
    modules = set(re.findall(r"-m (mmfast|benchmarks[\w.]*)", TEXT))
    assert {"benchmarks.gpu", "benchmarks.gpu.summary", "benchmarks.gpu.sanitize", "mmfast"} <= modules
    for module in [*modules, "benchmarks.gpu.__main__", "benchmarks.gpu.failures", "mmfast.__main__"]:
        assert importlib.util.find_spec(module), module
        if not module.endswith("mmfast.__main__"):
            importlib.import_module(module)


PYTHON = f"""#!/bin/sh
case "$*" in
*benchmarks.gpu.summary*) PYTHONPATH={ROOT} exec {sys.executable} "$@" ;;
*doctor*) echo "one path failed"; exit 1 ;;
*) echo "$MMFAST_BUILD $TORCH_CUDA_ARCH_LIST: $*" ;;
esac
"""


def visit(folder, python=PYTHON, gpus="9.0\\n9.0\\n", script=SCRIPT):
    """The script on a machine whose Python and nvidia-smi are shell scripts."""
    for name, text in (("python", python), ("nvidia-smi", f"#!/bin/sh\nprintf '{gpus}'\n")):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    return run("bash", str(script), str(folder / "results"), PATH=path, PYTHON=str(folder / "python"), WHEELS=str(folder))


def test_a_visit(tmp_path):
    """Every step has its turn, also behind one that fails; what it says comes into the log, how it ended into the table."""
    done = visit(tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    out = tmp_path / "results"
    lines = [line.split("\t") for line in (out / "steps.tsv").read_text().splitlines()]
    assert [(name, status) for name, status, *_ in lines] == [(name, "1" if name == "verify" else "0") for name in limits()]
    log = (out / "visit.log").read_text()
    assert "cuda 9.0: setup.py --quiet build_ext --inplace" in log and "tests/test_triton_gpu.py" in log
    table = (out / "summary.md").read_text()
    assert re.search(r"^\| verify \| \d+ \| 20 \| with status 1 \| one path failed \|$", table, re.MULTILINE)
    assert "| K N e <= 2 MB: launches |" in table and "not measured" in table
    assert done.stdout.rstrip().endswith(table.splitlines()[-1])
    assert len(list(out.iterdir())) <= 8  # so many files come back from a machine that is lent


@pytest.mark.parametrize("writable", [True, False])
def test_packages_go_where_they_can_and_what_python_finds_stays(tmp_path, monkeypatch, writable):
    """torch in a folder that is only read, packages that somebody laid down before: both come to the steps."""
    monkeypatch.setattr(sys, "path", [*sys.path, "/laid/down/before"])
    python = PYTHON.replace(
        '\n*) echo "', f'\n*sysconfig*) exit {int(not writable)} ;;\n*) echo "$PIP_BREAK_SYSTEM_PACKAGES $PATH:$PYTHONPATH '
    )
    visit(tmp_path, python)
    log = (tmp_path / "results" / "visit.log").read_text()
    site = str(ROOT / "build" / "gpu-site")
    packages, build = (re.search(rf"^##### {name}\n(.*)$", log, re.MULTILINE)[1] for name in ("packages", "build"))
    assert packages.startswith("1 ") and (f"--target {site} setuptools" in packages) == (not writable)
    assert "/laid/down/before" in build and (f"{site}/bin:" in build) == (build.count(site) == 2) == (not writable)


def test_a_step_is_cut_off_at_its_limit(tmp_path):
    short = tmp_path / "benchmarks" / "gpu.sh"
    short.parent.mkdir()
    short.write_text(re.sub(r"\[tests\]=\d+", "[tests]=1", TEXT))
    visit(tmp_path, PYTHON.replace("*doctor*)", "*test_cuda.py*) echo as far as here; sleep 30 ;;\n*doctor*)"), script=short)
    table = (tmp_path / "results" / "summary.md").read_text()
    assert re.search(r"^\| tests \| \d+ \| 1 \| CUT OFF \| as far as here \|$", table, re.MULTILINE) and "| sanitizers |" in table


@pytest.mark.parametrize("said", ["", "No devices were found\\n", "NVIDIA-SMI has failed because it could not reach the driver.\\n\\n"])
def test_no_gpu(tmp_path, said):
    done = visit(tmp_path, gpus=said)
    assert done.returncode == 3 and "nothing to visit" in done.stdout


def test_a_failure_is_told_when_it_happens(tmp_path):
    pytest.importorskip("xdist")
    (tmp_path / "test_it.py").write_text("def test_fails():\n    assert 1 == 2\n\n\ndef test_passes():\n    pass\n")
    options = array("pytest")[2:]
    done = run(sys.executable, "-m", "pytest", *options, "-n", "2", str(tmp_path / "test_it.py"), PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    told, _, report = done.stdout.partition("= FAILURES =")
    assert told.count("::test_fails") == 1 and "assert 1 == 2" in told and report, done.stdout + done.stderr
