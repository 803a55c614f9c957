"""Every example whose package is installed runs as a reader would run it, and shows that it worked."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mmfast.plots.log import read

ROOT = Path(__file__).parent.parent
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2")
EXAMPLES = {  # what it needs, and how Python is called
    "accelerate": ("accelerate", ()),
    "ddp": ("torch", TORCHRUN),
    "fsdp2": ("torch", TORCHRUN),
    "libmtl": ("LibMTL", ()),
    "lightning": ("lightning", ()),
    "lightning_monitor": ("lightning", ()),
    "multivae": ("multivae", ()),
    "torchjd": ("torchjd", ()),
    "trainer": ("transformers", ()),
    "trainer_monitor": ("transformers", ()),
}
STAND_INS = ("libmtl", "multivae")  # they import torchvision for what is not used here


def output(name, folder=ROOT):
    package, how = EXAMPLES[name]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    paths = [str(ROOT), *([str(ROOT / "tests" / "stand_ins")] if name in STAND_INS else []), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *how, str(ROOT / f"examples/with_{name}.py")]
    for _ in range(3):
        run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False)
        if "terminate called without an active exception" not in run.stderr:
            break  # else torch's own fault: a thread of gloo that gives up its last tensor while Python ends (PyTorch issue 190489)
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name not in ("libmtl", "multivae", "torchjd") and "monitor" not in name])
def test_the_worst_task_gains(name):
    errors = dict(re.findall(r"worst task with (.*?)(?: on 2 processes)?: ([\d.]+)", output(name)))
    assert float(errors["None"]) > 0.5 and float(errors["IMTLG()"]) < 0.1, errors


@pytest.mark.parametrize("name", ["lightning_monitor", "trainer_monitor"])
def test_callbacks_of_a_monitor(name, tmp_path):
    assert float(re.findall(r"worst task: ([\d.]+)", output(name, tmp_path))[0]) < 0.1
    log = read(tmp_path / "run.csv")
    assert log.steps == [10, 20, 30, 40] and log.blocks[0].branches == ("0", "1")


def test_many_models():
    run = subprocess.run(
        [sys.executable, "examples/many_models.py"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    errors = re.findall(r"\d[\d.e-]+", run.stdout)
    assert len(errors) == 8 and all(float(error) < 0.05 for error in errors)


def test_libmtl():
    errors = re.findall(r"worst task with rep_grad=(\w+): ([\d.]+)", output("libmtl"))
    assert [name for name, _ in errors] == ["False", "True"] and all(float(error) < 0.1 for _, error in errors)


def test_multivae():
    shown = output("multivae")
    assert shown.count("mf.attach([model.decoders.bright, model.decoders.faint], mf.UPGrad())") == 2  # a block at each latent
    first, last = (float(loss) for loss in re.findall(r"loss (\d+)", shown))
    assert last < first


def test_torchjd():
    theirs, projected, ours, back = (
        [float(number) for number in numbers.split(",")] for numbers in re.findall(r"tensor\(\[(.*?)\]", output("torchjd"))
    )
    assert ours == pytest.approx(projected, abs=1e-3) and back == pytest.approx(theirs, abs=1e-3)


def test_they_are_short_and_all_are_here():
    files = sorted(path for path in (ROOT / "examples").glob("with_*.py"))
    assert [path.stem.removeprefix("with_") for path in files] == sorted(EXAMPLES)
    assert all(len(path.read_text().splitlines()) < 40 for path in files)
