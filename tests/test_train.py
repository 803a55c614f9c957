"""Training runs: settings, the record, checkpoints and kills, the grid, and the report."""

import functools
import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from records import result
from typer.testing import CliRunner

from mmfast import data
from mmfast.cli import app
from mmfast.data.files import find
from mmfast.demo.data import builtin
from mmfast.experiments import grid, results, run
from mmfast.experiments.results import Result
from mmfast.experiments.settings import Settings, SettingsError, canonical, make_resolver, settings

needs_data = pytest.mark.skipif(find(data.SETS["Wine"].file) is None, reason="Wine is not here; set MMFAST_DATA")
TABLE = builtin("diabetes")
SHORT = Settings("elbo", "Wine", "GradNorm+PCGrad", 0, 5, 64, 1)
LONG = replace(SHORT, epochs=100)


def numbers(found: Result) -> tuple:
    """All but the time."""
    return tuple(value for name, value in vars(found).items() if name not in ("step_us", "plain_step_us"))


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
        ("GradNorm(alpha=1)+PCGrad(order='random')", "GradNorm(alpha=1.0)+PCGrad"),
        ("PCGrad(reduction='mean')", "PCGrad(reduction='mean')"),
        ("imtl-g", "IMTLG"),
        ("GradNorm(lr=1e-5)", "GradNorm(lr=1e-05)"),
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
        (("elbo", "Wine", "none", 0, 0), "epochs is 0, expected a whole number, 1 at least"),
        (("elbo", "Wine", "none", 1.5), "seed is 1.5, expected a whole number, 0 at least"),
        (("elbo", "Wine", "none", -1), "seed is -1"),
        (("iwae", "Wine", "none", 0, 1, 9, True), "samples is True"),
        (("elbo", "Wine", "none", 0, 1, 9, 5), "samples is 5, but elbo takes 1"),
        (("elbo", "Wine", "none", 0, 1, 1), "batch is 1, expected at least 2"),
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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}\n', "line 1: not the record of a run"),
        (b"[]\n", "line 1: not the record of a run"),
        (result(model="gan").line().encode(), "line 1: there is no model 'gan' on 'Wine'"),
        (b"\xff\xfe", "cannot be read"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path, content, message):
    (tmp_path / "runs.jsonl").write_bytes(content)
    with pytest.raises(SettingsError, match=message):
        results.read(tmp_path / "runs.jsonl")


