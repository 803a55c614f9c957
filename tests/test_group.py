"""Many processes, one problem: group= gives every rank its part of what one process with the whole batch would get."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mmfast as mf

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not hasattr(os, "fork"), reason="needs torch.distributed and processes that fork"
)


def told_by(what):
    """The lines of JSON that group_ranks.py prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, Path(__file__).with_name("group_ranks.py"), *what]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    lines = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]  # gloo prints, too, in older torch
    assert lines, run.stderr
    return lines


def test_ranks_and_one_process():
    """Every case of group_ranks.py on each of 2 and of 4 ranks."""
    lines = told_by(["2", "4"])
    wrong = [f"{line['case']}, rank {line['rank']} of {line['world']}: {line['error']}" for line in lines if line["error"]]
    assert not wrong, "\n".join(wrong)
    ran = {}
    for line in lines:
        ran.setdefault((line["world"], line["rank"]), []).append(line["case"])
    assert len(ran) == 2 + 4 and all(cases == ran[2, 0] for cases in ran.values())


def test_a_rank_that_is_lost_is_an_error_on_the_others():
    """Killed: at once. Stuck: after the group's timeout, five seconds here. Never a hang."""
    killed, stuck = told_by(["killed", "stuck"])
    for line in (killed, stuck):
        assert line["error"] and line["seconds"] < 10, line


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
