"""Many processes, one problem: group= gives every rank its part of what one process with the whole batch would get."""

import json
import os
import subprocess
import sys
from pathlib import Path

import group_ranks
import pytest
import torch

import mmfast as mf

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not hasattr(os, "fork"), reason="needs torch.distributed and processes that fork"
)


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_and_one_process(world):
    """Every case of group_ranks.py on every rank."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(
        [sys.executable, Path(group_ranks.__file__), str(world)], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    said = [json.loads(line) for line in run.stdout.splitlines()]
    wrong = [f"{line['case']}, rank {line['rank']}: {line['error']}" for line in said if line["error"]]
    assert not wrong, "\n".join(wrong)
    assert len(said) == world * len(group_ranks.CASES), run.stderr


def test_what_is_no_group():
    for make in (
        lambda group: mf.fork(torch.ones(2, 3), 2, mf.MGDA(), group=group),
        lambda group: mf.ImpartialityBlock([torch.nn.Linear(2, 2)], mf.MGDA(), group=group),
    ):
        with pytest.raises(TypeError, match=r"group is a str, expected a torch\.distributed\.ProcessGroup"):
            make("world")


def test_a_torch_without_process_groups(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="which this torch was built without"):
        mf.fork(torch.ones(2, 3), 2, mf.MGDA(), group=object())
