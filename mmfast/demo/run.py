"""Trains the two models, measures what their gradients do where they meet, and times the ways to write the block."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from mmfast.blocks.block import ImpartialityBlock
from mmfast.data.prepare import Part, Prepared, errors, prepare
from mmfast.data.table import Table
from mmfast.demo import naive, peer
from mmfast.demo.model import Join, Loop, gradients, make_model
from mmfast.models.likelihoods import Joint
from mmfast.models.vae import VAE
from mmfast.ops import gram
from mmfast.resolvers import resolver
from mmfast.stats import cosines, norms

WITHOUT, WITH = "without block", "with block"
ALONE, OURS, PEER, LOOPS = "no block", "mmfast", "TorchJD", "naive loops"  # what is timed
MOST = 32  # features of a table that TorchJD is trained on: beyond, its steps take too long for a demonstration
HIDDEN = 50
TIMING_SECONDS = 10.0  # for each way to write the block: loops over hundreds of features take seconds a step
CHECKS = 60  # how often a training is validated and its gradients are looked at

Progress = Callable[[str, int, int, str], None]  # task, done, total, remark
Step = Callable[[Tensor, Tensor], None]  # one training step on a batch: x and seen


@dataclass
class Conflict:
    """How the K gradients at the shared representation relate, at one moment of a training."""

    share: float  # of the pairs have a negative cosine
    cosine: float  # mean of the negative ones; 0 if there are none
    imbalance: float  # largest over smallest norm
    resolved: float | None  # the same of the norms times the block's weights, where there is a block


@dataclass
class Outcome:
    """What one training came to: test errors at the step with the best validation likelihood, and the conflicts on the way."""

    seed: int
    errors: Tensor  # [K]
    best_step: int
    steps: list[int] = field(default_factory=list)
    conflicts: list[Conflict] = field(default_factory=list)


@dataclass
class Speed:
    """Training steps per second, median over the rounds; None with a reason where it could not run."""

    label: str
    rule: str
    per_second: float | None
    reason: str = ""


@dataclass
class Rival:
    """The same rule in another library's hands and in ours: one training each, on the first seed."""

    rule: str
    ours: Outcome
    theirs: Outcome


@dataclass
class Settings:
    """What a run of the demonstration needs to know."""

    rule: str = "GradNorm"
    seeds: int = 3
    epochs: int | None = None  # as many as make `steps` if left out
    steps: int = 8000
    batch: int = 64
    timing_rounds: int = 20
    timing_steps: int = 8
    quick: bool = False  # too few steps for the errors to mean anything


@dataclass
class Result:
    """All that was measured on one table."""

    table: Table
    settings: Settings
    epochs: int
    outcomes: dict[str, list[Outcome]]
    speeds: list[Speed]
    rival: Rival | None = None  # where TorchJD is installed


def conflict(model: VAE, part: Part) -> Conflict:
    """The conflict of the model's K gradients on some rows, and what the block's last weights make of their norms."""
    G = gram(gradients(model, part.x, part.seen)).cpu()
    i, j = torch.triu_indices(len(G), len(G), 1)
    cosine = cosines(G)[i, j]
    cosine = cosine[~cosine.isnan()]
    negative = cosine[cosine < 0]
    return Conflict(
        share=len(negative) / max(1, len(cosine)),
        cosine=negative.mean().item() if len(negative) else 0.0,
        imbalance=_spread(norms(G)),
        resolved=_resolved(model.decoder.heads.join, norms(G)),  # type: ignore[arg-type]
    )


def _resolved(heads: nn.Module, lengths: Tensor) -> float | None:
    try:
        return _spread(heads.stats().weights.abs() * lengths) if isinstance(heads, ImpartialityBlock) else None
    except RuntimeError:  # an elementwise rule has no weights
        return None


def _spread(x: Tensor) -> float:
    """Largest over smallest, zeros left out."""
    x = x[x > 0]
    return (x.max() / x.min()).item() if len(x) else 1.0


