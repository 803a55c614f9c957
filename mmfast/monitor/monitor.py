"""Monitor: streams what every block of a model sees to a file, to TensorBoard or to a function."""

import atexit
from collections import deque
from itertools import chain
from pathlib import Path
from time import perf_counter
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from mmfast import contract
from mmfast.monitor.sinks import MOST_PAIRS, CsvFile, Row, Sink, function, tensorboard
from mmfast.monitor.watch import Watched, blocks_of, means_of, recorded

SECONDS, REST = 1.0, 300  # from fetch to fetch: a second, or this many times what the last one took on the host
MOST_HELD = 1 << 20  # numbers of a block on its device: 8 MiB

_open: "WeakSet[Monitor]" = WeakSet()


class Monitor:
    """Streams every block's conflict rate, weights, norms and cosines to a file, to TensorBoard or to a function, while a model trains.

    Call `step()` once in each training step, behind the backward pass. It keeps what the blocks recorded, on their device; about once a second, or more rarely where that would take more than a third of a percent of the time, the rows that
    are complete are copied from there, while training goes on: no step waits for the device. A row holds means over the backward passes since
    the row before: the norm and weight of a branch over those in which it had a gradient, a cosine over those in which both had one; with
    per="sample", over up to 256 samples of the last pass. NaN where there was none, or one that was no number. A pass counts if it is the block's last before a
    `step()`: of micro-batches whose gradients accumulate, each that has a `step()` behind it.

    Args:
        model: an `nn.Module` with blocks (`ImpartialityBlock`, `LinearHeads`), or one that `attach` was called on before; or a handle of `attach`.
            Compiled or wrapped as may be. Blocks that come later are not seen.
        to: path of a CSV file; a SummaryWriter, or what has `add_scalar` and `add_histogram`; or a function of the step and a dict of numbers by name,
            such as `lambda step, values: wandb.log(values, step=step)`. A CSV file that is there is gone on with: its rows from the first new step on are
            written anew. Of several processes the one of rank 0 writes, and blocks with `group=` see the whole batch.
        every: steps from row to row.

    The CSV file has a column `step`, and for each block, under its name in the model, `conflict_rate`, `weights/BRANCH`, `norms/BRANCH` and `cosines/BRANCH,BRANCH`;
    `mmfast plot run.csv` draws it. A `to` that fails is told of in a warning, and training goes on.

    Raises:
        TypeError, ValueError: an argument is not as described; model has no blocks; at the first `step()`, the CSV file has other columns.

    Example:
        >>> encoder, block = nn.Linear(4, 3), mf.ImpartialityBlock([nn.Linear(3, 1), nn.Linear(3, 2)], mf.UPGrad())
        >>> with mf.Monitor(block, to=lambda step, values: print(step, *values), every=2) as monitor:
        ...     for _ in range(2):
        ...         sum(out.square().mean() for out in block(encoder(torch.randn(8, 4)))).backward()
        ...         monitor.step()
        2 block/conflict_rate block/weights/0 block/weights/1 block/norms/0 block/norms/1 block/cosines/0,1
    """

    def __init__(self, model: nn.Module, to: Any, every: int = 10) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is a {type(model).__name__}, expected an nn.Module with blocks, or a handle of mmfast.attach")
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise ValueError(f"every is {every!r}, expected a whole number of at least 1")
        if isinstance(to, (str, Path)):
            to = Path(to)
            if to.is_dir():
                raise ValueError(f"to is {str(to)!r}, a folder, expected the path of a CSV file")
        elif not callable(to) and not (hasattr(to, "add_scalar") and hasattr(to, "add_histogram")):
            raise TypeError(f"to is a {type(to).__name__}, expected the path of a CSV file, a SummaryWriter or a function")
        self.to, self.every = to, every
        self._blocks = blocks_of(model)
        self._columns = [column for block in self._blocks for column in block.columns]
        self._sink: Sink | None = None
        self._idle = False  # on ranks that do not write
        self._begun = self._removed = self._rows = False
        self._step = self._since = 0
        self._steps: list[int] = []  # of the rows that are complete, but not fetched
        self._coming: deque[tuple[list[int], list[list[int]], Copy]] = deque()
        self._fetched, self._took = float("-inf"), 0.0  # when, by perf_counter, and how long the host was busy with it
        _open.add(self)

    def step(self, step: int | None = None) -> None:
        """Takes in what the blocks recorded since the last call.

        Args:
            step: its number, for the rows; by default one more than the last, or than the last in the CSV file.
        """
        if self._removed:
            raise RuntimeError("this monitor was removed; make another one")
        if not self._begun:
            self._begin(step)
        if self._idle:
            return
        self._step = self._step + 1 if step is None else step
        # where no block has a new record, a CUDA graph may have written into the old ones
        seen = [block.look() for block in self._blocks]
        if not any(seen):
            for block in self._blocks:
                block.look_again()
        self._since += 1
        if self._since >= self.every:
            self._end_row()
            if perf_counter() - self._fetched > max(SECONDS, REST * self._took) or max(block.held for block in self._blocks) > MOST_HELD:
                self._fetch()
        if self._coming and self._coming[0][2].arrived():
            begin = perf_counter()
            self._write(wait=False)
            self._took = perf_counter() - begin

    def _begin(self, step: int | None) -> None:
        distributed = torch.distributed
        self._idle = distributed.is_available() and distributed.is_initialized() and distributed.get_rank() != 0
        if not self._idle:
            if isinstance(self.to, Path):
                file = CsvFile(self.to, self._columns)
                self._step = file.last or 0
                file.first = self._step + 1 if step is None else step
                self._sink = file
            elif hasattr(self.to, "add_scalar"):
                self._sink = tensorboard(self.to, self._columns, _many_pairs(self._blocks))
            else:
                self._sink = function(self.to, self._columns)
        self._begun = True

    def _end_row(self) -> None:
        self._since = 0
        self._steps.append(self._step)
        for block in self._blocks:
            block.end_row()

    def _fetch(self) -> None:
        """Starts the complete rows on their way to the host."""
        self._fetched = perf_counter()
        taken = [block.take() for block in self._blocks]
        steps, self._steps = self._steps, []
        self._coming.append((steps, [counts for _, counts in taken], Copy([vectors for vectors, _ in taken])))

    def _write(self, wait: bool) -> None:
        """Hands on the rows that have arrived."""
        while self._coming and (wait or self._coming[0][2].arrived()):
            steps, counts, copy = self._coming.popleft()
            parts = zip(self._blocks, counts, copy.parts(), strict=True)
            made = [(*recorded(part.view(-1, block.k + block.k**2), mine, block.k), block.k) for block, mine, part in parts]
            tables = [means_of(*one) for one in made]
            full = [any(mine) for mine in zip(*(mine for _, mine, _ in made), strict=True)]
            there: list[Row] = [(step, list(chain(*parts))) for step, any_, *parts in zip(steps, full, *tables, strict=True) if any_]
            self._rows |= bool(there)
            if isinstance(self._sink, CsvFile):
                self._hand_on(there)
            else:
                for row in there:
                    self._hand_on([row])

    def _hand_on(self, rows: list[Row]) -> None:
        assert self._sink is not None
        try:
            self._sink(rows)
        except Exception as error:  # noqa: BLE001 whatever fails there, a training run goes on
            contract.tell(f"mmfast.Monitor could not write to {self.to}: {type(error).__name__}: {error}")

    def plot(self, path: str | Path) -> None:
        """Draws the CSV file as it is now: cosines, conflict rate, weights and norms of every block. Needs matplotlib.

        Args:
            path: of an image file, such as "run.png" or "run.svg".

        Raises:
            RuntimeError: there is no CSV file, or no row in it yet.
        """
        if not isinstance(self.to, Path):
            raise RuntimeError(f"to is a {type(self.to).__name__}, which keeps no rows to draw; expected a CSV file")  # noqa: TRY004
        if self._idle:
            return
        self._fetch()
        self._write(wait=True)
        if not self.to.is_file():
            raise RuntimeError(f"{self.to} has no row yet: the first comes with call {self.every} of step(), or with remove()")
        from mmfast.plots.figure import draw
        from mmfast.plots.log import read

        draw(read(self.to), path)

    def remove(self) -> None:
        """Writes what there is since the last row, and ends; leaving a `with`, the function whose local it is, or the program, does too. The model was never changed."""
        if self._removed:
            return
        self._removed = True
        _open.discard(self)
        if self._idle:
            return
        if not self._begun:
            if any(block.look() for block in self._blocks):
                contract.tell(
                    "monitor.step() of an mmfast.Monitor was never called, so it wrote nothing; call it once in each training step"
                )
            return
        if self._since:
            self._end_row()
        self._fetch()
        self._write(wait=True)
        if not self._rows:
            contract.tell("no block that an mmfast.Monitor watched had a backward pass, so it wrote nothing")

    def __del__(self) -> None:  # a local of a function that trains goes before the program ends, and its last rows would go with it
        if "_removed" in self.__dict__:  # else the constructor raised
            self.remove()

    def __enter__(self) -> "Monitor":  # noqa: PYI034 typing has Self from Python 3.11 on
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


