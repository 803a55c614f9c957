"""Runs that differ in their seed, trained in one go: the numbers of single runs, and what a kill leaves."""

from dataclasses import replace

import pytest

from mmfast.demo.data import builtin
from mmfast.experiments import together
from mmfast.experiments.run import train
from mmfast.experiments.settings import Settings, SettingsError

TABLE = builtin("diabetes")
SHORT = Settings("elbo", "Wine", "GradNorm", 0, 6, 64, 1)


class Stop(Exception):
    pass


def runs(run, seeds=3):
    return [replace(run, seed=seed) for seed in range(seeds)]


def numbers(results):
    return [(r.settings, r.epochs_done, r.best_epoch, r.validation_log_likelihood, r.test_error, r.test_errors) for r in results]


def test_who_is_trained_together():
    """Rules and seeds of one cell, rule by rule and no more than pay, of models that can be; in the order of the first of each cell."""
    hivae, dreg, other = replace(SHORT, model="hivae"), replace(SHORT, model="dreg", samples=20), replace(SHORT, epochs=7)
    rules = [SHORT, replace(SHORT, rule="PCGrad"), replace(SHORT, rule="none")]
    listed = [replace(run, seed=seed) for seed in range(2) for run in (*rules, other, hivae, dreg)]
    found = together.groups(listed)
    assert found[0] == tuple(run for rule in rules for run in runs(rule, 2)) and found[1] == tuple(runs(other, 2))
    assert sorted(map(len, found[2:])) == [1] * 4
    assert sorted(map(str, (run for group in found for run in group))) == sorted(map(str, listed))
    many = runs(SHORT, 45)
    assert [run for group in together.groups(many) for run in group] == many and max(map(len, together.groups(many))) == together.MOST


def test_rules_of_all_kinds_in_one_group(tmp_path, monkeypatch):
    """Those that draw among those that do not: single runs' numbers, whole and killed."""
    monkeypatch.setattr(together, "SAVE_SECONDS", 0)
    group = [replace(SHORT, rule=rule, seed=seed) for rule in ("none", "PCGrad", "GradNorm+PCGrad", "MGDA", "Random") for seed in range(2)]
    whole = together._train(group, None, lambda *_: None, TABLE)
    for mine in whole:
        alone = train(mine.settings, table=TABLE)
        assert mine.validation_log_likelihood == pytest.approx(alone.validation_log_likelihood, rel=1e-4)
        assert mine.test_error == pytest.approx(alone.test_error, rel=1e-3)

    def until(epoch, remark):
        if epoch > 3:
            raise Stop

    with pytest.raises(Stop):
        together._train(group, tmp_path / "state.pt", until, TABLE)
    assert numbers(together._train(group, tmp_path / "state.pt", lambda *_: None, TABLE)) == numbers(whole)


@pytest.mark.parametrize(
    "run", [SHORT, replace(SHORT, rule="none"), replace(SHORT, model="iwae", samples=3, rule="MGDA", epochs=3)], ids=lambda r: r.rule
)
def test_the_numbers_are_those_of_single_runs(run):
    found = together._train(runs(run), None, lambda *_: None, TABLE)
    for mine, seed in zip(found, range(3), strict=True):
        alone = train(replace(run, seed=seed), table=TABLE)
        assert (mine.settings, mine.epochs_done, mine.best_epoch) == (alone.settings, alone.epochs_done, alone.best_epoch)
        assert mine.validation_log_likelihood == pytest.approx(alone.validation_log_likelihood, rel=1e-4)
        assert mine.test_error == pytest.approx(alone.test_error, rel=1e-3) and mine.step_us > 0


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_killed_it_goes_on_to_the_same_numbers(stop, tmp_path, monkeypatch):
    monkeypatch.setattr(together, "SAVE_SECONDS", 0)
    whole = together._train(runs(SHORT), None, lambda *_: None, TABLE)
    path, epochs = tmp_path / "state.pt", []

    def until(epoch, remark):
        if epoch > stop:
            raise Stop

    with pytest.raises(Stop):
        together._train(runs(SHORT), path, until, TABLE)
    found = together._train(runs(SHORT), path, lambda epoch, remark: epochs.append(epoch), TABLE)
    assert epochs[0] == stop + 1 and numbers(found) == numbers(whole)
    again = together._train(runs(SHORT), path, lambda *_: pytest.fail("trained once more"), TABLE)
    assert numbers(again) == numbers(whole)
    monkeypatch.setattr(together, "REVISION", 3)  # of code that computes something else
    epochs.clear()
    together._train(runs(SHORT), path, lambda epoch, remark: epochs.append(epoch), TABLE)
    assert epochs[0] == 1
    assert numbers(together._train(runs(SHORT, 2), path, lambda *_: None, TABLE)) == numbers(whole)[:2]  # of other runs: starts over
    path.write_bytes(b"no checkpoint")
    with pytest.raises(SettingsError, match="cannot be taken up"):
        together._train(runs(SHORT), path, lambda *_: None, TABLE)


def test_one_that_diverges_leaves_the_others_alone(monkeypatch):
    """Its parameters are NaN from the second epoch on."""
    whole = together._train(runs(SHORT), None, lambda *_: None, TABLE)
    made, step = [], together.Together.step

    def broken(self, x, seen):
        made.append(1)
        if len(made) == 8:
            self.flat[1].fill_(float("nan"))
        return step(self, x, seen)

    monkeypatch.setattr(together.Together, "step", broken)
    found = together._train(runs(SHORT), None, lambda *_: None, TABLE)
    assert numbers(found)[0] == numbers(whole)[0] and numbers(found)[2] == numbers(whole)[2]
    assert found[1].epochs_done == 2 and found[1].best_epoch == 1