def _model(table: Table, parts: Prepared, seed: int, join: Join) -> VAE:
    torch.manual_seed(seed)  # the same first weights whatever joins the heads
    k = len(table.columns)
    return make_model(Joint([column.likelihood for column in table.columns], parts.w), HIDDEN, max(1, (k + 1) // 2), join)


def _stepper(model: VAE) -> Step:
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)

    def step(x: Tensor, seen: Tensor) -> None:
        optimiser.zero_grad()
        model.loss(x, seen).backward()
        optimiser.step()

    return step


def _batch(settings: Settings, parts: Prepared) -> int:
    return min(settings.batch, len(parts.train.x))


def train(
    table: Table, parts: Prepared, seed: int, join: Join, settings: Settings, epochs: int, tick: Callable[[int, str], None]
) -> Outcome:
    """Trains one model and keeps the test errors of its best moment on the validation rows."""
    model = _model(table, parts, seed, join)
    step = _stepper(model)
    batch, rows = _batch(settings, parts), len(parts.train.x)
    probe = Part(parts.train.x[:256], parts.train.seen[:256])
    outcome = Outcome(seed, torch.full((len(table.columns),), torch.nan, dtype=torch.float64), 0)
    best, done = -torch.inf, 0
    every = max(1, epochs // CHECKS)
    torch.manual_seed(seed + 1)  # the same batches and noise for both models
    for epoch in range(epochs):
        for index in torch.randperm(rows)[: rows // batch * batch].view(-1, batch):
            step(parts.train.x[index], parts.train.seen[index])
            done += 1
        if (epoch + 1) % every and epoch + 1 < epochs:
            continue
        _, log_prob = model.reconstruct(parts.validation.x, parts.validation.seen)
        score = ((log_prob * parts.validation.seen).sum() / parts.validation.seen.sum()).item()
        if score > best:
            best, outcome.best_step = score, done
            predicted, _ = model.reconstruct(parts.test.x, parts.test.seen)
            outcome.errors = errors(predicted, parts.test, table.columns)
        outcome.steps.append(done)
        outcome.conflicts.append(conflict(model, probe))
        tick(epoch + 1, f"test error {outcome.errors.nanmean():.3f}")
    return outcome


def _contenders(table: Table, parts: Prepared, wanted: str) -> list[tuple[str, str, Step | None, str]]:
    """(label, rule, training step, remark) of everything to be timed; None with the reason where TorchJD is not there."""

    def joined(join: Join) -> Step:
        return _stepper(_model(table, parts, 0, join))

    written_out, common = naive.rules(len(table.columns)), peer.rule(wanted)
    names = [wanted, common or peer.COMMON]
    if wanted not in written_out:
        names.append("PCGrad")
    found: list[tuple[str, str, Step | None, str]] = [(ALONE, "", joined(Loop), "")]
    for name in dict.fromkeys(names):
        found.append((OURS, name, joined(partial(block, rule=name)), ""))
        if name == common:
            found.append((PEER, name, joined(peer.in_place(name)), "in the block's place"))
            found.append((PEER, name, peer.mtl_stepper(_model(table, parts, 0, Loop), name), "by its mtl_backward"))
        elif common is None and name == peer.COMMON:
            found.append((PEER, name, None, f"not installed: {peer.INSTALL}"))
        if name in written_out:
            found.append((LOOPS, name, joined(partial(naive.Materialised, aggregate=written_out[name])), ""))
    return found


def time_steps(table: Table, parts: Prepared, settings: Settings, tick: Callable[[int, str], None]) -> list[Speed]:
    """Steps per second of every way to write the block: in turns, so that a busy machine is unfair to none; the median counts."""
    batch = _batch(settings, parts)
    x, seen = parts.train.x[:batch], parts.train.seen[:batch]
    contenders = _contenders(table, parts, settings.rule)
    seconds: list[list[float]] = [[] for _ in contenders]
    for i in range(settings.timing_rounds + 1):
        for (_, _, step, _), times in zip(contenders, seconds, strict=True):
            if step is None:
                continue
            for _ in range(settings.timing_steps):
                if sum(times) > TIMING_SECONDS:
                    break
                start = time.perf_counter()
                step(x, seen)
                times.append(time.perf_counter() - start)
            if i == 0:
                times.clear()  # warm-up
        tick(i + 1, "")
    return [
        Speed(label, rule, 1 / statistics.median(times) if times else None, remark)
        for (label, rule, _, remark), times in zip(contenders, seconds, strict=True)
    ]


def block(heads: nn.ModuleList, rule: str) -> nn.Module:
    """The impartiality block with the rule of that name."""
    return ImpartialityBlock(heads, resolver(rule))


def _tick(progress: Progress, task: str, before: int, total: int, done: int, remark: str) -> None:
    progress(task, before + done, total, remark)


def run(table: Table, settings: Settings, progress: Progress) -> Result:
    """Both trainings on every seed, then the timing."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small a model gains nothing from more, and loses much on a busy machine
    try:
        return _run(table, settings, progress)
    finally:
        torch.set_num_threads(threads)


def _run(table: Table, settings: Settings, progress: Progress) -> Result:
    parts = prepare(table, 0)
    epochs = settings.epochs or max(1, round(settings.steps / (len(parts.train.x) // _batch(settings, parts))))
    rounds = settings.timing_rounds + 1
    joins: dict[str, Join] = {WITHOUT: Loop, WITH: partial(block, rule=settings.rule)}
    outcomes: dict[str, list[Outcome]] = {name: [] for name in joins}
    for task in joins:
        progress(task, 0, settings.seeds * epochs, "")
    progress("speed", 0, rounds, "")
    for seed in range(settings.seeds):
        parts = prepare(table, seed)
        for name, join in joins.items():
            tick = partial(_tick, progress, name, seed * epochs, settings.seeds * epochs)
            outcomes[name].append(train(table, parts, seed, join, settings, epochs, tick))
    rival = _rival(table, settings, epochs, outcomes[WITH][0], progress)
    speeds = time_steps(table, parts, settings, partial(_tick, progress, "speed", 0, rounds))
    return Result(table, settings, epochs, outcomes, speeds, rival)


def _rival(table: Table, settings: Settings, epochs: int, ours: Outcome, progress: Progress) -> Rival | None:
    """Trains with TorchJD's aggregator and, unless the demonstration did so, with our form of the same rule."""
    rule = peer.rule(settings.rule)
    if rule is None or len(table.columns) > MOST:
        return None
    parts = prepare(table, 0)
    total = epochs if rule == settings.rule else 2 * epochs
    theirs = train(table, parts, 0, peer.in_place(rule), settings, epochs, partial(_tick, progress, PEER, 0, total))
    if rule != settings.rule:
        ours = train(table, parts, 0, partial(block, rule=rule), settings, epochs, partial(_tick, progress, PEER, epochs, total))
    return Rival(rule, ours, theirs)
