"""Training runs of multimodal VAEs: settings, the whole way at a tiny size, kills, the commands."""

import json
import math
from dataclasses import asdict, replace

import made_digits
import pytest
import torch
from multimodal_records import result
from torch.optim.optimizer import register_optimizer_step_pre_hook
from typer.testing import CliRunner

from mmfast.cli import app
from mmfast.data import triplets
from mmfast.experiments import grid, results
from mmfast.experiments.multimodal import judges, run
from mmfast.experiments.multimodal.results import RECORD, Result, read
from mmfast.experiments.multimodal.run import EXPERIMENT
from mmfast.experiments.multimodal.settings import SIZES, settings
from mmfast.experiments.settings import SettingsError

DATA = triplets.STAND_IN
TINY = settings("mopoe", "siwae", "PCGrad", "pqs", 0, DATA, "tiny")


class Stop(Exception):
    pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of a grid, with the classifiers that judge trained once for all tests."""
    return tmp_path_factory.mktemp("grid")


@pytest.fixture(autouse=True)
def _made(monkeypatch):
    made_digits.use(monkeypatch)
    monkeypatch.setattr(run, "TICK_SECONDS", 0)
    monkeypatch.setattr(run, "missing", lambda packages: True)  # no pictures


def numbers(found):
    """All but the time."""
    return tuple(value for name, value in vars(found).items() if name not in ("step_us", "evaluation_s"))


# settings and the record


def test_settings_fill_in_what_the_size_says():
    made = settings("mmvae", "iwae", "pcgrad", data=DATA)
    assert (made.blocks, made.rule, made.size, made.epochs) == ("p", "PCGrad", "small", SIZES["small"].epochs)
    assert settings("mvae", "elbo", data=DATA).blocks == "" and settings("mvae", "elbo", data=DATA, epochs=7).epochs == 7
    assert made.label == "mmvae iwae PCGrad on p 0"
    names = {replace(made, seed=s, blocks=b).name for s in range(3) for b in ("p", "pq")}
    assert len(names) == 6 and not any(c in name for name in names for c in "/\\ ()'*")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gan", "elbo"), "model is 'gan', expected one of 'mvae', 'mmvae', 'mopoe'"),
        (("mvae", "dreg"), "objective is 'dreg', expected one of 'elbo'"),
        (("mvae", "elbo", "PCGrud"), "did you mean PCGrad"),
        (("mvae", "elbo", "none", "p"), "blocks is 'p', expected one of ''"),
        (("mvae", "elbo", "PCGrad", ""), "blocks is '', expected one of 'p'"),
        (("mvae", "elbo", "none", None, 0, "MST"), "data is 'MST', expected one of 'MNIST-SVHN-Text'"),
        (("mvae", "elbo", "none", None, 0, DATA, "huge"), "size is 'huge', expected one of 'full', 'small'"),
        (("mvae", "elbo", "none", None, 0, DATA, "tiny", 0), "epochs is 0"),
        (("mvae", "elbo", "none", None, -1, DATA), "seed is -1, expected a whole number, 0 at least"),
    ],
)
def test_what_cannot_be_run_is_said(arguments, message):
    with pytest.raises(SettingsError, match=message):
        settings(*arguments)


def test_the_record_gives_back_what_was_written(tmp_path):
    written = [result("MGDA", 1), result(), result("PCGrad", 0, None)]
    results.append(tmp_path / RECORD, *written)
    assert read(tmp_path) == written
    values = json.loads(result().line())
    values["settings"]["model"] = "gan"
    (tmp_path / RECORD).write_text(json.dumps(values))
    with pytest.raises(SettingsError, match="line 1: there is no model 'gan'"):
        read(tmp_path)


def test_runs_of_a_size_that_has_other_numbers_now_are_not_taken_for_todays(tmp_path):
    results.append(tmp_path / RECORD, result(size="full"), replace(result(), size={**asdict(SIZES["small"]), "samples": 7}))
    with pytest.raises(SettingsError, match="line 2: this run of size 'small' was made with other numbers"):
        read(tmp_path)


# a run


@pytest.fixture(scope="module")
def whole(folder):
    """An unbroken run."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        made_digits.use(monkeypatch)
        monkeypatch.setattr(run, "missing", lambda packages: True)
        return run.train(TINY, folder)