def test_a_full_disk_loses_no_run(tmp_path, monkeypatch):
    monkeypatch.setattr(Result, "line", lambda self: "x" * 100)
    checkpoint = grid.checkpoint_of(tmp_path, SHORT)
    checkpoint.parent.mkdir()
    checkpoint.touch()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60, limit[1]))
    try:
        with pytest.raises(OSError, match="only 60 of 100 bytes"):
            grid._record(tmp_path, [replace(result(), settings=SHORT)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)
    assert checkpoint.exists()


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


@pytest.mark.parametrize("after", [0.0, 0.17])
def test_a_killed_process_loses_nothing(tmp_path, after):
    """SIGKILL at some moment, saving all the time."""
    code = f"""
from pathlib import Path
from mmfast.experiments import run
from mmfast.demo.data import builtin
from mmfast.experiments.settings import Settings
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


def test_a_checkpoint_that_is_interrupted_leaves_the_old_one(tmp_path, monkeypatch):
    parts = run.prepare(TABLE, 0)
    state = run._start(run.make_model(SHORT, parts))
    state.save(tmp_path / "x.pt", SHORT)
    before = (tmp_path / "x.pt").read_bytes()

    def interrupted(saved, file):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(run.torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        state.save(tmp_path / "x.pt", SHORT)
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"] and (tmp_path / "x.pt").read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"no checkpoint", None])
def test_a_checkpoint_that_cannot_be_read_is_named(tmp_path, content):
    path = tmp_path / "x.pt"
    if content is None:  # of a model that has changed since
        torch.save({"settings": vars(SHORT), "model": {}}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(SettingsError, match="x.pt cannot be taken up .*; delete it to start this run over"):
        run.train(SHORT, path, table=TABLE)


def test_a_run_that_diverges_ends_and_says_so():
    found = run.train(replace(SHORT, rule="GradNorm(lr=1e+308)"), table=TABLE)
    assert found.epochs_done == 1 and found.best_epoch is found.test_error is found.validation_error is None
    assert json.loads(found.line())["test_errors"] == {}


def test_a_rule_that_does_not_suit_the_data_is_said():
    with pytest.raises(SettingsError, match=r"rule is 'Constant\(weights=\[1, 2\]\)': .*2"):
        run.train(replace(SHORT, rule="Constant(weights=[1, 2])"), table=TABLE)


def test_step_times_are_the_threads_own(monkeypatch):
    """A machine that works on something else meanwhile takes nothing from them."""
    step = run.State.step
    monkeypatch.setattr(run, "TIMED_STEPS", 5)
    monkeypatch.setattr(run.State, "step", lambda *arguments: (time.sleep(0.2), step(*arguments)))
    times = run._step_times(SHORT, run.prepare(TABLE, 0))
    assert all(0 < t < 2e5 for t in times)


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
    assert again == found and seen == []
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
    command += ["--epochs", "120", "--processes", "1", "--out", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    limit = time.monotonic() + 120
    while not list(tmp_path.glob("checkpoints/*.pt")) and time.monotonic() < limit:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(tmp_path.glob("checkpoints/*.pt")) and not (tmp_path / "runs.jsonl").exists()
    (one,) = grid.table1(["hivae"], ["Wine"], ["none"], 1, epochs=120)
    epochs: list[int] = []
    (found,) = grid.many([one], tmp_path, 1, lambda r, done, remark: epochs.append(done), pytest.fail)
    assert epochs[0] > 1 and epochs[-1] == 120
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


# the commands


def command(*arguments):
    return CliRunner().invoke(app, ["train", *arguments])


@needs_data
def test_a_run_and_its_report_by_command(tmp_path):
    out = ("--out", str(tmp_path / "out"))
    for rule in ("none", "imtl-g"):
        shown = command("--model", "hivae", "--rule", rule, "--epochs", "2", *out)
        assert shown.exit_code == 0 and "residual_sugar" in shown.output and "test errors at epoch" in shown.output
    again = command("--model", "hivae", "--rule", "IMTLG", "--epochs", "2", *out)
    assert again.output.splitlines()[-16:] == shown.output.splitlines()[-16:]
    assert "finished already" in again.output and "finished already" not in shown.output
    grid_of_them = ("table1", "--model", "hivae", "--data", "Wine", "--rule", "none", "--seeds", "1", "--epochs", "2", *out)
    assert "every run is finished already, nothing was trained" in command(*grid_of_them).output
    table = CliRunner().invoke(app, ["report", "table1", *out])
    assert table.exit_code == 0 and "| HI-VAE | Wine | 2, 1000, 1 | 1 | 0.126 | 0.117 |" in table.output
    assert len((tmp_path / "out" / "runs.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "gan"], "model is 'gan'"),
        (["--model", "hivae", "table1"], "--model stands before table1"),
        (["table1", "--data", "Beer"], "data is 'Beer'"),
        (["table1", "--data", "IMDB"], "IMDB is not here"),
        (["table1"], "no data set is in"),
        (["--data", "IMDB"], "IMDB is not here"),
    ],
)
def test_commands_say_what_is_wrong(tmp_path, monkeypatch, arguments, message):
    monkeypatch.setenv("MMFAST_DATA", str(tmp_path / "nowhere"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    shown = command(*arguments)
    assert shown.exit_code == 2 and message in shown.output and "Traceback" not in shown.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["table1"], "there is no mmfast-runs/runs.jsonl; mmfast train table1 --out mmfast-runs makes it"),
        (["table1", "--out", "a b"], "mmfast train table1 --out 'a b' makes it"),
        (["table1", "--out", "one"], "mmfast train --rule none --out one adds one without"),
        ([], "report needs the name of a table: mmfast report table1\n"),
        (["--out", "x"], "report needs the name of a table: mmfast report table1 --out x\n"),
        (["--out", "x", "table1"], "--out stands before table1"),
    ],
)
def test_a_report_of_nothing_names_the_command_that_is_missing(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    results.append(tmp_path / "one" / "runs.jsonl", result("MGDA"))
    shown = CliRunner().invoke(app, ["report", *arguments])
    assert shown.exit_code == 2 and message in shown.output


@pytest.mark.parametrize("saved", [False, True])
def test_ctrl_c_says_how_to_go_on(tmp_path, monkeypatch, saved):
    def interrupted(one, folder, tick):
        if saved:
            grid.checkpoint_of(folder, one).parent.mkdir(parents=True)
            grid.checkpoint_of(folder, one).touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(grid, "one", interrupted)
    shown = command("--data", "Wine", "--rule", "GradNorm(alpha=1.0)", "--out", str(tmp_path))
    assert shown.exit_code == 130 and "Traceback" not in shown.output
    assert ("goes on from its last checkpoint" if saved else "starts over, for nothing was saved yet") in shown.output
    assert shown.output.endswith(f"  mmfast train --data Wine --rule 'GradNorm(alpha=1.0)' --out {tmp_path}\n")


@needs_data
def test_ctrl_c_ends_a_grid_and_all_of_its_processes(tmp_path):
    """A terminal sends it to every process of the command: one says something, none leaves half of a file."""
    arguments = ["train", "table1", "--model", "hivae", "--data", "Wine", "--rule", "none", "--rule", "MGDA", "--seeds", "1"]
    start = [sys.executable, "-m", "mmfast", *arguments, "--processes", "2", "--out", str(tmp_path)]
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # what a shell starts in the background ignores it
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "preexec_fn": heard}
    process = subprocess.Popen(start, **both, text=True, start_new_session=True)
    for _ in range(2400):
        time.sleep(0.05 if len(list(tmp_path.glob("checkpoints/*.pt"))) < 2 else 0)
    os.killpg(process.pid, signal.SIGINT)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "hivae Wine " in out
    command = f"mmfast {' '.join(arguments)} --processes 2 --out {tmp_path}"
    assert error == f"mmfast: stopped; the same command goes on from there: 0 of 2 runs are recorded:\n  {command}\n"
    assert {path.suffix for path in (tmp_path / "checkpoints").iterdir()} == {".pt"}
