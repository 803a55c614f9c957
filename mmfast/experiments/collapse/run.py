"""One training run, which can be cut off at any moment and goes on where its last checkpoint was."""

import copy
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mmfast
from mmfast.experiments.checkpoint import taken_up, write_checkpoint
from mmfast.experiments.collapse import measures, parts
from mmfast.experiments.collapse.measures import Scores
from mmfast.experiments.collapse.parts import Parts
from mmfast.experiments.collapse.results import RECORD, Result
from mmfast.experiments.collapse.settings import Settings
from mmfast.experiments.collapse.systems import System, make, plan
from mmfast.experiments.grid import Experiment, Tick
from mmfast.experiments.run import diverged
from mmfast.models.fusion import CMAE, EBR, KD, SMIL

LEARNING_RATE = 1e-3
SAVE_SECONDS = 5.0  # between checkpoints
CURVES = ("loss", "validation", "ranks", "step_us")


@dataclass
class State:
    """All that a run needs to go on."""

    system: System
    optimizer: torch.optim.Optimizer
    epoch: int = 0  # done, of all stages
    best: dict[str, Any] = field(default_factory=dict)  # the model's state after the best epoch
    best_epoch: int | None = None
    adversarial: int = 0
    loss: list[float | None] = field(default_factory=list)
    validation: list[float | None] = field(default_factory=list)
    ranks: list[float | None] = field(default_factory=list)
    step_us: list[float] = field(default_factory=list)

    def save(self, path: Path, run: Settings) -> None:
        """Keeps it in a file."""
        state: dict[str, Any] = {name: value for name, value in vars(self).items() if name not in ("system", "optimizer")}
        state |= {"model": self.system.model.state_dict(), "optimizer": self.optimizer.state_dict(), "random": torch.get_rng_state()}
        write_checkpoint(path, {"settings": asdict(run), **state})

    def load(self, path: Path, run: Settings) -> None:
        """Takes up a checkpoint, if there is one of this very run.

        Raises:
            SettingsError: it cannot be read, or the model has changed since.
        """
        with taken_up(path, asdict(run)) as saved:
            if saved is None:
                return
            del saved["settings"]
            self.system.model.load_state_dict(saved.pop("model"))
            self.optimizer.load_state_dict(saved.pop("optimizer"))
            torch.set_rng_state(saved.pop("random"))
            for name, value in saved.items():
                setattr(self, name, value)


def train(run: Settings, checkpoint: Path | None = None, tick: Tick = lambda epochs, remark: None) -> Result:
    """Trains a run to its end and measures what it came to.

    The same settings give the same numbers on the same machine, also where the run was cut off in between. One thread of torch is used. The test rows are
    looked at once, with the weights of the epoch that has the best validation score.

    Args:
        run: see `settings`.
        checkpoint: the file where it keeps its state; taken up if it is there already.
        tick: called after each epoch, with how many of `run.epochs` the share that is done of all stages would be.

    Raises:
        DataError: the data set is not here.
        SettingsError: the checkpoint cannot be taken up, or the system does not suit the data.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _train(run, checkpoint, tick, parts.load(run))
    finally:
        torch.set_num_threads(threads)


def _train(run: Settings, checkpoint: Path | None, tick: Tick, data: Parts) -> Result:
    system = make(run, data)
    state = State(system, _optimizer(system))
    torch.manual_seed(run.seed + 1)
    if checkpoint is not None:
        state.load(checkpoint, run)
    stages = plan(run, len(data.names))
    ends = {sum(stages[:i]) for i in range(1, len(stages))}  # of all stages but the last
    total, saved = sum(stages), time.monotonic()
    while state.epoch < total and not diverged(system.model):  # looked at here, a run that is taken up ends in the same place
        last = state.epoch >= total - stages[-1]
        _epoch(state, run, data, last)
        if last:
            _validate(state, run, data)
        if state.epoch in ends and not diverged(system.model):
            _next_stage(state, run, data)
        shown = state.validation[-1] if state.validation else None
        tick(state.epoch / total * run.epochs, "" if shown is None else f"validation {shown:.3f}")
        if checkpoint is not None and (time.monotonic() - saved >= SAVE_SECONDS or state.epoch == total):
            state.save(checkpoint, run)
            saved = time.monotonic()
    return _finished(run, state, data)


def _optimizer(system: System) -> torch.optim.Optimizer:
    return torch.optim.Adam(system.model.parameters(), LEARNING_RATE)


def _epoch(state: State, run: Settings, data: Parts, timed: bool) -> None:
    """The order of its rows depends on the seed and the epoch alone; those that do not fill a batch are left out."""
    model, rows = state.system.model, data.train
    batch = min(run.batch, len(rows))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(run.seed * 1_000_003 + state.epoch))
    state.adversarial += isinstance(model, EBR) and model.active
    losses: list[Tensor] = []
    for index in order[: len(rows) // batch * batch].view(-1, batch):
        part = rows.part(index)
        start = time.thread_time_ns()
        state.optimizer.zero_grad()
        loss = model.loss(part.inputs, part.target, part.present)
        loss.backward()
        state.optimizer.step()
        if timed:
            state.step_us.append((time.thread_time_ns() - start) / 1e3)
        losses.append(loss.detach())
    state.epoch += 1
    state.loss.append(measures.number(torch.stack(losses).mean()))


def _validate(state: State, run: Settings, data: Parts) -> None:
    """Keeps the weights of this epoch if none had a better score on the validation rows, and tells EBR the score."""
    model = state.system.model
    if isinstance(model, EBR):
        model.fit_substitutes([(part.inputs, part.present) for part in measures.batches(data.valid, run.batch)])
    found = measures.score(model, data.valid_missing, run.batch)
    score = None if found is None else found.main(data.classes)
    before = [x for x in state.validation if x is not None]
    state.validation.append(score)
    state.ranks.append(measures.fused_rank(state.system, data.valid, run.batch))
    if score is not None and score > max(before, default=-math.inf):
        state.best = {name: copy.deepcopy(value) for name, value in model.state_dict().items()}
        state.best_epoch = len(state.validation)
    if isinstance(model, EBR) and score is not None:
        model.after_epoch(score)


def _next_stage(state: State, run: Settings, data: Parts) -> None:
    """Goes on to the model's next stage, with a new optimiser."""
    model = state.system.model
    if isinstance(model, KD) and model.stage == "unimodal":
        model.next_stage(_alone(model, run, data))
    elif isinstance(model, KD):
        model.next_stage()
    elif isinstance(model, CMAE):
        model.classify()
    elif isinstance(model, SMIL):
        model.fit_centres([(part.inputs, part.present) for part in measures.batches(data.train, run.batch)], run.seed)
    state.optimizer = _optimizer(state.system)


