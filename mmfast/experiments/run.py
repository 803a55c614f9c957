"""One training run, which can be cut off at any moment and goes on where its last checkpoint was."""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mmfast
from mmfast import data
from mmfast.data.prepare import Part, Prepared, errors, prepare
from mmfast.data.table import Table
from mmfast.experiments.checkpoint import taken_up, write_checkpoint
from mmfast.experiments.results import REVISION, Result, revision_of
from mmfast.experiments.settings import NONE, Settings, SettingsError, make_resolver
from mmfast.models.hivae import HIVAE
from mmfast.models.likelihoods import Joint
from mmfast.models.vae import VAE

HIDDEN = 50
LEARNING_RATE = 1e-3
SAVE_SECONDS = 1.0  # between checkpoints
TIMED_STEPS = 60

Tick = Callable[[int, str], None]  # epochs done, a remark


@dataclass
class State:
    """All that a run needs to go on."""

    model: nn.Module
    optimizer: torch.optim.Optimizer | None = None  # None where it is trained with others (together.py)
    epoch: int = 0  # done
    kept: dict[str, Any] = field(default_factory=dict)  # the numbers of the best epoch, as in a Result
    best: dict[str, Tensor] = field(default_factory=dict)  # its weights

    def step(self, x: Tensor, seen: Tensor) -> None:
        """One step of training on a batch."""
        assert self.optimizer is not None
        self.optimizer.zero_grad()
        self.model.loss(x, seen).backward()  # type: ignore[operator]
        self.optimizer.step()

    def save(self, path: Path, settings: Settings) -> None:
        """Keeps it in a file."""
        write_checkpoint(path, self._state(settings))

    def _state(self, settings: Settings) -> dict[str, object]:
        return {
            "settings": vars(settings),
            "revision": REVISION,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer and self.optimizer.state_dict(),
            "random": torch.get_rng_state(),
            "epoch": self.epoch,
            "kept": self.kept,
            "best": self.best,
        }

    def load(self, path: Path, settings: Settings) -> None:
        """Takes up a checkpoint, if there is one of this very run.

        Raises:
            SettingsError: it cannot be read, or the model has changed since.
        """
        with taken_up(path, vars(settings)) as saved:
            if saved is None or revision_of(saved) != REVISION:
                return
            self.model.load_state_dict(saved["model"])
            self.best = saved["best"]
        assert self.optimizer is not None
        self.optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["random"])
        self.epoch, self.kept = saved["epoch"], saved["kept"]


