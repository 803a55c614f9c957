"""Training runs: settings, the record, checkpoints and kills, the grid, and the report."""

import json
import math
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from mmfast import data
from mmfast.data.files import folders
from mmfast.demo.data import builtin
from mmfast.train import grid, published, report, results, run
from mmfast.train.results import Result
from mmfast.train.settings import Settings, SettingsError, canonical, make_resolver, settings

needs_data = pytest.mark.skipif(
    not any((folder / data.SETS["Wine"].file).is_file() for folder in folders()), reason="Wine is not here; set MMFAST_DATA"
)
TABLE = builtin("diabetes")
SHORT = Settings("elbo", "Wine", "GradNorm+PCGrad", 0, 5, 64, 1)
LONG = replace(SHORT, epochs=100)


def result(rule="none", seed=0, error=0.1, validation=None, **changes) -> Result:
    made = Settings(**{"model": "elbo", "data": "Wine", "rule": rule, "seed": seed, "epochs": 2000, "batch": 128, "samples": 1, **changes})
    return Result(made, 7, -1.0, error if validation is None else validation, error, {"a": error}, 1100.0, 1000.0, {})


def numbers(found: Result) -> tuple:
    """All but the time."""
    return found.settings, found.best_epoch, found.validation_log_likelihood, found.validation_error, found.test_error, found.test_errors


# settings


def test_settings_fill_in_the_papers_numbers():
    assert settings("elbo", "Wine") == Settings("elbo", "Wine", "none", 0, 2000, 128, 1)
    assert settings("iwae", "Adult", "pcgrad", 3) == Settings("iwae", "Adult", "PCGrad", 3, 400, 128, 20)
    assert settings("hivae", "Credit", epochs=3, batch=10) == Settings("hivae", "Credit", "none", 0, 3, 10, 1)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("None", "none"),
        ("imtlg", "IMTLG"),
        ("gradnorm + pcgrad", "GradNorm+PCGrad"),
        ("GradNorm(alpha=1.0)+PCGrad(order='random')", "GradNorm(alpha=1.0)+PCGrad(order='random')"),
    ],
)
def test_a_rule_has_one_way_to_be_written(text, expected):
    assert canonical(text) == expected == canonical(expected)
    rule = make_resolver(text)
    assert (rule is None) == (expected == "none")


def test_the_arguments_of_a_rule_arrive():
    rule = make_resolver("GradNorm(alpha=0.25)+MGDA")
    assert [type(part).__name__ for part in rule.parts] == ["GradNorm", "MGDA"] and "alpha=0.25" in repr(rule.parts[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gan", "Wine"), "model is 'gan', expected one of elbo, iwae, dreg, hivae"),
        (("elbo", "Beer"), "data is 'Beer', expected one of Adult"),
        (("elbo", "Wine", "PCGrud"), "rule is 'PCGrud': there is no resolver 'PCGrud'; did you mean PCGrad"),
        (("elbo", "Wine", "GradNorm(beta=1)"), r"rule is 'GradNorm\(beta=1\)'"),
        (("elbo", "Wine", "GradNorm(1"), r"rule is 'GradNorm\(1', expected none or rules such as"),
        (("elbo", "Wine", "__import__('os')"), "expected none or rules such as"),
        (("elbo", "Wine", "GradDrop"), "needs each gradient's elements"),
        (("elbo", "Wine", "none", 0, 0), "epochs is 0, expected at least 1"),
        (("elbo", "Wine", "none", 0, 1, 1, 5), "samples is 5, but elbo takes 1"),
    ],
)
def test_what_cannot_be_run_is_said(arguments, message):
    with pytest.raises(SettingsError, match=message):
        settings(*arguments)


def test_names_of_runs_are_unique_and_fit_for_files():
    runs = grid.table1(["elbo", "hivae"], ["Wine", "Adult"], ["none", "GradNorm", "GradNorm(alpha=1.0)"], 3)
    names = {r.name for r in runs}
    assert len(names) == len(runs) == 36 and not any(c in name for name in names for c in "/\\ ()'")
    assert replace(runs[0], epochs=5).name not in names


# the record


def test_the_record_gives_back_what_was_written(tmp_path):
    path = tmp_path / "new" / "runs.jsonl"
    written = [result(seed=s, error=0.1 * s + 1e-9) for s in range(3)]
    for one in written:
        results.append(path, one)
    assert results.read(path) == written and len(path.read_text().splitlines()) == 3
    assert json.loads(path.read_text().splitlines()[1])["settings"]["seed"] == 1


