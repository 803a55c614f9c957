"""Runs on representation collapse: settings, the whole way on small data, kills, the commands."""

import json
from dataclasses import replace

import collapse_records
import pytest
import torch
from collapse_records import ROWS, numbers, result, tiny
from torch import nn
from typer.testing import CliRunner

from mmfast.cli import app
from mmfast.data import DataError, modalities
from mmfast.experiments import grid as grids
from mmfast.experiments import results
from mmfast.experiments.collapse import grid, measures, parts, report, run, systems, tables
from mmfast.experiments.collapse.results import RECORD, Result, read
from mmfast.experiments.collapse.settings import settings
from mmfast.experiments.settings import SettingsError


class Stop(Exception):
    pass


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    collapse_records.use(monkeypatch)
    monkeypatch.setattr(run, "SAVE_SECONDS", 0)


# settings and the record


def test_settings_fill_in_what_the_data_and_the_cure_say():
    made = settings("avMNIST", "early", "kd")
    assert (made.epochs, made.batch, made.weight, made.rule, made.noise) == (30, 64, 1.0, "none", 0.0)
    assert settings("Credit", "mt", rule="pcgrad").rule == "PCGrad" and settings("Credit", "mt").weight == 0
    assert settings("planted", "m3care", "ebr", "imtlg", 3, noise=0.5).label == "planted M3Care + EBR (IMTLG) noise 0.5 3"
    every = [settings("planted", "early", cure, seed=s, noise=n) for cure in ("none", "kd") for s in (0, 1) for n in (0, 1)]
    assert len({one.name for one in every}) == 8 and not any(c in one.name for one in every for c in "/\\ ()'*")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("MNIST", "early"), "data is 'MNIST', expected one of planted, Credit, Bank, avMNIST, MIMIC-IV"),
        (("planted", "middle"), "system is 'middle', expected one of late, early, cmae, smil"),
        (("planted", "early", "aspirin"), "cure is 'aspirin', expected one of none, kd, ebr"),
        (("planted", "mt", "kd"), "cure is 'kd', which is for late, early, grape, m3care, muse; system is 'mt'"),
        (("planted", "early", "kd", "PCGrad"), "rule is 'PCGrad', but early has no block"),
        (("planted", "mt", "none", "PCGrud"), "did you mean PCGrad"),
        (("Credit", "smil"), "system is 'smil', which imputes the one modality that may be missing, and data is 'Credit'"),
        (("planted", "early", "none", "none", 0, 0), "epochs is 0, expected a whole number, 1 at least"),
        (("planted", "early", "none", "none", 1.5), "seed is 1.5, expected a whole number, 0 at least"),
        (("planted", "early", "none", "none", 0, 1, 1), "batch is 1, expected a whole number, 2 at least"),
        (("planted", "early", "none", "none", 0, 1, 2, -1.0), "noise is -1"),
        (("Bank", "early", "none", "none", 0, 1, 2, 1.0), "noise is 1, which is for planted, Credit; data is 'Bank'"),
        (("planted", "early", "none", "none", 0, 1, 2, 0.0, 1.0), "weight is 1, which is of a cure"),
        (("planted", "early", "kd", "none", 0, 1, 2, 0.0, float("inf")), "weight is inf"),
    ],
)
def test_what_cannot_be_run_is_said(arguments, message):
    with pytest.raises(SettingsError, match=message):
        settings(*arguments)


def test_the_record_gives_back_what_was_written(tmp_path):
    written = [result(), result(cure="kd", seed=1), result(cure="ebr", diverged=True)]
    results.append(tmp_path / RECORD, *written)
    assert read(tmp_path) == written
    values = json.loads(result().line())
    values["settings"]["cure"] = "aspirin"
    (tmp_path / RECORD).write_text(json.dumps(values))
    with pytest.raises(SettingsError, match="line 1: there is no system 'early' with 'aspirin'"):
        read(tmp_path)


def test_means_are_over_the_rates():
    assert result(roc=0.8).mean("roc") == pytest.approx(0.76) and result(diverged=True).mean("roc") is None
    assert result(validation=0.7).best_validation == 0.7 and result(diverged=True).best_validation is None