def test_the_learning_rate_rises_over_the_warm_up(folder):
    rates = []
    hook = register_optimizer_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    try:
        run.train(settings("mvae", "elbo", data=DATA, size="tiny", epochs=1), folder)
    finally:
        hook.remove()
    adam = rates[: 90 // 16]  # what comes after are the fits of the latent classifiers
    assert adam == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3])


def test_a_run_measures_all_that_the_tables_need(whole):
    assert (whole.settings, whole.epochs_done, len(whole.nll)) == (TINY, 2, 2) and whole.best_epoch == 1 + whole.nll.index(min(whole.nll))
    for scores in (whole.validation, whole.test):
        assert len(scores.latent) == 7 and all(0 <= x <= 1 for row in scores.latent for x in row)
        assert scores.self_accuracy == pytest.approx(sum(scores.latent[i][i] for i in range(7)) / 7)
    assert all(20 * x == pytest.approx(round(20 * x)) for of in whole.test.coherence.values() for x in of.values())  # of 20 triplets
    assert whole.test.log_likelihood < 0 and 0 <= whole.test.joint_coherence <= 1
    assert set(whole.judges) == {"mnist", "svhn", "text"} and [look[0] for look in whole.conflict] == [0, 4, 9]
    assert Result.of(json.loads(whole.line())) == whole


def test_the_same_run_comes_to_the_same_numbers_and_gives_the_threads_back(whole, folder):
    before = torch.get_num_threads()
    assert numbers(run.train(TINY, folder)) == numbers(whole)
    assert torch.get_num_threads() == before


def test_a_rule_goes_on_with_its_state(folder, tmp_path, monkeypatch):
    """GradNorm's weights, and the norms of its twentieth call."""
    monkeypatch.setattr(run, "SAVE_SECONDS", 0)
    gradnorm = replace(TINY, model="mmvae", rule="GradNorm", blocks="pq", epochs=5)

    def until(epochs, remark):
        if round(5 * epochs) == 22:
            raise Stop

    with pytest.raises(Stop):
        run.train(gradnorm, folder, tmp_path / "state.pt", until)
    assert numbers(run.train(gradnorm, folder, tmp_path / "state.pt")) == numbers(run.train(gradnorm, folder))


@pytest.mark.parametrize("stop", [3, 5])
def test_killed_it_goes_on_to_the_same_numbers(stop, whole, folder, tmp_path, monkeypatch):
    """In the middle of an epoch, and between two."""
    monkeypatch.setattr(run, "SAVE_SECONDS", 0)
    path, steps = tmp_path / "state.pt", []

    def until(epochs, remark):
        if round(5 * epochs) > stop:
            raise Stop

    with pytest.raises(Stop):
        run.train(TINY, folder, path, until)
    found = run.train(TINY, folder, path, lambda epochs, remark: steps.append(round(5 * epochs)))
    assert steps[0] == stop + 1 and numbers(found) == numbers(whole)
    path.write_bytes(b"no checkpoint")
    with pytest.raises(SettingsError, match="cannot be taken up"):
        run.train(TINY, folder, path)


def test_the_seed_sets_the_data_and_the_first_weights_and_the_objective_the_noise(folder):
    device = torch.device("cpu")
    plain = settings("mopoe", "siwae", "none", "", 0, DATA, "tiny")
    a, b, c = (run.make_model(of, device).state_dict() for of in (TINY, plain, replace(TINY, seed=1)))
    assert all(torch.equal(b[name], a[name]) for name in b) and not all(torch.equal(b[name], c[name]) for name in b)
    one, same, other = (run.load_parts(of) for of in (TINY, plain, replace(TINY, seed=1)))
    assert torch.equal(one.train.first, same.train.first) and not torch.equal(one.train.first, other.train.first)
    assert torch.equal(one.test.first, other.test.first) and torch.equal(one.test.text, other.test.text)
    mvae = [run.train(settings("mvae", objective, "none", "", 0, DATA, "tiny", 1), folder) for objective in ("iwae", "siwae")]
    assert mvae[0].nll != mvae[1].nll  # one estimator, other draws: what the noise is


