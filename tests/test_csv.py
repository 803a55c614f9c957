"""CSV files for the demonstration as people have them: encodings, delimiters, missing header lines, decimal commas, many columns."""

import gzip

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

import torch
from typer.testing import CliRunner

from mmfast.cli import app
from mmfast.demo import data, figure, report, run
from mmfast.models.likelihoods import Joint

ROWS = "".join(f"{3 * i % 7 + 10},{0.5 + i % 9},{'é' if i % 2 else 'ü'}\n" for i in range(40))


def save(tmp_path, text, encoding="utf-8"):
    path = tmp_path / "some.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode(encoding))
    return path


def kinds(table):
    return {column.name: column.kind for column in table.columns}


USUAL = {"größe": "count", "b": "positive", "c": "binary"}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "latin-1", "cp1252", "utf-16", "utf-16-le", "utf-32"])
def test_encodings(tmp_path, encoding):
    table = data.read_csv(save(tmp_path, "größe,b,c\n" + ROWS, encoding), encoding=encoding)
    assert kinds(table) == USUAL and table.columns[2].labels == ["é", "ü"]


@pytest.mark.parametrize(
    ("encoding", "message"),
    [
        ("latin-1", "it is not UTF-8 text (line 1); name its encoding, such as --encoding latin-1, cp1252 or utf-16"),
        ("utf-16", "its first bytes say --encoding utf-16"),
    ],
)
def test_another_encoding_is_named(tmp_path, encoding, message):
    path = save(tmp_path, "größe,b,c\n" + ROWS, encoding)
    shown = CliRunner().invoke(app, ["demo", "--data", str(path), "--out", str(tmp_path / "out")])
    assert shown.exit_code == 2 and message in shown.output and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "encoding", "message"),
    [
        ("a,b\n" + ROWS, "utf-23", "--encoding utf-23: there is no such encoding"),
        ("a,b\n" + ROWS, "utf-32", "it is not UTF-32 text"),
        (("a,b,c\n" + ROWS).replace("é", "e").replace("ü", "u").encode("utf-16-le"), "utf-8", "it holds zero bytes"),
        (b"PK\x03\x04", "utf-8", "it is a zip archive or a spreadsheet; save it as CSV"),
        (gzip.compress(b"a,b\n" * 99, mtime=0)[:-9], "utf-8", "it is not a whole gzip file"),
    ],
)
def test_what_is_no_text_is_said(tmp_path, content, encoding, message):
    with pytest.raises(data.DataError) as error:
        data.read_csv(save(tmp_path, content), encoding=encoding)
    assert message in str(error.value)


def test_a_compressed_file_is_known_by_its_bytes(tmp_path):
    assert kinds(data.read_csv(save(tmp_path, gzip.compress(("größe,b,c\n" + ROWS).encode())))) == USUAL


HEADLESS = {
    "numbers": ("10,0.5\n" + "".join(f"{i % 7},{i % 9}.5\n" for i in range(40)), "only numbers"),
    "some numbers": (ROWS, "'10' is a number like those below it"),
    "decimal commas": (ROWS.replace(",", ";").replace(".", ","), "'10' is a number like those below it"),
    "classes": ("".join(f"{'abc'[i % 3]},{'xyz'[i % 3]}\n" for i in range(40)), "every cell is a value of its column"),
    "years": ("land,2019,2020\n" + "".join(f"{'abc'[i % 3]},{i % 7},{i % 9}\n" for i in range(40)), "'2019' is a number"),
}


@pytest.mark.parametrize("case", HEADLESS)
def test_a_missing_header_line_is_noticed(tmp_path, case):
    text, message = HEADLESS[case]
    path = save(tmp_path, text)
    with pytest.raises(data.DataError) as error:
        data.read_csv(path)
    assert f"line 1: {message}" in str(error.value) and "--no-header if it is a row" in str(error.value)
    named, numbered = data.read_csv(path, header=True), data.read_csv(path, header=False)
    assert len(numbered.x) == len(named.x) + 1 == len(text.splitlines())
    assert numbered.columns[0].name == "column_1" and numbered.notes[0].startswith("no line names the columns")


def test_a_header_line_is_taken_for_one(tmp_path):
    for head in ("a,b,c", "a,,c", "10 cm,1e,x", "NA,b,é"):
        assert data.read_csv(save(tmp_path, f"{head}\n{ROWS}")).x.shape == (40, 3)


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_separators_are_counted_outside_quotes(tmp_path, separator):
    """Semicolons and commas inside names don't mislead."""
    text = f'"size, in; cm"{separator}"weight, in|kg"{separator}c\n' + ROWS.replace(",", separator)
    assert list(kinds(data.read_csv(save(tmp_path, text)))) == ["size, in; cm", "weight, in|kg", "c"]