@pytest.mark.parametrize("kept", range(1, 200, 13))
def test_a_line_that_was_cut_off_harms_no_other(tmp_path, kept):
    path = tmp_path / "runs.jsonl"
    results.append(path, result(seed=0))
    path.write_bytes(path.read_bytes() + result(seed=1).line().encode()[:kept])
    assert [r.settings.seed for r in results.read(path)] == [0]
    results.append(path, result(seed=2))
    assert [r.settings.seed for r in results.read(path)] == [0, 2]


def test_a_run_counts_once(tmp_path):
    for error in (0.1, 0.2):
        results.append(tmp_path / "runs.jsonl", result(error=error))
    assert [r.test_error for r in results.read(tmp_path / "runs.jsonl")] == [0.1]


def test_a_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "runs.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(SettingsError, match="line 1: not the record of a run"):
        results.read(tmp_path / "runs.jsonl")


# a run


def test_the_same_settings_give_the_same_numbers():
    a, b = (run.train(SHORT, table=TABLE) for _ in range(2))
    assert numbers(a) == numbers(b) and a.test_errors.keys() == {c.name for c in TABLE.columns}
    assert numbers(run.train(replace(SHORT, seed=1), table=TABLE))[1:] != numbers(a)[1:]


@pytest.mark.parametrize("model", ["elbo", "iwae", "dreg", "hivae"])
@pytest.mark.parametrize("cut", [1, 4])
def test_a_run_that_was_cut_off_ends_with_the_same_numbers(tmp_path, monkeypatch, model, cut):
    monkeypatch.setattr(run, "SAVE_SECONDS", 0)
    whole = replace(SHORT, model=model, samples=3 if model in ("iwae", "dreg") else 1)

    def stop(epoch, remark):
        if epoch == cut + 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.train(whole, tmp_path / "x.pt", stop, TABLE)
    seen: list[int] = []
    found = run.train(whole, tmp_path / "x.pt", lambda epoch, remark: seen.append(epoch), TABLE)
    assert seen == list(range(cut + 1, 6))
    assert numbers(found) == numbers(run.train(whole, table=TABLE))


def test_a_checkpoint_of_another_run_is_not_taken_up(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "SAVE_SECONDS", 0)
    run.train(SHORT, tmp_path / "x.pt", table=TABLE)
    other = replace(SHORT, seed=4)
    assert numbers(run.train(other, tmp_path / "x.pt", table=TABLE)) == numbers(run.train(other, table=TABLE))


