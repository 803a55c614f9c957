"""Monitor: what it writes against the blocks' own statistics, step by step; what it must not do; where it writes."""

import csv
import math
from itertools import combinations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import mmfast as mf
from mmfast.monitor import monitor as module
from mmfast.monitor import watch

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore::FutureWarning:torch")


class Model(nn.Module):
    """A block over two layers, behind it linear heads, and three branches for attach."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(4, 6)
        self.block = mf.ImpartialityBlock(nn.ModuleDict({"image": nn.Linear(6, 5), "text": nn.Linear(6, 5)}), mf.UPGrad())
        self.deep = nn.ModuleDict({"heads": mf.LinearHeads(5, [2, 1, 3], mf.MGDA())})
        self.tails = nn.ModuleList(nn.Linear(6, 2) for _ in range(3))

    def forward(self, x, mask=None):
        y = self.encoder(x)
        both = self.block(y, mask)
        return [both["image"], *self.deep["heads"](both["text"]), *(tail(y) for tail in self.tails)]


def train(model, mask=None, x=None):
    x = torch.randn(7, 4) if x is None else x
    sum((i + 1) * (out - i).square().mean() for i, out in enumerate(model(x, mask))).backward()


def rows(path):
    with open(path, newline="") as file:
        return [{name: float(cell) for name, cell in row.items()} for row in csv.DictReader(file)]


def expected(name, seen):
    """A row's part from a block's `stats()` after each of its steps, by loops."""
    names = seen[0].names

    def mean(values):
        there = [v for v in values if not math.isnan(v)]
        return sum(there) / len(there) if there else math.nan

    row = {f"{name}/conflict_rate": mean([s.conflict_rate.item() for s in seen])}
    for i, branch in enumerate(names):
        row[f"{name}/weights/{branch}"] = mean([s.weights[i].item() if s.gram[i, i] > 0 else math.nan for s in seen])
        row[f"{name}/norms/{branch}"] = mean([s.gram[i, i].sqrt().item() if s.gram[i, i] > 0 else math.nan for s in seen])
    for i, j in combinations(range(len(names)), 2):
        row[f"{name}/cosines/{names[i]},{names[j]}"] = mean([(s.gram[i, j] / (s.gram[i, i] * s.gram[j, j]).sqrt()).item() for s in seen])
    return row


def close(row, wanted):
    assert set(wanted) <= set(row)
    for name, value in wanted.items():
        assert row[name] == pytest.approx(value, rel=1e-4, abs=1e-6, nan_ok=True), name


def test_rows_are_means_over_the_steps(tmp_path):
    model = Model()
    handle = mf.attach(model.tails, mf.IMTLG())
    blocks = {"block": model.block, "deep.heads": model.deep["heads"], "tails": handle}
    seen = {name: [] for name in blocks}
    with mf.Monitor(model, to=tmp_path / "new" / "run.csv", every=3) as monitor:
        for step in range(8):
            train(model, torch.tensor([step != 1, not 3 <= step <= 5]))  # text is missing in the second row
            monitor.step()
            for name, block in blocks.items():
                seen[name].append(block.stats())
    found = rows(tmp_path / "new" / "run.csv")
    assert [row["step"] for row in found] == [3, 6, 8]
    for row, steps in zip(found, (slice(0, 3), slice(3, 6), slice(6, 8)), strict=True):
        wanted = {key: value for name in blocks for key, value in expected(name, seen[name][steps]).items()}
        assert set(row) == {"step", *wanted}
        close(row, wanted)
    assert math.isnan(found[1]["block/weights/text"]) and not math.isnan(found[0]["block/cosines/image,text"])


class Operators(TorchDispatchMode):
    """Counts what torch computes."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **kwargs or {})