@torch.no_grad()
def _alone(model: KD, run: Settings, data: Parts) -> dict[str, float]:
    """The validation score of each modality by its own classifier, of the rows that have it."""
    model.eval()
    found = [model.unimodal(part.inputs, part.present) for part in measures.batches(data.valid, run.batch)]
    model.train()
    ranked = {}
    for name in data.names:
        there = data.valid.present[name]
        of = measures.scores(torch.cat([logits[name] for logits in found])[there], data.valid.target[there])
        ranked[name] = -math.inf if of is None else of.main(data.classes)
    return ranked


def _finished(run: Settings, state: State, data: Parts) -> Result:
    """What a run came to, by the weights of its best epoch."""
    start = time.thread_time()
    system, model, whole = state.system, state.system.model, data.test[0.0]
    test: dict[str, Scores | None] = {f"{rate:g}": None for rate in data.test}
    only: dict[str, Scores | None] = dict.fromkeys(data.names)
    contribution: dict[str, dict[str, float | None]] = {"test": dict.fromkeys(data.names), "valid": dict.fromkeys(data.names)}
    looked = None
    if state.best:
        model.load_state_dict(state.best)
        test = {f"{rate:g}": measures.score(model, rows, run.batch) for rate, rows in data.test.items()}
        only = {name: measures.score(model, parts.only(whole, name), run.batch) for name in data.names}
        for of, rows in (("test", whole), ("valid", data.valid)):
            contribution[of] = {name: _contribution(system, run, data.classes, *parts.with_and_without(rows, name)) for name in data.names}
        looked = measures.look(system, whole, run.batch)
    return Result(
        run,
        data.classes,
        state.epoch,
        state.best_epoch,
        state.loss,
        state.validation,
        state.ranks,
        state.adversarial if isinstance(model, EBR) else None,
        list(model.order) if isinstance(model, KD) else [],
        test,
        only,
        contribution["test"],
        contribution["valid"],
        looked,
        statistics.median(state.step_us) if state.step_us else None,
        time.thread_time() - start,
        {"train": len(data.train), "valid": len(data.valid), "test": len(whole)},
        sum(p.numel() for p in model.parameters()),
        {"mmfast": mmfast.__version__, "torch": torch.__version__},
    )


def _contribution(system: System, run: Settings, classes: int, whole: parts.Samples, without: parts.Samples) -> float | None:
    found = [measures.score(system.model, rows, run.batch) for rows in (whole, without)]
    if found[0] is None or found[1] is None:
        return None
    return found[0].main(classes) - found[1].main(classes)


def _groups(runs: Sequence[Settings]) -> list[tuple[Settings, ...]]:
    return [(run,) for run in runs]


def _group(runs: Sequence[Settings], folder: Path, checkpoint: Path, tick: Tick) -> list[Result]:
    return [train(run, checkpoint, tick) for run in runs]


EXPERIMENT = Experiment(RECORD, Result.of, _groups, _group)