@atexit.register
def _remove_all() -> None:
    for monitor in list(_open):
        monitor.remove()


class Copy:
    """Records on their way to the host, in one copy for each device."""

    def __init__(self, blocks: list[list[Tensor]]) -> None:
        self._sizes = [sum(len(vector) for vector in vectors) for vectors in blocks]
        vectors_of: dict[torch.device, list[Tensor]] = {}
        self._order: dict[torch.device, list[int]] = {}  # numbers of the blocks, by device
        for number, vectors in enumerate(blocks):
            if vectors:
                device = vectors[-1].device
                vectors_of.setdefault(device, []).extend(vector.to(device, non_blocking=True) for vector in vectors)
                self._order.setdefault(device, []).append(number)
        self._on_host = {device: self._start(torch.cat(vectors)) for device, vectors in vectors_of.items()}

    @staticmethod
    def _start(joined: Tensor) -> tuple[Tensor, Any]:
        """(where it will be, an event that tells when, or None)."""
        if not joined.is_cuda:
            return joined.cpu(), None
        host = torch.empty(joined.shape, dtype=joined.dtype, pin_memory=True)
        host.copy_(joined, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(joined.device))
        return host, event

    def arrived(self) -> bool:
        return all(event is None or event.query() for _, event in self._on_host.values())

    def parts(self) -> list[Tensor]:
        """Each block's records, float64 [...] on the CPU; waits for them."""
        parts = [torch.empty(0, dtype=torch.float64)] * len(self._sizes)
        for device, (host, event) in self._on_host.items():
            if event is not None:
                event.synchronize()
            numbers = self._order[device]
            for number, part in zip(numbers, host.split([self._sizes[n] for n in numbers]), strict=True):
                parts[number] = part
        return parts


def _many_pairs(blocks: list[Watched]) -> dict[str, list[str]]:
    """The columns of cosines of blocks with too many to show each."""
    pairs = {block.name: block.columns[1 + 2 * block.k :] for block in blocks}
    return {f"{name}/cosines": columns for name, columns in pairs.items() if len(columns) > MOST_PAIRS}