def test_nothing_is_computed_or_waited_for_between_fetches(monkeypatch):
    got = []
    model = Model()
    monitor = mf.Monitor(model, to=lambda step, values: got.append(step), every=2)
    for _ in range(2):  # the first row comes at once
        train(model)
        monitor.step()
    assert got == [2]
    monkeypatch.setattr(module, "SECONDS", 1e9)

    def refuse(*args, **kwargs):
        raise AssertionError("waits for the device")

    for _ in range(20):
        train(model)
        with Operators() as operators, pytest.MonkeyPatch.context() as patch:
            for name in ("item", "tolist", "cpu", "numpy", "to", "__bool__", "__float__", "__int__"):
                patch.setattr(torch.Tensor, name, refuse)
            monitor.step()
        assert operators.count == 0
    assert got == [2]
    monkeypatch.setattr(module, "SECONDS", -1.0)
    monkeypatch.setattr(module, "REST", 0)
    for _ in range(2):
        train(model)
        monitor.step()
    assert got == list(range(2, 25, 2))
    monitor.remove()


def test_rows_come_once_the_device_has_them(monkeypatch):
    """A fetch starts a copy; rows are written in a later step, by which it has arrived."""
    arrived, got = [], []
    monkeypatch.setattr(module.Copy, "arrived", lambda self: bool(arrived))
    monkeypatch.setattr(module, "SECONDS", -1.0)
    monkeypatch.setattr(module, "REST", 0)
    block = mf.LinearHeads(4, [1, 2], mf.MGDA())
    monitor = mf.Monitor(block, to=lambda step, values: got.append((step, values["block/norms/0"])), every=1)
    norms = []
    for _ in range(3):
        sum(out.square().sum() for out in block(torch.randn(3, 4, requires_grad=True))).backward()
        monitor.step()
        norms.append(block.stats().norms[0].item())
    assert got == []
    arrived.append(True)
    monitor.step()
    assert got == [(n + 1, pytest.approx(norm)) for n, norm in enumerate(norms)]
    monitor.remove()
    assert len(got) == 3  # the last step had no pass


def test_the_device_keeps_little(monkeypatch):
    """However long the next fetch is off, 1,000 numbers of a block are too many here."""
    monkeypatch.setattr(module, "SECONDS", 1e9)
    monkeypatch.setattr(module, "MOST_HELD", 1000)
    got = []
    block = mf.ImpartialityBlock([nn.Linear(4, 2) for _ in range(2)], mf.MGDA(), per="sample")
    monitor = mf.Monitor(block, to=lambda step, values: got.append(step), every=1)
    for _ in range(9):
        sum(out.square().sum() for out in block(torch.randn(60, 4, requires_grad=True))).backward()
        monitor.step()
    assert got == [1, 2, 3, 4, 5, 6, 7]  # 360 numbers each
    monitor.remove()


def test_a_problem_for_each_sample(tmp_path):
    block = mf.ImpartialityBlock([nn.Linear(4, 2) for _ in range(3)], mf.MGDA(), per="sample")
    with mf.Monitor(block, to=tmp_path / "run.csv", every=2) as monitor:
        for n in (5, 6):
            sum(out.square().sum() for out in block(torch.randn(n, 4, requires_grad=True))).backward()
            monitor.step()
    stats = block.stats()
    (row,) = rows(tmp_path / "run.csv")
    assert row["block/conflict_rate"] == pytest.approx(stats.conflict_rate.mean().item(), rel=1e-4)
    assert row["block/cosines/0,2"] == pytest.approx(stats.cosines[:, 0, 2].mean().item(), rel=1e-4)
    assert row["block/norms/1"] == pytest.approx(stats.norms[:, 1].mean().item(), rel=1e-4)


