"""One training run, which can be cut off at any moment and goes on where its last checkpoint was."""

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

import mmfast
from mmfast import data
from mmfast.data.prepare import Part, Prepared, errors, prepare
from mmfast.data.table import Table
from mmfast.models.hivae import HIVAE
from mmfast.models.likelihoods import Joint
from mmfast.models.vae import VAE
from mmfast.train.results import Result
from mmfast.train.settings import NONE, Settings, make_resolver

HIDDEN = 50
LEARNING_RATE = 1e-3
SAVE_SECONDS = 1.0  # between checkpoints
TIMED_STEPS = 60

Tick = Callable[[int, str], None]  # epochs done, a remark


@dataclass
class State:
    """All that a run needs to go on."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    epoch: int = 0  # done
    best: float = float("-inf")  # validation log-likelihood
    kept: dict[str, float | list[float]] = field(default_factory=dict)  # the numbers of the best epoch

    def step(self, x: Tensor, seen: Tensor) -> None:
        """One step of training on a batch."""
        self.optimizer.zero_grad()
        self.model.loss(x, seen).backward()  # type: ignore[operator]
        self.optimizer.step()

    def save(self, path: Path, settings: Settings) -> None:
        """Replaces the checkpoint in one move: a kill leaves the old one or the new one."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".part{os.getpid()}")
        torch.save(
            {
                "settings": vars(settings),
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "random": torch.get_rng_state(),
                "epoch": self.epoch,
                "best": self.best,
                "kept": self.kept,
            },
            part,
        )
        part.replace(path)

    def load(self, path: Path, settings: Settings) -> None:
        """Takes up a checkpoint, if there is one of this very run."""
        if not path.exists():
            return
        saved = torch.load(path)
        if saved["settings"] != vars(settings):
            return
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["random"])
        self.epoch, self.best, self.kept = saved["epoch"], saved["best"], saved["kept"]


def make_model(settings: Settings, parts: Prepared) -> nn.Module:
    """The model of a run, with the same first weights whatever its rule."""
    torch.manual_seed(settings.seed)
    blocks = 2 if settings.model in ("dreg", "hivae") else 1
    rules = [rule for rule in (make_resolver(settings.rule) for _ in range(blocks)) if rule is not None] or None
    joint = Joint([column.likelihood for column in parts.columns], parts.w)
    torch.manual_seed(settings.seed)
    if settings.model == "hivae":
        return HIVAE(joint, resolvers=rules)
    return VAE(joint, HIDDEN, max(1, (len(parts.columns) + 1) // 2), rules, settings.model, settings.samples)


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
        _validate(state, parts)
        diverged = any(bool(p.isnan().any()) for p in model.parameters())
        tick(state.epoch, f"test error {state.kept.get('test_error', torch.nan):.3f}")
        if checkpoint is not None and (time.monotonic() - saved > SAVE_SECONDS or state.epoch == settings.epochs):
            state.save(checkpoint, settings)
            saved = time.monotonic()
        if diverged:  # what was kept before stands
            break
    kept = state.kept
    names = [column.name for column in parts.columns]
    return Result(
        settings,
        int(kept.get("epoch", 0)),  # type: ignore[arg-type]
        state.best,
        kept.get("validation_error", torch.nan),  # type: ignore[arg-type]
        kept.get("test_error", torch.nan),  # type: ignore[arg-type]
        dict(zip(names, kept.get("test_errors", []), strict=False)),  # type: ignore[arg-type]
        *_step_times(settings, parts),
        {"mmfast": mmfast.__version__, "torch": torch.__version__},
    )


def _start(model: nn.Module) -> State:
    return State(model, torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, fused=True))


def _step_times(settings: Settings, parts: Prepared) -> tuple[float, float]:
    """Microseconds of a training step of this run's model and of the same without a block: medians of steps made in turn, so a busy machine favours none."""
    states = [_start(make_model(run, parts)) for run in (settings, replace(settings, rule=NONE))]
    x, seen = parts.train.x[: settings.batch], parts.train.seen[: settings.batch]
    times: list[list[float]] = [[], []]
    for _ in range(TIMED_STEPS):
        for state, found in zip(states, times, strict=True):
            start = time.perf_counter()
            state.step(x, seen)
            found.append((time.perf_counter() - start) * 1e6)
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


def _validate(state: State, parts: Prepared) -> None:
    """Keeps the numbers of this epoch if none had a better likelihood on the validation rows."""
    part = parts.validation
    predicted, log_prob = state.model.reconstruct(part.x, part.seen)  # type: ignore[operator]
    cells = part.seen.sum(0)
    score = ((log_prob * part.seen).sum(0) / cells)[cells > 0].mean().item()
    if not score > state.best:
        return
    state.best = score
    test_errors = _test_errors(state.model, parts)
    state.kept = {
        "epoch": state.epoch,
        "validation_error": errors(predicted, part, parts.columns).nanmean().item(),
        "test_error": test_errors.nanmean().item(),
        "test_errors": test_errors.tolist(),
    }


def _test_errors(model: nn.Module, parts: Prepared) -> Tensor:
    predicted, _ = model.reconstruct(parts.test.x, parts.test.seen)  # type: ignore[operator]
    return errors(predicted, parts.test, parts.columns)
