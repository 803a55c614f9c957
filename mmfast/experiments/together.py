"""Training runs that differ in seed and rule alone, in one process and in one go; each ends with the numbers that it would have by itself, to rounding."""

import time
from collections.abc import Sequence
from pathlib import Path

import torch

from mmfast import data
from mmfast.data.prepare import prepare
from mmfast.data.table import Table
from mmfast.experiments.checkpoint import taken_up, write_checkpoint
from mmfast.experiments.results import REVISION, Result, revision_of
from mmfast.experiments.run import LEARNING_RATE, SAVE_SECONDS, State, Tick, diverged, finished, make_model, validate
from mmfast.experiments.settings import Settings
from mmfast.models.together import Together

MOST = 20  # models in one go: a step of each costs a third less than at five, and more of them save nothing


def groups(runs: Sequence[Settings]) -> list[tuple[Settings, ...]]:
    """The runs in the groups that can be trained together, in the order in which each cell's first comes: those of one cell, rule by rule."""
    cells: dict[object, dict[str, list[Settings]]] = {}
    for run in runs:
        cell: object = (run.model, run.data, run.epochs, run.batch, run.samples) if run.model in ("elbo", "iwae") else run
        cells.setdefault(cell, {}).setdefault(run.rule, []).append(run)
    found = []
    for rules in cells.values():
        members = [run for of_rule in rules.values() for run in of_rule]
        found += [tuple(members[i : i + MOST]) for i in range(0, len(members), MOST)]
    return found


def train_together(runs: Sequence[Settings], checkpoint: Path | None = None, tick: Tick = lambda epoch, remark: None) -> list[Result]:
    """Trains the runs of a group to their ends and returns their results, as `run.train` does one.

    Args:
        runs: of one group, see `groups`.
        checkpoint: the file where they keep their state together, and are taken up if it is there already.
        tick: called after each epoch.

    Raises:
        DataError: the data set is not here.
        SettingsError: the checkpoint cannot be taken up.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _train(runs, checkpoint, tick, data.load(runs[0].data))
    finally:
        torch.set_num_threads(threads)


def _train(runs: Sequence[Settings], checkpoint: Path | None, tick: Tick, table: Table) -> list[Result]:
    parts = [prepare(table, run.seed) for run in runs]
    states = [State(make_model(run, part)) for run, part in zip(runs, parts, strict=True)]
    together = Together([state.model for state in states], [run.seed + 1 for run in runs], LEARNING_RATE)  # type: ignore[misc]
    epoch = 0 if checkpoint is None else _load(checkpoint, runs, states, together)
    x, seen = (torch.stack([getattr(part.train, name) for part in parts]) for name in ("x", "seen"))
    first = torch.arange(len(runs)).unsqueeze(1) * x.shape[1]
    saved = time.monotonic()
    going = [e for e, state in enumerate(states) if not diverged(state.model)]
    while epoch < runs[0].epochs and going:
        for places in together.batches(x.shape[1], min(runs[0].batch, x.shape[1])):
            rows = first + places
            together.step(*(part.flatten(0, 1).index_select(0, rows.flatten()).unflatten(0, rows.shape) for part in (x, seen)))
        epoch += 1
        for e in going:
            validate(states[e], parts[e], epoch)
            states[e].epoch = epoch
        going = [e for e in going if not diverged(states[e].model)]  # what the others have kept before stands
        tick(epoch, f"{len(runs)} runs")
        if checkpoint is not None and (time.monotonic() - saved > SAVE_SECONDS or epoch == runs[0].epochs):
            _save(checkpoint, runs, states, together, epoch)
            saved = time.monotonic()
    return [finished(run, state, part) for run, state, part in zip(runs, states, parts, strict=True)]


def _save(path: Path, runs: Sequence[Settings], states: Sequence[State], together: Together, epoch: int) -> None:
    write_checkpoint(
        path,
        {
            "settings": [vars(run) for run in runs],
            "revision": REVISION,
            "epoch": epoch,
            "together": together.state_dict(),
            "runs": [(state.model.state_dict(), state.epoch, state.kept, state.best) for state in states],
        },
    )


def _load(path: Path, runs: Sequence[Settings], states: Sequence[State], together: Together) -> int:
    """Takes up a checkpoint, if there is one of these very runs; returns the epochs that are done."""
    with taken_up(path, [vars(run) for run in runs], "these runs") as saved:
        if saved is None or revision_of(saved) != REVISION:
            return 0
        for state, (weights, epoch, kept, best) in zip(states, saved["runs"], strict=True):
            state.model.load_state_dict(weights)
            state.epoch, state.kept, state.best = epoch, kept, best
        together.load_state_dict(saved["together"])
    return saved["epoch"]
