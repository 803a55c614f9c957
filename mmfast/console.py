"""What the commands share: how they fail, what they need, how they show that they get on."""

import importlib.util
import os
import sys
import time
from types import TracebackType
from typing import Any, NoReturn

SECONDS = 30.0  # between two lines of progress where there is no terminal
INTERRUPTED = 130  # the exit code of a process that Ctrl-C ended, as shells count


def fail(message: str, code: int = 2) -> NoReturn:
    """Ends the command with an error."""
    print(f"mmfast: {message}", file=sys.stderr)
    raise SystemExit(code)


def missing(packages: dict[str, str]) -> list[str]:
    """Those of these modules (name on import -> name on install) that are not installed, by their name on install."""
    return [package for module, package in packages.items() if not _found(module)]


def _found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # sys.modules holds None for it
        return False


def need(command: str, extra: str, packages: dict[str, str]) -> None:
    """Fails where one of these modules is missing."""
    if names := missing(packages):
        fail(f"{command} needs {', '.join(names)}: pip install 'mmfast[{extra}]'")


class Progress:
    """Bars in a terminal; elsewhere a line for what is finished, and one every half minute.

    Called with a task's name, how much is done, of how much, and a remark; a task with keep=False leaves the screen once it is finished.
    """

    def __init__(self) -> None:
        self._bars: Any = None
        self._tasks: dict[str, Any] = {}
        self._finished: set[str] = set()
        self._last = -SECONDS
        if sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

            self._bars = Progress(
                TextColumn("{task.description:<14}", markup=False),
                BarColumn(),
                TaskProgressColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(elapsed_when_finished=False),
                TextColumn("{task.fields[remark]}", markup=False),
            )

    def __enter__(self) -> "Progress":  # noqa: PYI034 typing has Self from Python 3.11 on
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bars is not None:
            self._bars.stop()

    def __call__(self, task: str, done: float, total: float, remark: str = "", keep: bool = True) -> None:
        if self._bars is None:
            self._line(task, done, total, remark)
            return
        if task not in self._tasks:
            self._tasks[task] = self._bars.add_task(task, total=total, remark=remark)
        self._bars.update(self._tasks[task], completed=done, remark=remark, visible=keep or done < total)

    def _line(self, task: str, done: float, total: float, remark: str) -> None:
        now, over = time.monotonic(), done >= total
        if task in self._finished or not (over or now - self._last >= SECONDS):
            return
        if over:
            self._finished.add(task)
        self._last = now
        print(f"{task}: {done / max(total, 1):.0%}{f', {remark}' if remark else ''}", flush=True)