@pytest.mark.parametrize("quoted", [False, True])
def test_decimal_commas(tmp_path, quoted):
    cells = [(f"{1000 + i},5", f"1.{100 + i},25", f"0,{i:03}", f"{i % 4}") for i in range(40)]
    cells[3] = ("NA", "1.234", "", "2")
    separator, quote = (",", '"') if quoted else (";", "")
    text = "".join(separator.join(f"{quote}{cell}{quote}" for cell in row) + "\n" for row in [("a", "b", "c", "d"), *cells])
    table = data.read_csv(save(tmp_path, text))
    assert table.x[0].tolist() == [1000.5, 1100.25, 0.0, 0.0] and table.x[3, 1] == 1234 and table.x[3, 0].isnan()
    assert kinds(table) == {"a": "positive", "b": "positive", "c": "real", "d": "categorical"}
    assert [note for note in table.notes if "decimal" in note] == [f"column '{name}' has decimal commas" for name in "abc"]


def test_commas_that_may_separate_thousands(tmp_path):
    text = "a;b\n" + "".join(f"{i % 9};{1 + i % 5},{100 + i}\n" for i in range(40))
    with pytest.raises(
        data.DataError, match=r"column 'b', line 2: '1,100' may be 1.100 or 1100; write it with a decimal point, or without"
    ):
        data.read_csv(save(tmp_path, text))


def test_more_columns_than_a_block_takes(tmp_path):
    text = ",".join(f"f{i}" for i in range(300)) + "\n"
    text += "".join(",".join(f"{(i * (j + 3)) % 11}.5" for j in range(300)) + "\n" for i in range(1, 41))
    path = save(tmp_path, text)
    table = data.read_csv(path)
    assert table.x.shape[1] == len(table.columns) == 256
    lines = show(table).splitlines()
    at = next(i for i, line in enumerate(lines) if "at most 256" in line)
    assert "of" not in lines[at][:10] and "the first 256 are used, the others left out" in lines[at]
    assert at < next(i for i, line in enumerate(lines) if "40 rows, 256 features" in line)


def show(table):
    from rich.console import Console

    console = Console(width=80)
    with console.capture() as shown:
        report.show_columns(console, table)
    return shown.get()


def result(k):
    """Errors of k features: the first gain most, the last lose most."""
    columns = [data.Column(f"cost_{i} $[red] per $[/]", "real") for i in range(k)]
    before, after = torch.full((k,), 0.5, dtype=torch.float64), torch.linspace(0.1, 0.9, k, dtype=torch.float64)
    outcomes = {
        name: [run.Outcome(0, errors, 1, [1], [run.Conflict(0.5, -0.1, 2.0, 1.5)])]
        for name, errors in ((run.WITHOUT, before), (run.WITH, after))
    }
    speeds = [run.Speed("no block", "", 100.0), run.Speed("mmfast", "GradNorm", 90.0)]
    return run.Result(data.Table("wide", columns, torch.randn(9, k)), run.Settings(), 1, outcomes, speeds)


@pytest.mark.parametrize("k", [3, 200])
def test_the_figure_can_be_read(tmp_path, k):
    """However many features: no more than 40, those with the largest changes, on a page of one size; names as they are."""
    found = result(k)
    shown = figure.shown_features(found)
    assert shown == (list(range(k))[::-1] if k == 3 else [*range(199, 179, -1), *range(19, -1, -1)])
    header = figure.draw(found, tmp_path / "demo.png").read_bytes()[16:24]
    width, height = (int.from_bytes(half, "big") for half in (header[:4], header[4:]))
    assert width == 1800 and height <= 2500


def test_names_with_brackets_are_shown_as_they_are():
    assert "cost_0 $[red] per $[/]" in show(result(3).table)
    assert len(" ".join(report.verdict(result(200)))) < 800 and "and 88 more" in " ".join(report.verdict(result(200)))


def test_the_gradients_are_those_of_each_features_loss():
    table = data.builtin("diabetes")
    parts = run.prepare(table, 0)
    model = run._model(table, parts, 0, run.Loop)
    x, seen = parts.test.x[:20], parts.test.seen[:20]
    found = run.gradients(model, x, seen)
    model.eval()
    y = model.decoder.body(model.posterior(x, seen)[0]).detach().requires_grad_()
    joint: Joint = model.joint
    losses = -(joint.log_prob(torch.cat([head(y) for head in model.decoder.heads.branches], -1), x) * seen).sum(0)
    for loss, g in zip(losses, found, strict=True):
        torch.testing.assert_close(g, torch.autograd.grad(loss, y, retain_graph=True)[0])


def test_points_beside_decimal_commas():
    """A point that separates no thousands is a decimal one, and then so are the others."""
    assert data.point_decimals({"0,436": 1, "0.776": 2, "1.234": 3}) == {"0,436": "0.436"}
    assert data.point_decimals({"1,5": 1, "1.234": 2, "12.345.678": 3}) == {"1,5": "1.5", "1.234": "1234", "12.345.678": "12345678"}
