"""Checkpoints of code that computed something else."""

from dataclasses import replace

import pytest
import torch

from mmfast.demo.data import builtin
from mmfast.experiments import run
from mmfast.experiments.settings import Settings

TABLE = builtin("diabetes")
SHORT = Settings("elbo", "Wine", "none", 0, 5, 64, 1)


@pytest.mark.parametrize("model", ["elbo", "hivae"])
def test_a_checkpoint_of_code_that_computed_something_else_is_not_taken_up(tmp_path, monkeypatch, model):
    """It would be recorded as made by today's; one from before checkpoints said so is of revision 2."""
    monkeypatch.setattr(run, "SAVE_SECONDS", 0)
    short = replace(SHORT, model=model, rule="none")
    epochs: list[int] = []
    for before, now, first in ((2, 3, 1), (3, 3, None), (None, 2, None), (None, 3, 1)):
        monkeypatch.setattr(run, "REVISION", before or 2)
        path = tmp_path / f"{before}-{now}.pt"
        run.train(short, path, table=TABLE)
        if before is None:
            saved = torch.load(path)
            del saved["revision"]
            torch.save(saved, path)
        monkeypatch.setattr(run, "REVISION", now)
        epochs.clear()
        run.train(short, path, lambda epoch, remark: epochs.append(epoch), TABLE)
        assert epochs[:1] == ([first] if first else []), (before, now)