# a run

KINDS = [
    ("early", "ebr", "planted"),
    ("early", "kd", "planted"),
    ("cmae", "none", "planted"),
    ("muse", "none", "Credit"),
    ("smil", "none", "avMNIST"),
]


@pytest.mark.parametrize(("system", "cure", "data"), KINDS)
def test_killed_after_every_epoch_it_ends_with_the_same_numbers(system, cure, data, tmp_path):
    """Each time in the epoch after the one that it saved."""
    of = tiny(system, cure, data)
    path, done = tmp_path / "state.pt", []

    def second(epochs, remark):
        done.append(epochs)
        if len(done) == 2:
            raise Stop

    whole = run.train(of)
    total = sum(systems.plan(of, 2))
    assert whole.epochs_done == total == len(whole.loss) and len(whole.validation) == len(whole.ranks) == of.epochs
    for epoch in range(1, total):
        done.clear()
        with pytest.raises(Stop):
            run.train(of, path, second)
        assert done[0] == pytest.approx(epoch / total * of.epochs)
    found = run.train(of, path)
    assert numbers(found) == numbers(whole)
    assert Result.of(json.loads(found.line())) == found
    path.write_bytes(b"no checkpoint")
    with pytest.raises(SettingsError, match="cannot be taken up"):
        run.train(of, path)


@pytest.mark.parametrize("system", ["late", "mt", "grape", "m3care", "shaspec"])
def test_every_other_system_runs(system):
    found = run.train(tiny(system, rule="PCGrad" if system in ("mt", "shaspec") else "none"))
    assert found.best_epoch in (1, 2) and set(found.test) == {"0", "0.2", "0.4", "0.6", "0.8"} and None not in found.test.values()
    assert set(found.look.shares) == set(found.contribution) == {"strong", "weak"} and found.look.participation is None
    assert found.step_us > 0 and found.rows == ROWS and found.parameters > 0


def test_the_test_rows_do_not_touch_the_choice(monkeypatch):
    """With other inputs, absences and classes in them the same epoch and weights are kept."""
    of = tiny(epochs=4)
    plain = run.train(of)

    def poisoned(name, seed):
        split = collapse_records.split(name, seed)
        rows = split.test
        inputs = {k: 100 * torch.randn(x.shape) for k, x in rows.inputs.items()}
        return replace(split, test=replace(rows, inputs=inputs, target=(rows.target + 1) % 3))

    collapse_records.use(monkeypatch, poisoned)
    other = run.train(of)
    for name in ("best_epoch", "validation", "loss", "ranks", "contribution_validation"):
        assert getattr(other, name) == getattr(plain, name), name
    assert other.test != plain.test and other.contribution != plain.contribution


def test_the_weights_of_the_best_validation_score_are_kept(monkeypatch):
    data = parts.load(tiny())
    system = systems.make(tiny(), data)
    state, values = run.State(system, None), iter([0.5, 0.7, None, 0.7, 0.6, 0.8])
    monkeypatch.setattr(measures, "score", lambda *_: None if (x := next(values)) is None else measures.Scores(0, 0, x))
    weight = system.model.fusion.network[0].bias
    for epoch in range(6):
        weight.data.fill_(epoch)
        run._validate(state, tiny(), data)
        assert state.best["fusion.network.0.bias"][0].item() == [0, 1, 1, 1, 1, 5][epoch]
        assert state.best_epoch == [1, 2, 2, 2, 2, 6][epoch]
    assert state.validation == [0.5, 0.7, None, 0.7, 0.6, 0.8]


def test_ebr_hears_the_score_and_finds_substitutes_on_validation_rows(monkeypatch):
    of = tiny(cure="ebr")
    data = parts.load(of)
    state, values = run.State(systems.make(of, data), None), iter([0.7, 0.6])
    monkeypatch.setattr(measures, "score", lambda *_: measures.Scores(0, 0, next(values)))
    assert state.system.model.active and state.system.model.similarity[0, 1] == 0
    run._validate(state, of, data)
    assert state.system.model.active and state.system.model.similarity[0, 1] != 0
    run._validate(state, of, data)
    assert not state.system.model.active  # the score dropped