def test_steps_without_a_gradient_and_passes_that_accumulate(tmp_path):
    one, other = (mf.LinearHeads(4, [1, 2], mf.MGDA()) for _ in range(2))
    model = nn.ModuleList([one, other])

    def go(block):
        sum(out.square().sum() for out in block(torch.randn(3, 4, requires_grad=True))).backward()
        return block.stats()

    with mf.Monitor(model, to=tmp_path / "run.csv", every=2) as monitor:
        first = [go(one)]
        monitor.step()
        monitor.step()  # nobody
        monitor.step()
        monitor.step()  # a row in which nobody was: none
        second = [go(one)]
        monitor.step()  # of two micro-batches
        second.append(go(one))
        last = [go(other)]
        monitor.step()
    found = rows(tmp_path / "run.csv")
    assert [row["step"] for row in found] == [2, 6]
    close(found[0], expected("0", first))
    close(found[1], expected("0", second) | expected("1", last))
    assert math.isnan(found[0]["1/norms/0"]) and math.isnan(found[0]["1/conflict_rate"])


def test_gradients_that_are_no_numbers_show():
    got = []
    block = mf.LinearHeads(4, [1, 2], mf.MGDA())
    with mf.Monitor(block, to=lambda step, values: got.append(values), every=2) as monitor:
        for scale in (1.0, math.nan):
            sum(out.sum() * scale for out in block(torch.randn(3, 4, requires_grad=True))).backward()
            monitor.step()
    assert all(math.isnan(got[0][name]) for name in ("block/norms/0", "block/cosines/0,1", "block/conflict_rate"))


def test_compiled(tmp_path):
    """A compiled pass writes into the record that is there; that of a pass that was not compiled is lost to it."""
    torch._dynamo.reset()
    block = mf.LinearHeads(4, [1, 2], mf.MGDA())
    compiled, seen = torch.compile(block, fullgraph=True, backend="aot_eager"), []
    with mf.Monitor(compiled, to=tmp_path / "run.csv", every=4) as monitor:
        for step in range(8):
            call = block if step == 5 else compiled
            sum(out.square().sum() for out in call(torch.randn(3, 4, requires_grad=True))).backward()
            monitor.step()
            seen.append(block.stats())
    torch._dynamo.reset()
    first, second = rows(tmp_path / "run.csv")
    close(first, expected("block", seen[:4]))
    close(second, expected("block", [seen[n] for n in (4, 6, 7)]))


