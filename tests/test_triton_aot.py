"""What Triton makes of every kernel for GPUs that are not here: it compiles, spills nothing, and how many variants there are is bounded."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import LONG

pytest.importorskip("triton", "3.6", reason="triton is not installed")
ROOT = Path(__file__).parent.parent
# bytes, of gram on sm_100 (with Triton 3.6 8 of combine) and of combine on sm_90, with the norm of four rows (with Triton 3.8 16, of eight): up to four
# registers, which the assembler gives for one more program on a processor
SPILLS = {"cuda:90": 16, "cuda:100": 24}
WARNINGS = ("-W", "error", "-W", "ignore:AnnAssign.__init__ missing:DeprecationWarning")  # of Triton 3.8 on Python 3.13


def run(folder, *arguments):
    """What Python prints, in a process of its own: in this one Triton may interpret its kernels."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *sys.path])
    environment["TRITON_CACHE_DIR"] = str(folder)
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


def ask(what, folder, *sizes):
    return [json.loads(line) for line in run(folder, *WARNINGS, "tests/triton_variants.py", what, *sizes)]


@pytest.mark.parametrize("target", ["cuda:80", "cuda:90", "cuda:100", "hip:gfx942"] if LONG else ["cuda:90"])
def test_every_kernel_compiles_and_spills_nothing(target, tmp_path):
    """Of the smallest and largest rows that each form takes; make test compiles a few."""
    found = ask(target, tmp_path)
    names = {line["kernel"].split()[0] for line in found}
    expected = {
        "few_kernel",
        "fold_kernel",
        "sums_kernel",
        "combine_kernel",
        "lengths_kernel",
        "presence_kernel",
        "graddrop_kernel",
        "trimmed_kernel",
        "log_prob_kernel",
        "log_prob_backward_kernel",
    }
    assert names >= expected | ({"many_kernel"} if LONG and target in ("cuda:90", "hip:gfx942") else set())
    for line in found:
        print(line)
        assert (
            line["spills"] <= (SPILLS.get(target, 0) if line["kernel"].startswith(("few_kernel", "combine_kernel")) else 0)
            and line["registers"] <= 255
        ), line
        assert line["shared"] <= 49152, line
        if (
            line["kernel"].startswith(("few_kernel", "combine_kernel"))
            and "masked" not in line["kernel"]
            and "unaligned" not in line["kernel"]
            and "K=8 bfloat16" not in line["kernel"]
        ):
            assert line["widest_load"] == 16, line  # aligned rows are read 16 bytes at a time


def test_few_variants_whatever_the_alignment(tmp_path):
    """375 alignments and lengths of three rows, and one with a missing row: aligned or not is all that is compiled for."""
    for counts in ask("alignments", tmp_path):
        assert counts == {"few_kernel": 2, "combine_kernel": 4, "lengths_kernel": 1, "fold_kernel": 1, "mgda": 1}


@pytest.mark.parametrize("target", ["cuda:80", "cuda:90", "cuda:100", "hip:gfx942"] if LONG else ["cuda:90"])
def test_every_solver_compiles(target, tmp_path):
    """What the assembler spills is in docs/triton.md: nothing of four rows, most of sixteen for CAGrad."""
    for line in ask(target, tmp_path, "4", *["16"] * (LONG and target == "cuda:90")):
        print(line)
        assert line["spills"] <= (0 if " K=4" in line["kernel"] else 2240), line