def make_model(settings: Settings, parts: Prepared) -> nn.Module:
    """The model of a run, with the same first weights whatever its rule.

    Raises:
        SettingsError: the rule does not suit the number of features.
    """
    torch.manual_seed(settings.seed)
    blocks = 2 if settings.model in ("dreg", "hivae") else 1
    rules = [rule for rule in (make_resolver(settings.rule) for _ in range(blocks)) if rule is not None] or None
    joint = Joint([column.likelihood for column in parts.columns], parts.w)
    torch.manual_seed(settings.seed)
    try:
        if settings.model == "hivae":
            return HIVAE(joint, resolvers=rules)
        return VAE(joint, HIDDEN, max(1, (len(parts.columns) + 1) // 2), rules, settings.model, settings.samples)
    except ValueError as error:
        raise SettingsError(f"rule is {settings.rule!r}: {error}") from None


def train(
    settings: Settings, checkpoint: Path | None = None, tick: Tick = lambda epoch, remark: None, table: Table | None = None
) -> Result:
    """Trains one model to the end and returns its numbers at the epoch with the best validation likelihood.

    The same settings give the same numbers on the same machine, also where the run was cut off in between. One thread of torch is used: so small a
    model gains nothing from more.

    Args:
        settings: the run.
        checkpoint: the file where the run keeps its state, and takes it up if it is there already.
        tick: called after each epoch.
        table: the data, where they are loaded already.

    Raises:
        DataError: the data set is not here.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _train(settings, checkpoint, tick, data.load(settings.data) if table is None else table)
    finally:
        torch.set_num_threads(threads)


def _train(settings: Settings, checkpoint: Path | None, tick: Tick, table: Table) -> Result:
    parts = prepare(table, settings.seed, "log1p" if settings.model == "hivae" else "log")
    model = make_model(settings, parts)
    state = _start(model)
    torch.manual_seed(settings.seed + 1)  # the same batches and noise whatever the rule
    if checkpoint is not None:
        state.load(checkpoint, settings)
    saved = time.monotonic()
    while state.epoch < settings.epochs:
        _epoch(state, parts.train, settings.batch)
        validate(state, parts, state.epoch)
        error = state.kept.get("validation_error")
        tick(state.epoch, "" if error is None else f"validation error {error:.3f}")
        if checkpoint is not None and (time.monotonic() - saved > SAVE_SECONDS or state.epoch == settings.epochs):
            state.save(checkpoint, settings)
            saved = time.monotonic()
        if diverged(model):  # what was kept before stands
            break
    return finished(settings, state, parts)


def diverged(model: nn.Module) -> bool:
    """Whether parameters are NaN."""
    return any(bool(p.isnan().any()) for p in model.parameters())


def finished(settings: Settings, state: State, parts: Prepared) -> Result:
    """What a run came to: the best epoch on the test rows, and what a step costs."""
    kept = dict.fromkeys(("best_epoch", "validation_log_likelihood", "validation_error", "test_error")) | {"test_errors": {}} | state.kept
    if state.best:
        kept |= _test(state.model, state.best, parts)
    own, plain = _step_times(settings, parts)
    versions = {"mmfast": mmfast.__version__, "torch": torch.__version__, "revision": str(REVISION)}
    return Result(settings, state.epoch, **kept, step_us=own, plain_step_us=plain, versions=versions)  # type: ignore[arg-type]


def _start(model: nn.Module) -> State:
    return State(model, torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, fused=True))


def _step_times(settings: Settings, parts: Prepared) -> tuple[float, float]:
    """Microseconds of a training step of this run's model and of the same without a block: medians of steps made in turn.

    Of this thread's processor time: a machine that is shared takes nothing from it, and with one thread of torch the whole step, backward pass included,
    is this thread's work.
    """
    states = [_start(make_model(run, parts)) for run in (settings, replace(settings, rule=NONE))]
    x, seen = parts.train.x[: settings.batch], parts.train.seen[: settings.batch]
    times: list[list[float]] = [[], []]
    for _ in range(TIMED_STEPS):
        for state, found in zip(states, times, strict=True):
            start = time.thread_time_ns()
            state.step(x, seen)
            found.append((time.thread_time_ns() - start) / 1e3)
    own, plain = map(statistics.median, times)
    return own, plain


def _epoch(state: State, part: Part, batch: int) -> None:
    rows = len(part.x)
    batch = min(batch, rows)
    if isinstance(state.model, HIVAE):
        state.model.set_epoch(state.epoch)
    batches = torch.randperm(rows)[: rows // batch * batch].view(-1, batch)
    for index in batches:
        state.step(part.x[index], part.seen[index])
    state.epoch += 1


def validate(state: State, parts: Prepared, epoch: int) -> None:
    """Keeps the numbers and the weights of this epoch if none had a better likelihood on the validation rows."""
    part = parts.validation
    predicted, log_prob = state.model.reconstruct(part.x, part.seen)  # type: ignore[operator]
    cells = part.seen.sum(0)
    score = ((log_prob * part.seen).sum(0) / cells)[cells > 0].mean().item()
    if not (math.isfinite(score) and score > state.kept.get("validation_log_likelihood", -math.inf)):
        return
    state.kept = {
        "best_epoch": epoch,
        "validation_log_likelihood": score,
        "validation_error": _number(errors(predicted, part, parts.columns).nanmean().item()),
    }
    state.best = {name: x.clone() for name, x in state.model.state_dict().items()}


def _test(model: nn.Module, weights: dict[str, Tensor], parts: Prepared) -> dict[str, object]:
    """The errors of the best epoch's weights on the test rows."""
    model.load_state_dict(weights)
    predicted, _ = model.reconstruct(parts.test.x, parts.test.seen)  # type: ignore[operator]
    test_errors = errors(predicted, parts.test, parts.columns)
    names = [column.name for column in parts.columns]
    return {
        "test_error": _number(test_errors.nanmean().item()),
        "test_errors": {name: _number(error) for name, error in zip(names, test_errors.tolist(), strict=True)},
    }


def _number(x: float) -> float | None:
    return x if math.isfinite(x) else None
