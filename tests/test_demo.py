"""The demonstration: its data, and a run from the command line."""

import csv
import gzip
import sys

import pytest
import torch

from mmfast.models.likelihoods import Categorical

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

from typer.testing import CliRunner

from mmfast.cli import app
from mmfast.data.prepare import prepare
from mmfast.demo import data, naive, peer, report, run


def rows_of(cells, n=40):
    """A CSV of n rows; each cell is a function of the row's number."""
    return "".join(",".join(str(cell(i)) for cell in cells) + "\n" for i in range(n))


USUAL = (lambda i: 3 * i % 7 + 10, lambda i: 0.5 + i % 9)


def save(tmp_path, text, name="some.csv"):
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    return path


@pytest.mark.parametrize("name", ["some.csv", "some.csv.gz"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_kinds_are_inferred(tmp_path, name, separator):
    columns = {
        "row": lambda i: i + 1,
        "visits": lambda i: i * i % 50,
        "grade": lambda i: i % 4,
        "flag": lambda i: "yes" if i % 3 else "no",
        "city": lambda i: "ABC"[i % 3] if i % 5 else "",
        "weight": lambda i: 50.5 + i % 11,
        "change": lambda i: (i % 11) / 2 - 2 if i % 6 else "NA",
        "income": lambda i: 3000 + 17 * i % 900,
        "same": lambda i: 5,
        "comment": lambda i: f"text {i}",
        "nothing": lambda i: "?",
    }
    text = ",".join(columns) + "\n" + rows_of(columns.values())
    table = data.read_csv(save(tmp_path, text.replace(",", separator), name))
    assert {column.name: column.kind for column in table.columns} == {
        "visits": "count",
        "grade": "categorical",
        "flag": "binary",
        "city": "categorical",
        "weight": "positive",
        "change": "real",
        "income": "positive",
    }
    assert [note.split(" dropped: ")[0] for note in table.notes] == [
        "column 'row'",
        "column 'same'",
        "column 'comment'",
        "column 'nothing'",
    ]
    at = {column.name: i for i, column in enumerate(table.columns)}
    assert table.columns[at["city"]].labels == ["A", "B", "C"] and table.columns[at["flag"]].labels == ["no", "yes"]
    assert table.x[4, at["city"]] == 1 and table.x[5, at["city"]].isnan()  # row 4 is "ABC"[1]; row 5 is empty
    assert table.x.isnan().sum(0).tolist() == [0, 0, 0, 8, 0, 7, 0]


def test_types_override_inference(tmp_path):
    path = save(tmp_path, "a,b,c\n" + rows_of((*USUAL, lambda i: i % 4)))
    assert [c.kind for c in data.read_csv(path).columns] == ["count", "positive", "categorical"]
    table = data.read_csv(path, {"a": "real", "b": "categorical", "c": "count"})
    assert [c.kind for c in table.columns] == ["real", "categorical", "count"]
    assert table.columns[1].likelihood == Categorical(9)


HEAD = "a,b\n"
BAD_FILES = {
    "empty": ("", "empty"),
    "blank lines": ("\n\n", "empty"),
    "header only": (HEAD, "no rows"),
    "no header": (rows_of(USUAL), "line 1: only numbers"),
    "repeated name": ("a,a\n" + rows_of(USUAL), "line 1: the column name 'a' is used 2 times"),
    "ragged": (HEAD + rows_of(USUAL, 5) + "1,2,3\n" + rows_of(USUAL), "line 7: 3 cells, expected 2"),
    "ragged after a blank line": (HEAD + rows_of(USUAL, 5) + "\n1\n" + rows_of(USUAL), "line 8: 1 cells, expected 2"),
    "no number": (HEAD + rows_of(USUAL, 5) + "1,x2\n" + rows_of(USUAL), "line 7, column 'b': 'x2' is not a number"),
    "not finite": (HEAD + rows_of(USUAL, 5) + "1,inf\n" + rows_of(USUAL), "line 7, column 'b': inf is not a finite number"),
    "open quote": (HEAD + rows_of(USUAL) + '"1,2\n', "line 42"),
    "few rows": (HEAD + rows_of(USUAL, 7), "7 usable row"),
    "one column": ("a\n" + rows_of(USUAL[:1]), "1 usable column"),
    "constant": (
        "a,b,c\n" + rows_of((USUAL[0], lambda i: 1, lambda i: "x")),
        "1 usable column(s), at least 2 are needed; column 'b' dropped",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_malformed_files_name_the_place(tmp_path, case):
    text, message = BAD_FILES[case]
    path = save(tmp_path, text)
    with pytest.raises(data.DataError) as error:
        data.read_csv(path)
    assert message in str(error.value)
    result = CliRunner().invoke(app, ["demo", "--data", str(path), "--out", str(tmp_path / "out")])
    assert result.exit_code == 2 and message in result.output and "Traceback" not in result.output


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--data", "nowhere.csv"], "neither a file nor one of diabetes, wine"),
        (["--data", "CSV", "--types", "a"], "expected column=kind pairs"),
        (["--data", "CSV", "--types", "z=count"], "names the column 'z'"),
        (["--data", "CSV", "--types", "a=number"], "a kind is one of real, positive"),
        (["--data", "CSV", "--types", "a=binary"], "the column has 7 different values"),
        (["--data", "CSV", "--types", "b=count"], "line 2, column 'b': 0.5 is not a count"),
        (["--types", "age=count"], "--types is for a CSV file"),
        (["--rule", "pcgrab"], "PCGrad"),
    ],
)
def test_wrong_options_say_what_is_expected(tmp_path, arguments, message):
    path = save(tmp_path, HEAD + rows_of(USUAL))
    arguments = [str(path) if a == "CSV" else a for a in arguments]
    result = CliRunner().invoke(app, ["demo", *arguments, "--out", str(tmp_path / "out")])
    assert result.exit_code == 2 and message in result.output and "Traceback" not in result.output


def test_files_that_are_not_text(tmp_path):
    for name, content in (("a.csv", b"\xff\xfe\x00"), ("a.csv.gz", b"no gzip"), ("b.csv.gz", gzip.compress(HEAD.encode() * 99)[:-9])):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(data.DataError, match="cannot be read"):
            data.read_csv(tmp_path / name)


def test_both_models_start_alike():
    table = data.builtin("diabetes")
    parts = prepare(table, 0)
    a, b = (run._model(table, parts, 5, join) for join in (run.Loop, lambda heads: run.block(heads, "GradNorm")))
    own = {name: p for name, p in b.named_parameters()}
    assert all(torch.equal(p, own[name]) for name, p in a.named_parameters())


def test_looking_at_the_conflict_changes_nothing():
    parts = prepare(data.builtin("diabetes"), 0)
    model = run._model(data.builtin("diabetes"), parts, 0, run.Loop)
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    found = [run.conflict(model, parts.test) for _ in range(2)]
    assert found[0] == found[1] and model.training and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_naive_pcgrad_removes_the_conflict():
    g = torch.tensor([[1.0, 0.0], [-1.0, 1.0]])
    resolved = naive.pcgrad(g)
    expected = torch.tensor([0.5, 0.5]) + torch.tensor([0.0, 1.0])  # each minus its part along the other
    torch.testing.assert_close(resolved, expected / expected.norm() * g.sum(0).norm())


@pytest.mark.parametrize("source, rule", [("wine", "pcgrad"), ("csv", "grad-drop")])
def test_a_whole_run(tmp_path, source, rule):
    path = save(tmp_path, "a,b,c\n" + rows_of((*USUAL, lambda i: "" if i % 6 == 0 else "xyz"[i % 3]), 60))
    out = tmp_path / "out"
    choice = "wine" if source == "wine" else str(path)
    result = CliRunner().invoke(app, ["demo", "--quick", "--data", choice, "--seeds", "2", "--rule", rule, "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert all(text in result.output for text in ("1. What got better", "2. What conflicted", "3. What it costs", "What to try next"))
    assert "Better on" in result.output and "It need not fall" in result.output and "does not pay" not in result.output
    told = " ".join(result.output.split())
    assert 0 < told.index("no number below means anything") < told.index("1. What got better")
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")
    table = data.builtin("wine") if source == "wine" else data.read_csv(path)
    with (out / "errors.csv").open() as f:
        errors = list(csv.DictReader(f))
    assert [row["feature"] for row in errors] == [c.name for c in table.columns for _ in range(2)]
    assert {row["seed"] for row in errors} == {"0", "1"}
    for side in ("without_block", "with_block"):
        assert all(0 <= float(row[side]) <= (1 if "rate" in row["measure"] else float("inf")) for row in errors)
    with (out / "conflict.csv").open() as f:
        conflicts = list(csv.DictReader(f))
    assert {row["model"] for row in conflicts} == {run.WITHOUT, run.WITH}
    for row in conflicts:
        assert (
            0 <= float(row["share_in_conflict"]) <= 1 and -1 <= float(row["mean_conflicting_cosine"]) <= 0 and float(row["norm_ratio"]) >= 1
        )
        assert (row["norm_ratio_after"] != "") == (row["model"] == run.WITH and rule == "pcgrad")  # GradDrop has no weights
    with (out / "speed.csv").open() as f:
        speeds = list(csv.DictReader(f))
    assert speeds[0]["block"] == "no block" and {row["block"] for row in speeds} == {"no block", "mmfast", "TorchJD", "naive loops"}
    told = {"PCGrad"} if rule == "pcgrad" else {"GradDrop", "PCGrad"}
    assert {row["rule"] for row in speeds[1:]} == told | (set() if peer.rule("PCGrad") else {peer.COMMON})  # where TorchJD is not there
    assert all(bool(row["steps_per_second"]) != row["remark"].startswith("not installed") for row in speeds)


def test_no_relative_change_from_zero():
    assert report.change(0.0, 1.0) != report.change(0.0, 1.0)  # NaN


def outcome(seed, *errors):
    return run.Outcome(seed, torch.tensor(errors, dtype=torch.float64), 1, [1], [run.Conflict(0.5, -0.1, 2.0, None)])


@pytest.mark.parametrize(
    "without, with_block, expected",
    [
        (
            [(0.2, 0.4), (0.4, 0.4)],
            [(0.1, 0.3), (0.1, 0.5)],
            ["0.3500 without the block, 0.2500 with it: 29% lower", "2 of 2 seeds", "Better on 1 of 2 features, no better on 1: y"],
        ),
        (
            [(0.2, 0.4)],
            [(0.3, 0.4)],
            ["(one seed): 0.3000 without the block, 0.3500 with it: 17% higher", "no better on 2: x, y", "does not pay"],
        ),
        ([(0.2, 0.4)], [(float("nan"), float("nan"))], ["1 of 1 seeds have no result"]),
    ],
)
def test_the_verdict_is_what_was_measured(without, with_block, expected):
    table = data.Table("t", [data.Column("x", "real"), data.Column("y", "real")], torch.zeros(1, 2))
    outcomes = {run.WITHOUT: [outcome(i, *e) for i, e in enumerate(without)], run.WITH: [outcome(i, *e) for i, e in enumerate(with_block)]}
    text = " ".join(report.verdict(run.Result(table, run.Settings(), 1, outcomes, [])))
    for part in expected:
        assert part in text


def result_of(conflicts, speeds=(), rival=None, rule="GradNorm", k=2):
    table = data.Table("t", [data.Column(f"c{i}", "real") for i in range(k)], torch.zeros(1, k))
    outcomes = {
        name: [run.Outcome(0, torch.full((k,), 0.1), 1, [1], [c])] for name, c in zip((run.WITHOUT, run.WITH), conflicts, strict=True)
    }
    return run.Result(table, run.Settings(rule=rule), 1, outcomes, list(speeds), rival)


PLAIN = run.Conflict(0.5, -0.1, 40.0, None)


@pytest.mark.parametrize(
    "ours, rule, expected",
    [
        (run.Conflict(0.6, -0.1, 220.0, 4.0), "GradNorm", ["it rose: 50% without, 60% with", "from 220 x to 4.0 x."]),
        (run.Conflict(0.4, -0.1, 30.0, 30.0), "PCGrad", ["it fell: 50% without, 40% with", "to 30 x: PCGrad settles directions"]),
        (run.Conflict(0.5, -0.1, 30.0, None), "GradDrop", ["it stayed the same", "GradDrop decides number by number and has no weights"]),
    ],
)
def test_the_words_follow_the_numbers(ours, rule, expected):
    text = " ".join(report.explanation(result_of([PLAIN, ours], rule=rule)))
    assert "a gradient 40 times as long has 40 times the say" in text
    for part in expected:
        assert part in text


def test_the_price_and_the_rival():
    """Half the steps a second are twice the time; of TorchJD's two ways the faster, first one counts."""
    speeds = [run.Speed(run.ALONE, "", 200.0), run.Speed(run.OURS, "GradNorm", 160.0), run.Speed(run.OURS, "UPGrad", 150.0)]
    speeds += [run.Speed(run.PEER, "UPGrad", 50.0, "in the block's place"), run.Speed(run.PEER, "UPGrad", 10.0, "by its mtl_backward")]
    rival = run.Rival("UPGrad", run.Outcome(0, torch.tensor([0.1, 0.3]), 1), run.Outcome(0, torch.tensor([0.2, 0.3]), 1))
    text = " ".join(report.price(result_of([PLAIN, PLAIN], speeds, rival)))
    assert "A step with the block takes 1.25 of the time" in text and "mean error 0.2500 against 0.2000" in text
    assert "its step takes 3.00 of the time of mmfast's" in text


def test_without_torchjd_it_says_how_to_add_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchjd", None)
    monkeypatch.setitem(sys.modules, "torchjd.aggregation", None)
    assert peer.rule("PCGrad") is peer.rule("GradNorm") is None
    table = data.builtin("wine")
    found = run._contenders(table, prepare(table, 0), "GradNorm")
    assert [(label, rule) for label, rule, step, _ in found if step is None] == [("TorchJD", "UPGrad")]
    speeds = [run.Speed(label, rule, 1.0 if step else None, remark) for label, rule, step, remark in found]
    assert "TorchJD, the best known library for such rules, is not installed: pip install 'torchjd" in " ".join(
        report.price(result_of([PLAIN, PLAIN], speeds))
    )


def test_the_rule_that_both_libraries_have():
    pytest.importorskip("torchjd")
    assert [peer.rule(name) for name in ("PCGrad", "GradNorm", "UPGrad", "DBMTL")] == ["PCGrad", "UPGrad", "UPGrad", "UPGrad"]


def gradients_of(step, model, parts):
    torch.manual_seed(3)
    step(parts.train.x[:64], parts.train.seen[:64])
    return [p.grad.clone() for _, p in sorted(model.named_parameters())]


@pytest.mark.parametrize("way", ["mtl_backward", "in place"])
def test_torchjd_trains_the_same_model(way):
    """With the plain sum its gradients are those of the model's own loss; with UPGrad, in the block's place, those of our block."""
    pytest.importorskip("torchjd")
    table = data.builtin("diabetes")
    parts = prepare(table, 0)
    models = [run._model(table, parts, 0, run.Loop) for _ in range(2)]
    if way == "mtl_backward":
        steps = [run._stepper(models[0]), peer.mtl_stepper(models[1], "Sum")]
        assert peer.aggregator("Sum") is not None
    else:
        joins = [lambda heads: run.block(heads, "UPGrad"), peer.in_place("UPGrad")]
        models = [run._model(table, parts, 0, join) for join in joins]
        steps = [run._stepper(model) for model in models]
    ours, theirs = (gradients_of(step, model, parts) for step, model in zip(steps, models, strict=True))
    near = (
        1e-4 if way == "mtl_backward" else 5e-2
    )  # of 2.1e-2 that the ridge makes which TorchJD adds to the Gramian; the plain sum is off by more
    assert len(ours) == len(theirs) > 10
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() <= near * a.norm() + 1e-5


def test_torchjd_is_not_trained_on_wide_tables():
    table = data.Table("t", [data.Column(f"c{i}", "real") for i in range(run.MOST + 1)], torch.zeros(1, run.MOST + 1))
    assert run._rival(table, run.Settings(), 1, outcome(0, 0.1), lambda *_: pytest.fail("trained")) is None