@pytest.mark.parametrize("after", [0.0, 0.13, 0.29])
def test_a_killed_process_loses_nothing(tmp_path, after):
    """SIGKILL at some moment, saving all the time."""
    code = f"""
from pathlib import Path
from mmfast.train import run
from mmfast.demo.data import builtin
from mmfast.train.settings import Settings
run.SAVE_SECONDS = 0
run.train({LONG!r}, Path({str(tmp_path / "x.pt")!r}), lambda e, r: print(e, flush=True), builtin("diabetes"))
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() + process.stdout.readline() == "1\n2\n"  # the first epoch is saved
    time.sleep(after)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL  # it was not over yet
    process.stdout.close()
    epochs: list[int] = []
    found = run.train(LONG, tmp_path / "x.pt", lambda epoch, remark: epochs.append(epoch), TABLE)
    assert epochs[0] > 1 and numbers(found) == numbers(run.train(LONG, table=TABLE))


def test_the_threads_of_torch_are_given_back():
    before = torch.get_num_threads()
    run.train(replace(SHORT, epochs=1), table=TABLE)
    assert torch.get_num_threads() == before


# the grid


@needs_data
def test_a_grid_is_trained_once(tmp_path):
    runs = grid.table1(["hivae"], ["Wine"], ["none", "GradNorm"], 1, epochs=2)
    seen: list[tuple[str, int]] = []
    arguments = (runs, tmp_path, 2, lambda r, done, remark: seen.append((r.rule, done)), pytest.fail)
    found = grid.many(*arguments)
    assert [r.settings for r in found] == runs and set(seen) == {(r.rule, e) for r in runs for e in (1, 2)}
    assert not list((tmp_path / "checkpoints").iterdir())
    seen.clear()
    again = grid.many(*arguments)
    assert again == found and seen == [(r.rule, 2) for r in runs]
    assert grid.one(runs[0], tmp_path, pytest.fail) == found[0]
    assert numbers(run.train(runs[0])) == numbers(found[0])


@needs_data
def test_a_killed_grid_goes_on(tmp_path):
    command = [
        sys.executable,
        "-m",
        "mmfast.cli",
        "train",
        "table1",
        "--model",
        "hivae",
        "--data",
        "Wine",
        "--rule",
        "none",
        "--seeds",
        "1",
    ]
    command += ["--epochs", "400", "--processes", "1", "--out", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    limit = time.monotonic() + 120
    while not list(tmp_path.glob("checkpoints/*.pt")) and time.monotonic() < limit:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(tmp_path.glob("checkpoints/*.pt")) and not (tmp_path / "runs.jsonl").exists()
    (one,) = grid.table1(["hivae"], ["Wine"], ["none"], 1, epochs=400)
    epochs: list[int] = []
    (found,) = grid.many([one], tmp_path, 1, lambda r, done, remark: epochs.append(done), pytest.fail)
    assert epochs[0] > 1 and epochs[-1] == 400
    assert numbers(found) == numbers(run.train(one))


def test_two_grids_do_not_share_a_folder(tmp_path):
    with grid._alone(tmp_path), pytest.raises(SettingsError, match="another process trains in"):
        grid.many([], tmp_path, 1, pytest.fail, pytest.fail)


def test_a_run_that_fails_is_reported_and_the_others_go_on(tmp_path, monkeypatch):
    monkeypatch.setenv("MMFAST_DATA", str(tmp_path / "nowhere"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    failures: list[tuple[Settings, str]] = []
    runs = grid.table1(["elbo"], ["Wine"], ["none", "MGDA"], 1, epochs=1)
    found = grid.many(runs, tmp_path / "out", 2, pytest.fail, lambda r, why: failures.append((r, why)))
    assert found == [] and {r for r, _ in failures} == set(runs) and all("Wine is not here" in why for _, why in failures)
    assert results.read(tmp_path / "out" / "runs.jsonl") == []


# the report


def test_the_corrected_t_test():
    # differences 1, 2, 3: mean 2, variance 1; t = 2 / sqrt(1/3 + 2/7), of which two degrees of freedom leave 1 - t / sqrt(2 + t^2) outside
    t = 2 / math.sqrt(1 / 3 + 2 / 7)
    assert report.corrected_t_test([2, 4, 6], [1, 2, 3]) == pytest.approx(1 - t / math.sqrt(2 + t * t), abs=1e-9)
    assert report.corrected_t_test([1.0], [2.0]) is None
    assert report.corrected_t_test([1, 1], [1, 1]) == 1.0 and report.corrected_t_test([2, 2], [1, 1]) == 0.0


def test_the_rule_is_chosen_on_validation_and_reported_on_test():
    runs = [result("none", s, 0.3) for s in range(3)]
    runs += [result("PCGrad", s, 0.1 + 0.01 * s, validation=0.25) for s in range(3)]  # better on test, worse on validation
    runs += [result("MGDA", s, 0.2 + 0.001 * s, validation=0.15) for s in range(3)]
    runs += [result("IMTLG", 0, 0.01, validation=0.01)]  # on one seed alone: not in the choice
    (cell,) = report.cells(runs)
    assert (cell.rule, cell.seeds, cell.plain) == ("MGDA", 3, 0.3) and cell.ours == pytest.approx(0.201)
    assert (cell.paper_plain, cell.paper_ours) == (0.086, 0.071) and cell.verdict == "better"
    assert cell.by_rule == pytest.approx({"none": 0.3, "PCGrad": 0.11, "MGDA": 0.201, "IMTLG": 0.01})
    text = report.markdown([cell])
    assert "| VAE | Wine | 2000 | 3 | 0.086 | 0.071 | 0.300 | 0.201 | MGDA |" in text and "| 1.00 ms | 1.10x |" in text


def test_a_loss_is_reported_as_one():
    (cell,) = report.cells([result("none", s, 0.1) for s in range(3)] + [result("MGDA", s, 0.2 + 0.001 * s) for s in range(3)])
    assert cell.verdict == "worse"


def test_runs_of_other_lengths_are_other_cells():
    runs = [result(rule, 0, 0.1, epochs=epochs) for rule in ("none", "MGDA") for epochs in (5, 2000)]
    assert [c.epochs for c in report.cells(runs)] == [5, 2000]
    assert report.cells([result("none"), result("none", 1)]) == []


def test_the_papers_table_is_whole():
    assert len(published.TABLE1) == 48 and published.TABLE1["hivae", "Credit"] == (0.107, 0.060)