def test_a_record_that_is_written_into_without_a_sign():
    """As Inductor's code for a CPU does, which leaves the tensor's version as it is; a step without a backward pass leaves no row."""
    block, got = mf.LinearHeads(4, [1, 2], mf.MGDA()), []
    records = [mf.ops.resolve_info(torch.randn(2, 5), mf.MGDA())[1] for _ in range(3)]
    with mf.Monitor(block, to=lambda step, values: got.append((step, values["block/norms/0"])), every=1) as monitor:
        for step in range(5):
            if step not in (1, 3):
                block._info.data.copy_(records[step // 2])
            monitor.step()
    assert got == [(step, pytest.approx(records[step // 2][2].sqrt().item())) for step in (1, 3, 5)]


@pytest.mark.parametrize("per", ["batch", "sample"])
@pytest.mark.parametrize("compile", [False, True])
def test_passes_without_a_gradient_leave_no_rows(tmp_path, per, compile):
    torch._dynamo.reset()
    block, seen = mf.LinearHeads(4, [1, 2], mf.MGDA(), per=per), []

    def step(call, wanted):
        sum(out.square().sum() for out in call(torch.randn(3, 4, requires_grad=wanted))).backward()
        monitor.step()

    with mf.Monitor(block, to=tmp_path / "run.csv", every=2) as monitor:
        for wanted in (True, False, False, True, False, False, True, True):
            step(torch.compile(block, fullgraph=True, backend="aot_eager") if compile and seen else block, wanted)
            if wanted:
                seen.append(block.stats())
    torch._dynamo.reset()
    found = rows(tmp_path / "run.csv")
    kept = per == "batch" and not compile  # else the second pass of the first row takes the place of the first
    assert [row["step"] for row in found] == ([2, 4, 8] if kept else [4, 8])
    if per == "batch":
        for row, those in zip(found[-2:], (seen[1:2], seen[2:]), strict=True):
            close(row, expected("block", those))


def test_replayed_graphs(monkeypatch):
    """A replay writes into the record and leaves no sign."""
    monkeypatch.setattr(watch, "_replayable", lambda info: True)
    got = []
    block = mf.LinearHeads(4, [1, 2], mf.MGDA())
    sum(out.sum() for out in block(torch.randn(3, 4, requires_grad=True))).backward()
    monitor = mf.Monitor(block, to=lambda step, values: got.append(values["block/norms/0"]), every=3)
    for norm in (1.0, 2.0, 6.0):
        block._info.data[2] = norm**2
        monitor.step()
    monitor.remove()
    assert got == [pytest.approx(3.0)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_no_step_waits_for_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SECONDS", -1.0)
    monkeypatch.setattr(module, "REST", 0)
    model = Model().cuda()
    seen = []
    with mf.Monitor(model, to=tmp_path / "run.csv", every=1) as monitor:
        for _ in range(6):
            train(model, x=torch.randn(7, 4, device="cuda"))
            torch.cuda.set_sync_debug_mode("error")
            try:
                monitor.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            seen.append(model.block.stats())
    for row, stats in zip(rows(tmp_path / "run.csv"), seen, strict=True):
        close(row, expected("block", [stats]))


def test_ranks(tmp_path, monkeypatch):
    """The first alone writes; the others touch nothing."""
    for rank in (0, 1):
        model = Model()
        with mf.Monitor(model, to=tmp_path / f"{rank}.csv", every=1) as monitor:
            train(model)
            with monkeypatch.context() as patch:
                patch.setattr(torch.distributed, "is_initialized", lambda: True)
                patch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
                monitor.step()
            monitor.plot(tmp_path / "1.png") if rank else None
    assert [path.name for path in tmp_path.iterdir()] == ["0.csv"]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: mf.Monitor([nn.Linear(1, 1)], "run.csv"), TypeError, "model is a list, expected an nn.Module with blocks"),
        (lambda: mf.Monitor(nn.Linear(1, 1), "run.csv"), ValueError, "model is a Linear without a block, expected one with an Imp"),
        (lambda: mf.Monitor(mf.ImpartialityBlock([nn.Linear(1, 1)], mf.GradDrop()), "run.csv"), ValueError, "rules work on each element"),
        (lambda: mf.Monitor(Model(), 3), TypeError, "to is a int, expected the path of a CSV file, a SummaryWriter or a function"),
        (lambda: mf.Monitor(Model(), "."), ValueError, "to is '.', a folder, expected"),
        (lambda: mf.Monitor(Model(), "run.csv", every=0), ValueError, "every is 0, expected a whole number of at least 1"),
        (lambda: mf.Monitor(Model(), print).plot("x.png"), RuntimeError, "which keeps no rows to draw; expected a CSV file"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.filterwarnings("ignore:attached already")
def test_names():
    """Of blocks in the model, of attached ones, of one alone, of what torch.compile wraps."""
    model = Model()
    handles = [mf.attach(model.tails, mf.MGDA()), mf.attach([model.encoder, model.tails[0]], mf.MGDA())]
    names = ["block", "deep.heads", "attached", "tails"]
    assert [b.name for b in watch.blocks_of(model)] == names
    assert [b.name for b in watch.blocks_of(torch.compile(model))] == names
    assert [b.name for b in watch.blocks_of(handles[0])] == ["block"]
    model.own = handles[0]
    assert [b.name for b in watch.blocks_of(model)] == ["block", "deep.heads", "own", "attached"]
    handles[1].remove()
    assert [b.name for b in watch.blocks_of(model)] == ["block", "deep.heads", "own"]
    several = nn.ModuleList([nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)])])
    kept = [mf.attach(several[0], mf.MGDA()) for _ in range(2)]
    assert [b.name for b in watch.blocks_of(several)] == ["0", "0.2"] and kept
