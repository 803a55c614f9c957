"""Many runs, several at once, those that differ in seed and rule alone in one process: those that are done are never repeated, those that were cut off go on."""

import contextlib
import hashlib
import multiprocessing as mp
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from mmfast.experiments import results
from mmfast.experiments.checkpoint import part_of
from mmfast.experiments.memory import keep_memory
from mmfast.experiments.results import Result
from mmfast.experiments.run import train
from mmfast.experiments.settings import Settings, SettingsError, settings
from mmfast.experiments.together import groups, train_together

RECORD = "runs.jsonl"  # in the folder of a grid, beside its checkpoints

Tick = Callable[[float, str], None]  # epochs done, a remark
Progress = Callable[[Any, float, str], None]  # and whose they are


@dataclass(frozen=True)
class Experiment:
    """What a grid needs to know of its runs. Their settings have a name, a label for people and a number of epochs, their results settings and a line()."""

    record: str  # the file of finished runs
    result_of: Callable[[dict[str, Any]], Any]  # from what its line holds
    groups: Callable[[Sequence[Any]], list[tuple[Any, ...]]]  # of runs that are trained together
    train: Callable[[Sequence[Any], Path, Path, Tick], list[Any]]  # a group in the grid's folder, its checkpoint, a tick


def _train_tables(runs: Sequence[Settings], folder: Path, checkpoint: Path, tick: Tick) -> list[Result]:
    return [train(runs[0], checkpoint, tick)] if len(runs) == 1 else train_together(runs, checkpoint, tick)


TABLE1 = Experiment(RECORD, Result.of, groups, _train_tables)


@dataclass
class _Worker:
    """A process with one run, or several that are trained together."""

    runs: tuple[Any, ...]
    process: BaseProcess
    pipe: Connection


def table1(models: Sequence[str], data_sets: Sequence[str], rules: Sequence[str], seeds: int, epochs: int | None = None) -> list[Settings]:
    """The runs of Table 1 of Javaloy et al. (ICML 2022), seed by seed; what can't be trained together is trained in this order, so that a grid that is stopped
    early has whole columns."""
    runs = [settings(model, name, rule, seed, epochs) for seed in range(seeds) for name in data_sets for model in models for rule in rules]
    return list(dict.fromkeys(runs))  # a rule may have been named in two ways


def checkpoint_of(folder: Path, *runs: Any) -> Path:
    """Where a run of a grid, or several that are trained together, keep their state."""
    others = hashlib.sha256("".join(run.name for run in runs[1:]).encode()).hexdigest()[:8]
    return folder / "checkpoints" / f"{runs[0].name}{f'-with-{len(runs) - 1}-others-{others}' if runs[1:] else ''}.pt"


def one(run: Any, folder: Path, tick: Tick, experiment: Experiment = TABLE1) -> Any:
    """A run of the folder's grid, in this process: taken from the record if it is there, else trained and recorded."""
    with _alone(folder):
        done = recorded(folder, experiment)
        return (
            done[run] if run in done else _record(folder, experiment.train([run], folder, checkpoint_of(folder, run), tick), experiment)[0]
        )


def recorded(folder: Path, experiment: Experiment = TABLE1) -> dict[Any, Any]:
    """The results that a grid has on disk, by their settings.

    Raises:
        SettingsError: its record is not one.
    """
    return {found.settings: found for found in results.read(folder / experiment.record, experiment.result_of)}


def many(
    runs: Sequence[Any],
    folder: Path,
    processes: int,
    progress: Progress,
    failed: Callable[[Any, str], None],
    experiment: Experiment = TABLE1,
) -> list[Any]:
    """Trains what the folder's record does not hold yet, `processes` runs at once, and returns all results in the order of `runs`.

    Each result is on disk before the next run starts; a run that was cut off goes on from its checkpoint. A run that fails is reported and left out.

    Raises:
        SettingsError: another process works in this folder, or its record is not one.
    """
    with _alone(folder):
        done = recorded(folder, experiment)
        waiting = experiment.groups([run for run in dict.fromkeys(runs) if run not in done])
        workers: dict[Connection, _Worker] = {}
        try:
            while waiting or workers:
                while waiting and len(workers) < processes:
                    worker = _start(waiting.pop(0), folder, experiment)
                    workers[worker.pipe] = worker
                for pipe in wait(list(workers)):
                    worker = workers[pipe]  # type: ignore[index]
                    message = _receive(worker)
                    if isinstance(message, tuple):
                        for run in worker.runs:
                            progress(run, *message)
                        continue
                    worker.process.join()
                    del workers[worker.pipe]
                    if isinstance(message, list):
                        done |= {found.settings: found for found in _record(folder, message, experiment)}
                    else:
                        for run in worker.runs:
                            failed(run, message)
        finally:
            for worker in workers.values():
                worker.process.terminate()
                worker.process.join()
                part_of(checkpoint_of(folder, *worker.runs)).unlink(missing_ok=True)  # it may have been writing
        return [done[run] for run in runs if run in done]


def _record(folder: Path, found: list[Any], experiment: Experiment = TABLE1) -> list[Any]:
    """Writes results down; only then the runs' state may go."""
    results.append(folder / experiment.record, *found)
    checkpoint_of(folder, *[result.settings for result in found]).unlink(missing_ok=True)
    return found


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Holds the folder, so that no run is made twice; the lock goes with the process, however it ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("w")
    except OSError as error:
        raise SettingsError(f"{folder} cannot be used: {error.strerror}") from None
    with lock:
        if sys.platform != "win32":
            import fcntl

            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise SettingsError(f"another process trains in {folder}; wait for it, or choose another folder") from None
        yield


def _start(runs: tuple[Any, ...], folder: Path, experiment: Experiment) -> _Worker:
    context = mp.get_context("spawn")  # torch's threads do not survive a fork
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(runs, folder, theirs, os.getpid(), experiment), daemon=True)
    if sys.platform != "win32":
        resource_tracker.ensure_running()  # where the first process starts it, that lets Ctrl-C through again
    with _without_interrupts():
        process.start()
    theirs.close()  # so that its death is seen as the end of the pipe
    return _Worker(runs, process, ours)


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """What starts in here never sees Ctrl-C, which reaches every process of a terminal: its parent does, and ends it."""
    if sys.platform == "win32":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _receive(worker: _Worker) -> tuple[float, str] | list[Any] | str:
    try:
        message: tuple[float, str] | list[Any] | str = worker.pipe.recv()
    except EOFError:
        worker.process.join()
        return f"its process ended with code {worker.process.exitcode}"
    return message


def _work(runs: tuple[Any, ...], folder: Path, pipe: Connection, parent: int, experiment: Experiment) -> None:
    """The life of a process: one run, or several together."""

    def tick(epoch: float, remark: str) -> None:
        if os.getppid() != parent:  # who is left alone must not write into a folder that another grid may hold by now
            raise SystemExit
        pipe.send((epoch, remark))

    keep_memory()
    try:
        pipe.send(experiment.train(runs, folder, checkpoint_of(folder, *runs), tick))
    except Exception:  # noqa: BLE001 - whatever it is, the grid reports it and goes on
        pipe.send(traceback.format_exc())