def test_kd_teaches_the_modality_that_does_worst_by_itself(monkeypatch):
    data = parts.load(tiny(cure="kd"))
    model = systems.make(tiny(cure="kd"), data).model
    for name, direction in (("strong", 0.0), ("weak", 1.0)):  # the weak one knows the class here, the strong one nothing
        monkeypatch.setattr(model.encoders[name], "forward", lambda x, d=direction: d * one_hot(data.valid.target, len(x)))
        model.classifiers[name] = nn.Linear(systems.WIDTH, 3, bias=False)
        model.classifiers[name].weight.data = torch.eye(3, systems.WIDTH)
    state = run.State(systems.System(model, None, None), None)
    run._next_stage(state, tiny(cure="kd", batch=60), data)
    assert model.stage == "weak" and model.student == "strong"


def one_hot(target, rows):
    return nn.functional.one_hot(target[:rows], systems.WIDTH).float()


def test_one_that_diverges_ends_with_what_was_kept_before(monkeypatch):
    validate = run._validate

    def broken(state, *rest):
        validate(state, *rest)
        next(state.system.model.parameters()).data.fill_(float("nan"))

    monkeypatch.setattr(run, "_validate", broken)
    found = run.train(tiny(epochs=5))
    assert (found.epochs_done, found.best_epoch) == (1, 1) and found.test["0"] is not None
    monkeypatch.setattr(measures, "score", lambda *_: None)
    found = run.train(tiny(epochs=5))
    assert found.best_epoch is None and found.look is None and Result.of(json.loads(found.line())) == found


@pytest.mark.parametrize(("system", "cure", "data"), [("early", "kd", "planted"), ("cmae", "none", "planted"), ("smil", "none", "avMNIST")])
def test_one_that_diverges_before_the_last_stage_has_nothing_to_show(system, cure, data, monkeypatch):
    epoch = run._epoch

    def broken(state, *rest):
        epoch(state, *rest)
        for p in state.system.model.parameters():
            p.data.fill_(float("nan"))

    monkeypatch.setattr(run, "_epoch", broken)
    found = run.train(tiny(system, cure, data, epochs=1))  # the stage's last epoch
    assert (found.epochs_done, found.best_epoch, found.validation, found.step_us) == (1, None, [], None)
    assert set(found.test.values()) == {None} and Result.of(json.loads(found.line())) == found
    assert "nan" not in tables.missing(report.sheets([found])[0])


def test_one_that_diverged_and_is_taken_up_ends_in_the_same_place(monkeypatch, tmp_path):
    validate, path = run._validate, tmp_path / "state.pt"

    def broken(state, *rest):
        validate(state, *rest)
        if state.epoch == 2:
            next(state.system.model.parameters()).data.fill_(float("nan"))

    monkeypatch.setattr(run, "_validate", broken)
    of = tiny(epochs=5)
    whole, again = run.train(of, path), run.train(of, path)  # as when it was killed before its line was in the record
    assert whole.epochs_done == 2 and numbers(again) == numbers(whole)


# the grid and the commands


