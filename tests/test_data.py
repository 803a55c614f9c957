"""Data sets by name: what they hold, and what is said about a file that is not as it should be."""

import gzip
import hashlib
import http.server
import threading
from dataclasses import replace

import pytest
import torch

from mmfast import data
from mmfast.data import files

SMALL = data.DataSet(
    "Small/rows.csv.gz", "", 4, "index -, size positive, grade ordinal 3, colour binary, kind categorical 3, n count, t real"
)
LINES = ["i,size,grade,colour,kind,n,t", "1,0.5,5,2,b,0,-1", "2,NA,7,1,a,3,0.25", '3,2,,1,"c",1,1e3', "4,1,6,2,a,2,nan"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MMFAST_DATA", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(data.SETS, "Small", SMALL)
    return tmp_path


def test_kinds_and_missing_cells():
    table = data.parse("Small", SMALL, LINES)
    nan = torch.nan
    expected = torch.tensor([[0.5, 0, 1, 1, 0, -1], [nan, 2, 0, 0, 3, 0.25], [2, nan, 0, 2, 1, 1000], [1, 1, 1, 0, 2, nan]])
    torch.testing.assert_close(table.x, expected.double(), equal_nan=True)
    assert [(c.name, c.kind) for c in table.columns][:3] == [("size", "positive"), ("grade", "ordinal"), ("colour", "binary")]
    assert table.columns[1].labels == ["5", "6", "7"]
    assert table.columns[3].labels == ["a", "b", "c"]
    assert [c.likelihood.n_outputs for c in table.columns] == [2, 3, 1, 3, 1, 2]


@pytest.mark.parametrize(
    "line,cells,message",
    [
        (2, "2,NA,7,1,a,3", "line 3: 6 cells, expected 7"),
        (2, "2,x,7,1,a,3,0", "column 'size', line 3: 'x' is not a number"),
        (2, "2,-1,7,1,a,3,0", "column 'size', line 3: -1 is negative"),
        (2, "2,1,8,1,a,3,0", "column 'grade', line 3: '8' is not one of 3 classes"),
        (2, "2,1,6.5,1,a,3,0", "column 'grade', line 3: '6.5' is not one of 3 classes"),
        (4, "4,1,6,2,d,2,1", "column 'kind', line 5: 'd' is not one of 3 classes"),
        (4, "4,1,6,2,a,2.5,1", "column 'n', line 5: 2.5 is not a whole number"),
        (4, "4,1,6,2,a,2,inf", "column 't', line 5: inf is not a finite number"),
        (0, None, "has 3 rows, expected 4"),
    ],
)
def test_a_malformed_file_names_the_line(line, cells, message):
    lines = LINES[:4] if cells is None else [*LINES[:line], cells, *LINES[line + 1 :]]
    with pytest.raises(data.DataError, match=message):
        data.parse("Small", SMALL, lines)


def write(folder, content):
    path = folder / SMALL.file
    path.parent.mkdir()
    path.write_bytes(content)
    return path


def test_where_files_are_found(folder, monkeypatch):
    with pytest.raises(data.DataError, match=r"Small is not here.*MMFAST_DATA"):
        data.load("Small")
    write(folder, gzip.compress("\n".join(LINES).encode()))
    assert data.load("Small").x.shape == (4, 6)
    monkeypatch.delenv("MMFAST_DATA")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "elsewhere"))
    cache = files.folders()[0]
    cache.mkdir(parents=True)
    (cache / "Small").symlink_to(folder / "Small")
    assert data.load("Small").x.shape == (4, 6)


def test_checksum_and_truncation(folder, monkeypatch):
    content = gzip.compress("\n".join(LINES).encode())
    path = write(folder, content)
    right = hashlib.sha256("\n".join(LINES).encode()).hexdigest()
    monkeypatch.setitem(data.SETS, "Small", data.DataSet(SMALL.file, right, 4, SMALL.columns))
    assert data.load("Small").x.shape == (4, 6)
    path.write_bytes(gzip.compress("\n".join(LINES[:-1]).encode()))
    with pytest.raises(data.DataError, match=f"expected {right}: it is truncated or another version"):
        data.load("Small")
    path.write_bytes(content[:-9])
    with pytest.raises(data.DataError, match="cannot be read"):
        data.load("Small")


