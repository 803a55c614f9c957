"""One training run of a multimodal VAE, which can be cut off at any moment and goes on where its last checkpoint was."""

import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mmfast
from mmfast.console import missing
from mmfast.data import triplets
from mmfast.data.triplets import Triplets
from mmfast.experiments.checkpoint import taken_up, write_checkpoint
from mmfast.experiments.grid import Experiment, Tick
from mmfast.experiments.multimodal import judges, metrics
from mmfast.experiments.multimodal.conflict import Probe
from mmfast.experiments.multimodal.results import RECORD, Result, Scores
from mmfast.experiments.multimodal.settings import LATENT, MIXTURES, OBJECTIVES, Settings
from mmfast.experiments.run import diverged
from mmfast.experiments.settings import NONE, make_resolver
from mmfast.models.multimodal import MultimodalVAE
from mmfast.models.multimodal.networks import mnist_svhn_text

SAVE_SECONDS = 20.0  # between checkpoints
TICK_SECONDS = 1.0


@dataclass
class Parts:
    """The triplets of a run."""

    train: Triplets
    validation: Triplets
    test: Triplets  # the same for every seed


@dataclass
class State:
    """All that a run needs to go on."""

    model: MultimodalVAE
    optimizer: torch.optim.Optimizer
    step: int = 0  # done
    nll: list[float] = field(default_factory=list)  # of each epoch
    best: dict[str, Tensor] = field(default_factory=dict)  # the weights of the best epoch
    conflict: list[list[float]] = field(default_factory=list)
    step_us: list[float] = field(default_factory=list)

    def save(self, path: Path, settings: Settings) -> None:
        """Keeps it in a file."""
        state: dict[str, Any] = {name: getattr(self, name) for name in ("step", "nll", "best", "conflict", "step_us")}
        state |= {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "random": torch.get_rng_state()}
        if torch.cuda.is_available():
            state["random_cuda"] = torch.cuda.get_rng_state()
        write_checkpoint(path, {"settings": asdict(settings), "size": asdict(settings.sizes), **state})

    def load(self, path: Path, settings: Settings) -> None:
        """Takes up a checkpoint, if there is one of this very run.

        Raises:
            SettingsError: it cannot be read, or the model has changed since.
        """
        with taken_up(path, asdict(settings)) as saved:
            if saved is None or saved["size"] != asdict(settings.sizes):
                return
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            torch.set_rng_state(saved["random"])
            if "random_cuda" in saved:
                torch.cuda.set_rng_state(saved["random_cuda"])
            for name in ("step", "nll", "best", "conflict", "step_us"):
                setattr(self, name, saved[name])


def device_of() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_parts(run: Settings) -> Parts:
    """The triplets of a run: pairs, places of the words and split by its seed, but always the same for the test.

    Raises:
        DataError: the data set can't be had.
    """
    size = run.sizes
    train, validation = triplets.split(triplets.load(run.data, "train", run.seed, size.most, size.repeats), run.seed)
    return Parts(train, validation, triplets.load(run.data, "test", 0, size.test_most, size.test_repeats))


def make_model(run: Settings, device: torch.device) -> MultimodalVAE:
    """The model of a run, with the same first weights whatever its objective, blocks and rule."""
    torch.manual_seed(run.seed)
    modalities = mnist_svhn_text(LATENT, run.sizes.width)
    rule = None if run.rule == NONE else lambda: make_resolver(run.rule)
    return MultimodalVAE(modalities, LATENT, MIXTURES[run.model], run.objective, run.sizes.samples, run.blocks, rule).to(device)  # type: ignore[arg-type]