def test_the_grid_has_each_system_with_what_suits_it():
    names = ["early", "cmae", "smil", "mt"]
    made = grid.runs(["planted", "avMNIST"], names, ["none", "kd", "ebr"], ["none", "imtlg", "IMTLG"], [0.5], 2)
    cells = [(r.data, r.system, r.cure, r.rule, r.noise) for r in made if r.seed == 0]
    assert len(made) == 2 * len(cells) and [r.seed for r in made] == [0] * len(cells) + [1] * len(cells)
    of_avmnist = [cell[1:4] for cell in cells if cell[0] == "avMNIST"]
    assert of_avmnist == [
        ("early", "none", "none"),
        ("early", "kd", "none"),
        ("early", "ebr", "none"),
        ("early", "ebr", "IMTLG"),
        ("cmae", "none", "none"),
        ("cmae", "none", "IMTLG"),
        ("smil", "none", "none"),
        ("mt", "none", "none"),
        ("mt", "none", "IMTLG"),
    ]
    noisy = [cell for cell in cells if cell[4]]
    assert noisy == [("planted", "early", cure, "none", 0.5) for cure in ("none", "kd", "ebr")]
    assert len([cell for cell in cells if cell[0] == "planted" and cell[1] == "smil"]) == 0
    ruled = grid.runs(["Bank"], ["early"], ["none", "ebr"], ["none", "PCGrad"], [], 1)
    assert [(r.cure, r.rule) for r in ruled] == [("none", "none"), ("ebr", "none"), ("ebr", "PCGrad")]
    weights = {r.cure: r.weight for r in grid.runs(["Bank"], ["early"], ["none", "ebr"], ["none"], [0.0], 1, weight=0.25)}
    assert weights == {"none": 0.0, "ebr": 0.25}


def in_this_process(runs, out, processes, progress, failed, experiment):
    return [grids.one(of, out, lambda done, remark, of=of: progress(of, done, remark), experiment) for of in runs]


def test_the_commands_train_once_and_report(tmp_path, monkeypatch):
    """In this process: a new one would not know the small data."""
    monkeypatch.setattr(grids, "many", in_this_process)
    command = [
        "train",
        "collapse",
        "--data",
        "planted",
        "--system",
        "early",
        "--seeds",
        "2",
        "--epochs",
        "2",
        "--noise",
        "1",
        "--out",
        str(tmp_path),
    ]
    shown = CliRunner().invoke(app, command)
    assert shown.exit_code == 0 and "12 of 12 runs are recorded" in shown.output, shown.output
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 0 and "every run is finished already" in again.output and len(read(tmp_path)) == 12
    table = CliRunner().invoke(app, ["report", "collapse", "--out", str(tmp_path)])
    assert table.exit_code == 0 and "| Early fusion + EBR | 2 |" in table.output and "### Noise" in table.output, table.output


def test_data_that_are_not_here_are_left_out_unless_they_are_asked_for(tmp_path, monkeypatch):
    def load(name, seed):
        if name in ("Credit", "avMNIST"):
            raise DataError(f"{name} is not here")
        return collapse_records.split(name, seed)

    asked = []
    monkeypatch.setattr(modalities, "load", load)
    monkeypatch.setattr(grids, "many", lambda runs, *rest: asked.extend(runs) or [])
    shown = CliRunner().invoke(app, ["train", "collapse", "--system", "late", "--cure", "none", "--seeds", "1", "--out", str(tmp_path)])
    assert "left out: Credit is not here" in shown.output and [r.data for r in asked] == ["planted", "Bank"]
    shown = CliRunner().invoke(app, ["train", "collapse", "--data", "Credit", "--out", str(tmp_path)])
    assert shown.exit_code == 2 and "Credit is not here" in shown.output
    shown = CliRunner().invoke(
        app, ["train", "collapse", "--system", "middle", "--out", str(tmp_path)]
    )  # before any data set is looked for
    assert shown.exit_code == 2 and "system is 'middle'" in shown.output and "not here" not in shown.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--system", "middle"], "system is 'middle'"),
        (["--cure", "aspirin"], "cure is 'aspirin'"),
        (["--data", "MNIST"], "data is 'MNIST'"),
        (["--system", "mt", "--cure", "kd"], "cure is 'kd', which is for"),
        (["--data", "planted", "--system", "smil"], "system is 'smil', which imputes"),
        (["--rule", "PCGrad", "--system", "early", "--cure", "none"], "early has no block"),
        (["--rule", "PCGrud", "--system", "mt", "--cure", "none"], "did you mean PCGrad"),
    ],
)
def test_commands_say_what_is_wrong(tmp_path, arguments, message):
    shown = CliRunner().invoke(app, ["train", "collapse", "--out", str(tmp_path / "out"), *arguments])
    assert shown.exit_code == 2 and message in shown.output and "Traceback" not in shown.output