def test_an_unknown_name_lists_the_known():
    with pytest.raises(data.DataError, match="did you mean 'Wine'"):
        data.load("wine")
    with pytest.raises(data.DataError, match="expected one of Adult, Credit"):
        data.load("nothing")


SHAPES = {
    "Adult": (32561, 12),
    "Credit": (30000, 24),
    "Wine": (6497, 13),
    "Diamonds": (53940, 10),
    "Bank": (41188, 21),
    "IMDB": (58788, 23),
    "HI": (22272, 13),
    "rwm5yr": (19609, 16),
    "labour": (15992, 9),
    "ElNino": (93935, 7),
    "Magic": (19020, 10),
    "BooNE": (130064, 50),
}


@pytest.mark.parametrize("name", [name for name in data.names() if name != "Small"])
def test_the_sets_themselves(name):
    if files.find(data.SETS[name].file) is None:
        pytest.skip(f"{name} is not in {files.folders()[0]}; set MMFAST_DATA")
    table = data.load(name)
    assert table.x.shape == SHAPES[name]
    for column, x in zip(table.columns, table.x.T, strict=True):
        x = x[~x.isnan()]
        if column.discrete:
            assert x.min() == 0
            assert x.max() < len(column.labels)
            assert (x == x.round()).all()
        elif column.kind == "count":
            assert (x == x.round()).all()
    if name == "Adult":
        assert table.x.isnan().sum() == 3686


class Handler(http.server.BaseHTTPRequestHandler):
    content, cut = b"", 0

    def do_GET(self):
        self.send_response(200 if self.path == "/rows.csv" else 404)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        self.wfile.write(self.content[: len(self.content) - self.cut])

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(folder, monkeypatch):
    """Serves LINES; Small is to be had there and nowhere else."""
    pytest.importorskip("pooch")
    monkeypatch.setattr(Handler, "content", "\r\n".join(LINES).encode())
    serving = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=serving.serve_forever, daemon=True).start()
    right = hashlib.sha256("\n".join(LINES).encode()).hexdigest()
    where = f"http://127.0.0.1:{serving.server_port}/rows.csv"
    monkeypatch.setitem(data.SETS, "Small", replace(SMALL, sha256=right, address=where))
    yield serving
    serving.shutdown()
    serving.server_close()


def test_a_set_is_downloaded_once_and_kept_in_the_cache(server, folder, monkeypatch):
    first = data.load("Small")
    server.shutdown()
    assert torch.equal(data.load("Small").x.nan_to_num(-9), first.x.nan_to_num(-9))
    assert [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()] == ["cache/mmfast/data/Small/rows.csv.gz"]


@pytest.mark.parametrize("fault", ["cut", "other", "absent", "silent", "read-only"])
def test_a_download_that_fails_leaves_nothing(server, folder, monkeypatch, fault):
    message = "is not here"
    if fault == "cut":
        monkeypatch.setattr(Handler, "cut", 5)
        message = "IncompleteRead"
    elif fault == "other":
        monkeypatch.setattr(Handler, "content", Handler.content + b"\n5")
        message = "another version of Small"
    elif fault == "absent":
        monkeypatch.setitem(data.SETS, "Small", replace(data.SETS["Small"], address=data.SETS["Small"].address + "x"))
        message = "HTTPError: 404"
    elif fault == "silent":
        server.server_close()
    else:
        (folder / "cache").write_text("")  # no folder can be made there
        message = "cannot be written"
    with pytest.raises(data.DataError, match=message):
        data.load("Small")
    assert [p for p in folder.rglob("*") if p.is_file() and p.name != "cache"] == []
