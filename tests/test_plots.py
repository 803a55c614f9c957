"""Pictures of a Monitor's file: what is drawn is what the file says, at two branches and at fifty; the page needs nothing from elsewhere."""

import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from itertools import combinations
from math import isnan, nan
from pathlib import Path

import pytest
import torch
from torch import nn

import mmfast as mf
from mmfast.plots import command, figure, page
from mmfast.plots.log import BlockLog, Log

pytest.importorskip("matplotlib")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def block_log(k, rows, name="block"):
    """Random numbers; branch 1 is missing in every third row."""
    pairs = list(combinations(range(k), 2))
    there = [[not (i == 1 and t % 3 == 0) for i in range(k)] for t in range(rows)]
    return BlockLog(
        name,
        tuple(f"feature_{i}" for i in range(k)),
        torch.rand(rows).tolist(),
        [[w if ok else nan for w, ok in zip(torch.rand(k).tolist(), row, strict=True)] for row in there],
        [[w if ok else nan for w, ok in zip((10 * torch.rand(k)).exp().tolist(), row, strict=True)] for row in there],
        [[float(torch.rand(()) * 2 - 1) if row[i] and row[j] else nan for i, j in pairs] for row in there],
    )


def panels(block, steps):
    with figure.styled(13, 5) as drawn:
        figure.fill(drawn, block, steps)
        drawn.canvas.draw()
        cosines, _, *others = drawn.axes  # behind the map stands its scale
        return cosines, *others


def same(ours, theirs):
    assert [float(v) for v in ours] == pytest.approx(list(theirs), nan_ok=True)


@pytest.mark.parametrize(("k", "rows"), [(1, 3), (2, 1), (2, 30), (5, 30)])
def test_few_branches_are_lines(k, rows):
    block, steps = block_log(k, rows), list(range(10, 10 * rows + 1, 10))
    cosines, pairs, conflict, weights, norms = panels(block, steps)[:5]
    last = max(1, rows // 10)
    for n, (i, j) in enumerate(combinations(range(k), 2)):
        there = [row[n] for row in block.cosines[-last:] if not isnan(row[n])]
        shown = cosines.images[0].get_array().filled(nan)
        for value in (shown[i][j], shown[j][i]):
            assert isnan(float(value)) if not there else float(value) == pytest.approx(sum(there) / len(there))
    same(conflict.lines[0].get_ydata(), [100 * c for c in block.conflict])
    for ax, values in ((weights, block.weights), (norms, block.norms)):
        assert len(ax.lines) == k
        for i, line in enumerate(ax.lines):
            same(line.get_xdata(), steps)
            same(line.get_ydata(), [row[i] for row in values])
        assert [text.get_text() for text in ax.get_legend().get_texts()] == list(block.branches)
    if k == 2:
        same(pairs.lines[1].get_ydata(), [row[0] for row in block.cosines])
    if k == 5:  # ten pairs: their spread
        same(
            pairs.lines[1].get_ydata(),
            [torch.tensor([c for c in row if not isnan(c)], dtype=torch.float64).quantile(0.5).item() for row in block.cosines],
        )


def test_many_branches_are_a_map():
    block, steps = block_log(50, 25), list(range(25))
    axes = panels(block, steps)
    cosines, _, _, weights, norms = axes[:5]
    assert cosines.images[0].get_array().shape == (50, 50) and len(cosines.get_xticklabels()) == 25 and not cosines.texts
    for ax, values in ((weights, block.weights), (norms, block.norms)):
        shown = ax.collections[0].get_array()
        assert shown.shape == (50, 25) and not ax.get_legend()
        for i, t in ((0, 0), (49, 24), (1, 4)):
            assert float(shown[i][t]) == pytest.approx(values[t][i])
        assert bool(shown.mask[1][3]) and not bool(shown.mask[0][3])
    labels = [text.get_text() for ax in axes for text in (*ax.get_xticklabels(), *ax.get_yticklabels())]
    assert not any("mathdefault" in label for label in labels)


def test_long_runs_are_smoothed():
    values = [*torch.rand(200).tolist()]
    values[50] = nan
    half = 200 // 40
    for n in (0, 3, 50, 120, 199):
        near = [v for v in values[max(0, n - half) : n + half + 1] if not isnan(v)]
        assert figure.smooth(values)[n] == pytest.approx(sum(near) / len(near))
    block = block_log(2, 200)
    conflict = panels(block, list(range(200)))[2]
    same(conflict.lines[1].get_ydata(), figure.smooth([100 * c for c in block.conflict]))


def test_the_stats_of_a_block(tmp_path, monkeypatch):
    for per, k in (("batch", 3), ("sample", 50)):
        block = mf.ImpartialityBlock([nn.Linear(4, 2) for _ in range(k)], mf.Mean(), per=per)
        outputs = block(torch.randn(5, 4, requires_grad=True))
        sum(out.square().sum() for i, out in enumerate(outputs) if i != 1).backward()
        drawn = {}
        monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, path, drawn=drawn, **_: drawn.update({path: self}))
        stats = block.stats()
        stats.plot(tmp_path / "block.png")
        axes = drawn[str(tmp_path / "block.png")].axes
        mean = (lambda x: x.nanmean(0)) if per == "sample" else (lambda x: x)
        shown = axes[0].images[0].get_array()
        assert float(shown[0][2]) == pytest.approx(mean(stats.cosines)[0, 2].item()) and bool(shown.mask[1][0])
        for ax, wanted in zip((a for a in axes if a.patches and len(a.patches) == k), (stats.weights, stats.norms), strict=False):
            same([bar.get_width() for bar in ax.patches], mean(wanted).tolist())


