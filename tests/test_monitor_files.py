"""Where a Monitor writes: files that go on, TensorBoard, functions that fail, and how it ends."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import mmfast as mf
from mmfast.plots.log import LogError, columns, read


def block_of(k):
    return mf.LinearHeads(4, [1] * k, mf.MGDA())


def go(block, monitor, steps, begin=None):
    for n in range(steps):
        sum(out.square().sum() for out in block(torch.randn(3, 4, requires_grad=True))).backward()
        monitor.step(None if begin is None else begin + n)


def steps_of(path):
    return [int(line.split(",")[0]) for line in path.read_text().splitlines()[1:]]


def test_a_file_goes_on(tmp_path):
    path, block = tmp_path / "run.csv", block_of(2)
    for n in (1, 2):
        with mf.Monitor(block, to=str(path), every=2) as monitor:
            go(block, monitor, 3)
        assert steps_of(path) == [2, 3, 5, 6][: 2 * n]
    first = path.read_text().splitlines()[:3]
    with mf.Monitor(block, to=path, every=2) as monitor:  # from a checkpoint at step 4
        go(block, monitor, 4, begin=5)
    assert steps_of(path) == [2, 3, 6, 8] and path.read_text().splitlines()[:3] == first
    with path.open("a") as file:
        file.write("9,0.1,0")  # killed while it wrote
    with mf.Monitor(block, to=path, every=1) as monitor:
        go(block, monitor, 1)
    assert steps_of(path) == [2, 3, 6, 8, 9] and len(read(path).steps) == 5
    with mf.Monitor(block, to=path, every=1) as monitor:  # from the beginning
        go(block, monitor, 1, begin=1)
    assert steps_of(path) == [1]
    monitor = mf.Monitor(block, to=path, every=1)
    monitor.step()
    with pytest.warns(UserWarning, match="no block that an mmfast.Monitor watched"):
        monitor.remove()
    assert steps_of(path) == [1]


def test_a_file_of_another_model(tmp_path):
    path = tmp_path / "run.csv"
    with mf.Monitor(block := block_of(2), to=path) as monitor:
        go(block, monitor, 1)
    before = path.read_bytes()
    for other, message in (
        (block_of(3), "column 5 is 'block/norms/0', expected 'block/weights/2'"),
        (nn.ModuleList([block]), "column 2 is 'block/conflict_rate', expected '0/conflict_rate'"),
    ):
        with pytest.raises(ValueError, match=message):
            mf.Monitor(other, to=path).step()
    assert path.read_bytes() == before
    path.write_bytes(path.read_bytes().splitlines(keepends=True)[0][:-5])
    with pytest.raises(ValueError, match="delete or rename it"):
        mf.Monitor(block, to=path).step()


def test_reading_a_file(tmp_path):
    """What was written comes back; odd names too; of a long file a part that ends with its last row."""
    names = ("a,b", 'say "x"', "c/norms/d", "é")
    block = mf.ImpartialityBlock(nn.ModuleDict({name: nn.Linear(4, 1) for name in names}), mf.MGDA())
    got = []
    with (
        mf.Monitor(block, to=lambda step, values: got.append(list(values.values())), every=1) as one,
        mf.Monitor(nn.ModuleDict({"x/y": block}), to=tmp_path / "run.csv", every=1) as two,
    ):
        for _ in range(3):
            sum(out.square().sum() for out in block(torch.randn(3, 4, requires_grad=True)).values()).backward()
            one.step()
            two.step()
    log = read(tmp_path / "run.csv")
    (found,) = log.blocks
    assert (found.name, found.branches, log.steps, log.rows) == ("x/y", names, [1, 2, 3], 3)
    for n, values in enumerate(got):
        mine = [found.conflict[n], *found.weights[n], *found.norms[n], *found.cosines[n]]
        assert mine == pytest.approx(values, rel=1e-4)
    lines = (tmp_path / "run.csv").read_text().splitlines()
    body = [",".join([str(n), *lines[1].split(",")[1:]]) for n in range(1, 5002)]
    (tmp_path / "long.csv").write_text("\n".join([lines[0], *body, "5002,1"]))
    log = read(tmp_path / "long.csv")
    assert log.rows == 5001 and len(log.steps) == 1667 and log.steps[:2] == [3, 6] and log.steps[-1] == 5001


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "does not begin with a column 'step'"),
        ("step\n", "does not begin with a column 'step'"),
        ("epoch,loss\n1,2\n", "does not begin with a column 'step'"),
        ("step,loss\n1,2\n", "column 2 is 'loss', with which no block"),
        (",".join(["step", *columns("b", ["x", "y"])[:-1]]) + "\n", "column 2 is 'b/conflict_rate'"),
        (",".join(["step", *columns("b", ["x"])]) + "\n", "holds no rows yet"),
        (",".join(["step", *columns("b", ["x"])]) + "\n1,2,3,4\n2,3\n", "row 2: 2 cells, expected 4"),
        (",".join(["step", *columns("b", ["x"])]) + "\n1,2,3,z\n", "row 1: could not convert string to float: 'z'"),
    ],
)
def test_a_file_that_is_none(tmp_path, text, message):
    path = tmp_path / "run.csv"
    path.write_text(text)
    with pytest.raises(LogError, match=message):
        read(path)


class Writer:
    """As much of a SummaryWriter as is called."""

    def __init__(self):
        self.scalars, self.histograms = {}, {}

    def add_scalar(self, name, value, step):
        self.scalars[name, step] = value

    def add_histogram(self, name, values, step):
        self.histograms[name, step] = values


@pytest.mark.parametrize("k", [1, 2, 8, 9])
def test_tensorboard(k):
    """Cosines one by one, of many branches as a histogram."""
    block, writer, got = block_of(k), Writer(), []
    with mf.Monitor(block, to=writer, every=1) as one, mf.Monitor(block, to=lambda step, values: got.append(values), every=1) as two:
        sum(out.square().sum() for out in block(torch.randn(3, 4, requires_grad=True))).backward()
        one.step(7)
        two.step(7)
    cosines = {name: value for name, value in got[0].items() if "/cosines/" in name}
    shown = {(name, 7): value for name, value in got[0].items() if k <= 8 or name not in cosines}
    assert writer.scalars == pytest.approx(shown, nan_ok=True)
    if k <= 8:
        assert not writer.histograms
    else:
        assert writer.histograms["block/cosines", 7].tolist() == pytest.approx(list(cosines.values()))


def test_a_function_that_fails_stops_nothing():
    got = []

    def fails(step, values):
        got.append(step)
        raise OSError("disk full")

    block = block_of(2)
    with pytest.warns(UserWarning, match="could not write to .*: OSError: disk full"), mf.Monitor(block, to=fails, every=1) as monitor:
        go(block, monitor, 3)
    assert got == [1, 2, 3]


def test_an_exception_in_the_loop_loses_no_row(tmp_path):
    block = block_of(2)

    def loop():
        with mf.Monitor(block, to=tmp_path / "run.csv", every=4) as monitor:
            go(block, monitor, 6)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop()
    assert steps_of(tmp_path / "run.csv") == [4, 6]


def test_a_monitor_that_goes_loses_no_row(tmp_path):
    """A local of a function that trains is gone before the program ends."""

    def training(path, every):
        block = mf.ImpartialityBlock([nn.Linear(3, 1), nn.Linear(3, 2)], mf.UPGrad())
        monitor = mf.Monitor(block, to=path, every=every)
        for _ in range(7):
            sum(out.square().mean() for out in block(torch.randn(4, 3, requires_grad=True))).backward()
            monitor.step()

    training(tmp_path / "run.csv", 2)
    assert [int(step) for step in read(tmp_path / "run.csv").steps] == [2, 4, 6, 7]


def test_the_end(tmp_path):
    block = block_of(2)
    monitor = mf.Monitor(block, to=tmp_path / "run.csv")
    monitor.remove()
    monitor.remove()
    with pytest.raises(RuntimeError, match="this monitor was removed; make another one"):
        monitor.step()
    monitor = mf.Monitor(block, to=tmp_path / "run.csv")
    go(block, type("None", (), {"step": lambda self, step: None})(), 1)
    with pytest.warns(UserWarning, match="step.. of an mmfast.Monitor was never called, so it wrote nothing"):
        monitor.remove()
    assert not (tmp_path / "run.csv").exists()


SCRIPT = """
import torch, mmfast as mf
block = mf.LinearHeads(4, [1, 2], mf.MGDA())
monitor = mf.Monitor(block, to="run.csv")
for _ in range(3):
    sum(out.sum() for out in block(torch.randn(3, 4, requires_grad=True))).backward()
    monitor.step()
raise ValueError("of the user's own")
"""


def test_a_program_that_ends_loses_no_row(tmp_path):
    root = str(Path(mf.__file__).parent.parent)
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=tmp_path, env=os.environ | {"PYTHONPATH": root}, capture_output=True, text=True, check=False
    )
    assert run.stderr.strip().endswith("ValueError: of the user's own")
    assert steps_of(tmp_path / "run.csv") == [3]
