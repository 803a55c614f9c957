"""Types for people who use mmfast: the package says that it has them, and mypy finds them complete."""

import runpy
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

import mmfast as mf

pytest.importorskip("mypy")
ROOT = Path(mf.__file__).parent.parent
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def mypy(tmp_path_factory):
    """Runs mypy --strict on a file as where mmfast is an installed package, not source code that is being checked."""
    folder = tmp_path_factory.mktemp("user")
    venv.create(folder / "venv", symlinks=True)
    site = sysconfig.get_path("purelib", vars={"base": str(folder / "venv"), "platbase": str(folder / "venv")})
    Path(site, "seen.pth").write_text(f"{ROOT}\n{sysconfig.get_path('purelib')}\n")

    def run(code):
        (folder / "user.py").write_text(code)
        options = ["--strict", "--config-file=", "--cache-dir", folder / "cache", "--python-executable", folder / "venv/bin/python"]
        found = subprocess.run([sys.executable, "-m", "mypy", *options, "user.py"], cwd=folder, capture_output=True, text=True, check=False)
        return found.stdout + found.stderr

    return run


def test_a_file_that_uses_the_public_api(mypy):
    """Its lines are right, and those that are added are wrong: each is told, and no other."""
    code = (HERE / "typed_user.py").read_text()
    wrong = ["mf.resolve(grads, 3)", "mf.fork(y, '2', mf.Mean())", "mf.gram()", "mf.ImpartialityBlock(3, 'mgda')"]
    bad = mypy("\n".join([code, *wrong]))
    first = len(code.splitlines()) + 2
    assert {int(line.split(":")[1]) for line in bad.splitlines() if ": error:" in line} == set(range(first, first + len(wrong))), bad


def test_that_file_runs():
    runpy.run_path(str(HERE / "typed_user.py"))