class Parser(HTMLParser):
    """The tags, and what could be fetched."""

    def __init__(self):
        super().__init__()
        self.tags, self.links = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href", "data", "action") and value]


def a_log():
    return Log(list(range(1, 31)), [block_log(2, 30, "a <b> & c"), block_log(12, 30, "deep.heads")], 30)


def test_the_page_needs_nothing_else():
    text = page.page(a_log(), "run <1>.csv")
    parser = Parser()
    parser.feed(text)
    assert parser.tags.count("svg") == 2 and parser.tags.count("table") == 2
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in parser.links), parser.links
    assert not re.search(r"@import|url\((?!#)|<script|<link", text)
    assert "run &lt;1&gt;.csv" in text and "a &lt;b&gt; &amp; c" in text and "<b>" not in text
    assert text == page.page(a_log_again(), "run <1>.csv")  # the same on every run
    names = re.findall(r'id="([^"]*)"', text)
    clips = [name for name in names if len(name) > 9 and name.startswith("p")]
    assert clips and len(clips) == len(set(clips))  # of two figures in one document


def a_log_again():
    torch.manual_seed(0)
    return a_log()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_the_page_in_a_browser(tmp_path):
    """Both figures have a size, and nothing was fetched."""
    report = (
        "<script>onload = () => document.title = JSON.stringify([performance.getEntriesByType('resource').filter(e => !e.name.startsWith('data:')).length,"
        " ...[...document.querySelectorAll('.figure svg')].map(s => Math.round(s.getBoundingClientRect().width))])</script>"
    )
    path = tmp_path / "run.html"
    path.write_text(page.page(a_log(), "run.csv").replace("</body>", report + "</body>"))
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1280,800"]
    run = subprocess.run([CHROMIUM, *options, "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    fetched, *widths = map(int, re.search(r"<title>\[(.*?)\]</title>", run.stdout)[1].split(","))
    assert fetched == 0 and len(widths) == 2 and all(1000 < width < 1280 for width in widths)


def write_run(path):
    block = mf.LinearHeads(4, [1, 2], mf.MGDA())
    with mf.Monitor(block, to=path, every=1) as monitor:
        for _ in range(3):
            sum(out.square().sum() for out in block(torch.randn(3, 4, requires_grad=True))).backward()
            monitor.step()
        return monitor


def test_from_a_run_to_pictures(tmp_path, capsys):
    path = tmp_path / "run.csv"
    write_run(path).plot(path.with_suffix(".svg"))
    assert "<svg" in path.with_suffix(".svg").read_text()
    command.plot([str(path)])
    command.plot([str(path), "--html"])
    command.plot([str(path), "--out", str(tmp_path / "other.png")])
    assert capsys.readouterr().out.splitlines() == [f"Written to {tmp_path / name}" for name in ("run.png", "run.html", "other.png")]
    assert (tmp_path / "run.png").read_bytes() == (tmp_path / "other.png").read_bytes()
    assert (tmp_path / "run.png").read_bytes()[:4] == b"\x89PNG" and "<h1>run.csv</h1>" in (tmp_path / "run.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.csv"], "absent.csv: No such file or directory"),
        (["none.csv"], "none.csv does not begin with a column 'step', expected a file that mmfast.Monitor wrote"),
        (["run.csv", "--out", "run.docx"], "--out run.docx: Format 'docx' is not supported"),
        (["run.csv", "--out", "absent/run.png"], "absent/run.png: No such file or directory"),
        (["run.csv", "--html", "--out", "run.csv"], "run.csv is what is read: it would be overwritten; name another file by --out"),
        (["run.csv", "--html", "--out", "same.html"], "same.html is what is read"),
        (["run.png"], "run.png is what is read"),
        (["run.html", "--html"], "run.html is what is read"),
        (["bytes.csv"], "bytes.csv is no text in UTF-8, as mmfast.Monitor writes it"),
    ],
)
def test_what_a_command_cannot_draw(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    write_run(Path("run.csv"))
    Path("none.csv").write_text("a,b\n")
    Path("bytes.csv").write_bytes(b"step,\xff\n")
    rows = Path("run.csv").read_bytes()
    for name in ("run.png", "run.html"):  # a run in a file of another name
        Path(name).write_bytes(rows)
    Path("same.html").symlink_to("run.csv")
    with pytest.raises(SystemExit):
        command.plot(arguments)
    assert message in capsys.readouterr().err
    assert all(Path(name).read_bytes() == rows for name in ("run.csv", "run.png", "run.html"))


@pytest.mark.parametrize(("options", "written"), [([], "picture.png"), (["--html"], "picture.html")])
def test_a_picture_without_an_ending_gets_its_own(tmp_path, capsys, options, written):
    write_run(tmp_path / "run.csv")
    command.plot([str(tmp_path / "run.csv"), "--out", str(tmp_path / "picture"), *options])
    assert capsys.readouterr().out == f"Written to {tmp_path / written}\n"
    assert (tmp_path / written).is_file()


def test_without_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"a plot needs matplotlib: pip install 'mmfast\[plot\]'"):
        figure.draw(a_log(), tmp_path / "run.png")


def test_a_run_without_a_row(tmp_path):
    with (
        mf.Monitor(mf.LinearHeads(4, [1, 2], mf.MGDA()), to=tmp_path / "run.csv") as monitor,
        pytest.raises(RuntimeError, match="has no row yet"),
    ):
        monitor.plot(tmp_path / "run.png")