def test_the_order_of_an_epoch_does_not_depend_on_where_it_is_taken_up():
    data = run.load_parts(TINY).train
    order = [index for _, index in run._batches(TINY, data, 16, 0, 10)]
    assert [step for step, _ in run._batches(TINY, data, 16, 7, 10)] == [7, 8, 9]
    assert all(torch.equal(a, b) for (_, a), b in zip(run._batches(TINY, data, 16, 7, 10), order[7:], strict=True))
    first = torch.cat(order[:5])
    assert len(first.unique()) == 80 and not torch.equal(first, torch.cat(order[5:]))
    assert not torch.equal(next(run._batches(replace(TINY, seed=1), data, 16, 0, 10))[1], order[0])


def test_the_weights_of_the_epoch_with_the_least_nll_are_kept(monkeypatch):
    model = torch.nn.Linear(1, 1)
    state, values = run.State(model, None), iter([5.0, 3.0, float("nan"), 4.0, 2.0])
    monkeypatch.setattr(run.metrics, "nll", lambda *_: next(values))
    parts = run.Parts(None, None, None)
    for epoch in range(5):
        model.weight.data.fill_(epoch)
        run._validate(state, parts, None)
        assert state.best["weight"].item() == [0, 1, 1, 1, 4][epoch]


def test_what_each_number_is_measured_on(monkeypatch):
    """The choice of an epoch on the validation triplets, latent classifiers on the training ones, all else on the test ones."""
    parts, seen = run.load_parts(TINY), []
    assert (len(parts.train), len(parts.validation), len(parts.test)) == (90, 10, 20)

    def spy(name, found):
        monkeypatch.setattr(run.metrics, name, lambda vae, *rest: seen.append((name, *rest)) or found)

    names = {"nll": 1.0, "latents": (torch.zeros(7, 1, 1), torch.zeros(1)), "coherence": {}, "joint_coherence": 0.5, "log_likelihood": -1.0}
    for name, found in names.items():
        spy(name, found)
    monkeypatch.setattr(run.metrics, "latent_classifiers", lambda z, labels: seen.append("fitted"))
    monkeypatch.setattr(run.metrics, "latent_accuracy", lambda classify, z, labels: torch.eye(7))
    known, device = {}, torch.device("cpu")
    run._validate(run.State(torch.nn.Linear(1, 1), None), parts, device)
    run._scores(TINY, None, parts, known, device)
    assert seen == [
        ("nll", parts.validation, device),
        ("latents", parts.train, device, 50),
        "fitted",
        ("latents", parts.validation, device),
        ("latents", parts.test, device),
        ("coherence", known, parts.test, device),
        ("joint_coherence", known, 20, device),
        ("log_likelihood", parts.test, 4, 6, device),
    ]


def test_the_best_epochs_weights_are_measured(folder, whole, monkeypatch):
    device, parts = torch.device("cpu"), run.load_parts(TINY)
    model, best = (run.make_model(replace(TINY, seed=seed), device) for seed in (0, 1))
    state = run.State(model, None, nll=[2.0, 1.0, 3.0], best=best.state_dict(), step_us=[1.0])
    monkeypatch.setattr(run, "_scores", lambda run, vae, *_: (vae.state_dict(), None))
    found = run._finished(TINY, state, parts, folder, device)
    assert found.best_epoch == 2 and all(torch.equal(x, best.state_dict()[name]) for name, x in found.validation.items())


def test_one_that_diverges_ends_with_what_was_kept_before(folder, tmp_path, monkeypatch):
    validate = run._validate

    def broken(state, parts, device):
        validate(state, parts, device)
        next(state.model.parameters()).data.fill_(float("nan"))

    def stop(*_):
        raise Stop

    monkeypatch.setattr(run, "_validate", broken)
    with monkeypatch.context() as killed:
        killed.setattr(run, "_finished", stop)
        with pytest.raises(Stop):
            run.train(replace(TINY, epochs=5), folder, tmp_path / "state.pt")
    broken_off = run.train(replace(TINY, epochs=5), folder, tmp_path / "state.pt")
    found = run.train(replace(TINY, epochs=5), folder)
    assert numbers(broken_off) == numbers(found)
    assert (found.epochs_done, found.best_epoch) == (1, 1) and found.test is not None
    assert json.loads(found.line())["nll"] == found.nll