def train(run: Settings, folder: Path, checkpoint: Path | None = None, tick: Tick = lambda epochs, remark: None) -> Result:
    """Trains a run to its end and measures what it came to.

    Args:
        run: see `settings`.
        folder: of the grid: the classifiers that judge what is generated are kept there, and a picture of what it generates.
        checkpoint: the file where it keeps its state; taken up if it is there already.
        tick: called about once in a second, and after each epoch.

    Raises:
        DataError: the data set can't be had.
        SettingsError: the checkpoint can't be taken up.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _train(run, folder, checkpoint, tick)
    finally:
        torch.set_num_threads(threads)


def _train(run: Settings, folder: Path, checkpoint: Path | None, tick: Tick) -> Result:
    parts, device, size = load_parts(run), device_of(), run.sizes
    model = make_model(run, device)
    state = State(model, torch.optim.Adam(model.parameters(), size.learning_rate, amsgrad=True, fused=True))
    torch.manual_seed(
        run.seed * len(OBJECTIVES) + OBJECTIVES.index(run.objective) + 1
    )  # batches and noise: the same whatever the blocks and the rule
    if checkpoint is not None:
        state.load(checkpoint, run)
    batch = min(size.batch, len(parts.train))
    per_epoch = len(parts.train) // batch
    steps = run.epochs * per_epoch
    probe = Probe(model, _to(parts.validation.batch(slice(0, size.batch)), device))
    looks = {round(i * (steps - 1) / max(size.probes - 1, 1)) for i in range(size.probes)}
    saved = ticked = time.monotonic()
    for step, index in _batches(run, parts.train, batch, state.step, steps):
        if step % per_epoch == 0 and diverged(model):  # looked at here, a run that is taken up ends in the same place
            break
        if step in looks:
            look = probe.look()
            state.conflict += [[float(step), *look]] if all(map(math.isfinite, look)) else []
        start = time.thread_time_ns()
        for group in state.optimizer.param_groups:
            group["lr"] = size.learning_rate * min(1.0, (step + 1) / max(size.warm_up, 1))
        state.optimizer.zero_grad()
        model.loss(_to(parts.train.batch(index), device)).backward()
        state.optimizer.step()
        state.step_us.append((time.thread_time_ns() - start) / 1e3)
        state.step = step + 1
        ended = state.step % per_epoch == 0
        if ended:
            _validate(state, parts, device)
        if ended or time.monotonic() - ticked > TICK_SECONDS:
            tick(state.step / per_epoch, f"nll {state.nll[-1]:.0f}" if state.nll else "")
            ticked = time.monotonic()
        if checkpoint is not None and (ended or time.monotonic() - saved > SAVE_SECONDS):
            state.save(checkpoint, run)
            saved = time.monotonic()
    return _finished(run, state, parts, folder, device)


def _to(inputs: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: x.to(device) for name, x in inputs.items()}


def _batches(run: Settings, data: Triplets, batch: int, first: int, steps: int) -> Iterator[tuple[int, Tensor]]:
    """Each step that is to be made with the places of its triplets; an epoch's order depends on the seed and the epoch alone."""
    per_epoch = len(data) // batch
    for step in range(first, steps):
        epoch, place = divmod(step, per_epoch)
        if step == first or place == 0:
            order = torch.randperm(len(data), generator=torch.Generator().manual_seed(run.seed * 1_000_003 + epoch))
        yield step, order[place * batch : (place + 1) * batch]


def _validate(state: State, parts: Parts, device: torch.device) -> None:
    """Keeps the weights of this epoch if none had a smaller nll on the validation triplets."""
    value = metrics.nll(state.model, parts.validation, device)
    if math.isfinite(value) and value < min(filter(math.isfinite, state.nll), default=math.inf):
        state.best = {name: x.clone() for name, x in state.model.state_dict().items()}
    state.nll.append(value)


def _finished(run: Settings, state: State, parts: Parts, folder: Path, device: torch.device) -> Result:
    """What a run came to, by the weights of its best epoch."""
    start = time.thread_time()
    known, accuracy = judges.ready(folder, run.data, run.sizes, device)
    validation = test = None
    if state.best:
        state.model.load_state_dict(state.best)
        torch.manual_seed(run.seed)
        validation, test = _scores(run, state.model, parts, known, device)
        if not missing({"matplotlib": "matplotlib"}):
            from mmfast.experiments.multimodal import pictures

            pictures.generated(state.model, parts.test, device, folder / "pictures" / f"{run.name}.png", run.label)
    finite = [x for x in state.nll if math.isfinite(x)]
    versions = {"mmfast": mmfast.__version__, "torch": torch.__version__}
    return Result(
        run,
        len(state.nll),
        state.nll.index(min(finite)) + 1 if finite else None,
        [x if math.isfinite(x) else None for x in state.nll],
        validation,
        test,
        accuracy,
        state.conflict,
        statistics.median(state.step_us),
        time.thread_time() - start,
        asdict(run.sizes),
        versions,
    )


def _scores(run: Settings, vae: MultimodalVAE, parts: Parts, known: metrics.Judges, device: torch.device) -> tuple[Scores, Scores]:
    size = run.sizes
    classify = metrics.latent_classifiers(*metrics.latents(vae, parts.train, device, size.latents))
    found = []
    for part in (parts.validation, parts.test):
        matrix = metrics.latent_accuracy(classify, *metrics.latents(vae, part, device))
        found.append(Scores(matrix.tolist(), *metrics.self_and_cross(matrix)))
    validation, test = found
    test.coherence = metrics.coherence(vae, known, parts.test, device)
    test.joint_coherence = metrics.joint_coherence(vae, known, len(parts.test), device)
    likelihood = metrics.log_likelihood(vae, parts.test, size.likelihood_rows, size.likelihood_samples, device)
    test.log_likelihood = likelihood if math.isfinite(likelihood) else None
    return validation, test


def _groups(runs: Sequence[Settings]) -> list[tuple[Settings, ...]]:
    return [(run,) for run in runs]


def _group(runs: Sequence[Settings], folder: Path, checkpoint: Path, tick: Tick) -> list[Result]:
    return [train(run, folder, checkpoint, tick) for run in runs]


EXPERIMENT = Experiment(RECORD, Result.of, _groups, _group)