def test_an_epoch_without_a_finite_nll_keeps_its_place(folder, monkeypatch):
    values = iter([math.nan, 3.0])
    monkeypatch.setattr(run.metrics, "nll", lambda *_: next(values))
    found = run.train(replace(TINY, model="mvae", blocks="p"), folder)
    assert found.nll == [None, 3.0] and found.best_epoch == 2 and json.loads(found.line())["nll"] == [None, 3.0]


# judges


def test_judges_are_trained_once(folder, whole, monkeypatch):
    monkeypatch.setattr(judges, "_train", pytest.fail)
    found, accuracy = judges.ready(folder, DATA, SIZES["tiny"], torch.device("cpu"))
    assert accuracy == whole.judges and not any(network.training for network in found.values())


def test_judges_know_digits_that_they_have_not_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(judges, "BATCH", 8)
    size = replace(SIZES["tiny"], judge_most=12, judge_epochs=12, test_most=4)
    before = torch.get_rng_state()
    _, accuracy = judges.ready(tmp_path, DATA, size, torch.device("cpu"))
    assert accuracy["mnist"] > 0.9 and accuracy["text"] > 0.5 and accuracy["svhn"] > 0.1
    assert torch.equal(torch.get_rng_state(), before)


# the grid and the commands


def test_the_command_trains_both_stages_once(folder, whole, monkeypatch):
    """In this process: a new one would not know the made-up digits."""
    monkeypatch.setattr(grid, "many", in_this_process)
    command = [
        "train",
        "table5",
        "--model",
        "mvae",
        "--model",
        "mmvae",
        "--loss",
        "elbo",
        "--rule",
        "none",
        "--rule",
        "imtlg",
        "--blocks",
        "pq",
    ]
    command += ["--seeds", "1", "--size", "tiny", "--data", DATA, "--epochs", "1", "--out", str(folder)]
    shown = CliRunner().invoke(app, command)
    assert shown.exit_code == 0 and "5 of 5 runs are recorded" in shown.output, shown.output
    found = [(r.settings.model, r.settings.rule, r.settings.blocks) for r in read(folder)]
    assert found == [("mvae", "none", ""), ("mvae", "IMTLG", "p"), ("mmvae", "none", ""), ("mmvae", "IMTLG", "p"), ("mmvae", "IMTLG", "pq")]
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 0 and again.output.count("every run is finished already") == 2 and len(read(folder)) == 5
    table = CliRunner().invoke(app, ["report", "table5", "--out", str(folder)])
    assert table.exit_code == 0 and "| MMVAE | ELBO | 1 | IMTLG | p" in table.output


def in_this_process(runs, out, processes, progress, failed, experiment):
    assert experiment is EXPERIMENT
    return [grid.one(of, out, lambda done, remark, of=of: progress(of, done, remark), experiment) for of in runs]


def test_a_picture_is_drawn_of_each_run(folder, tmp_path):
    pytest.importorskip("matplotlib")
    from mmfast.experiments.multimodal import pictures

    parts = run.load_parts(TINY)
    path = pictures.generated(
        run.make_model(TINY, torch.device("cpu")), parts.test, torch.device("cpu"), tmp_path / "new" / "run.png", "a run"
    )
    assert path.read_bytes()[:4] == b"\x89PNG" and path.stat().st_size > 20_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "gan"], "model is 'gan'"),
        (["--blocks", "s"], "blocks is 's', expected one of p, pq, pqs"),
        (["--size", "huge"], "size is 'huge'"),
        (["--data", "MNIST-SVHN-Text"], "SVHN is not here"),
    ],
)
def test_commands_say_what_is_wrong(tmp_path, monkeypatch, arguments, message):
    monkeypatch.setenv("MMFAST_DATA", str(tmp_path / "nowhere"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(__import__("sys").modules, "pooch", None)
    shown = CliRunner().invoke(app, ["train", "table5", "--out", str(tmp_path / "out"), *arguments])
    assert shown.exit_code == 2 and message in shown.output and "Traceback" not in shown.output
