"""The CSV file of a Monitor: its columns, and reading it. A row holds every block's conflict rate, weights, norms and cosines."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from math import nan
from pathlib import Path

MOST_ROWS = 2000  # that a picture shows; of more, every second or third one, and the last
_CONFLICT, _WEIGHTS, _NORMS, _COSINES = "/conflict_rate", "/weights/", "/norms/", "/cosines/"


class LogError(ValueError):
    """A file that no Monitor wrote."""


@dataclass
class BlockLog:
    """What one block saw, a list entry for each row; NaN where there was nothing to see."""

    name: str
    branches: tuple[str, ...]  # K
    conflict: list[float] = field(default_factory=list)
    weights: list[list[float]] = field(default_factory=list)  # of K
    norms: list[list[float]] = field(default_factory=list)  # of K
    cosines: list[list[float]] = field(default_factory=list)  # of the K (K - 1) / 2 pairs, in the order of itertools.combinations


@dataclass
class Log:
    """A run."""

    steps: list[int]
    blocks: list[BlockLog]
    rows: int  # in the file, of which `steps` may be a part


def columns(block: str, branches: Sequence[str]) -> list[str]:
    """The names of a block's columns."""
    return [
        block + _CONFLICT,
        *(block + _WEIGHTS + name for name in branches),
        *(block + _NORMS + name for name in branches),
        *(f"{block}{_COSINES}{a},{b}" for a, b in combinations(branches, 2)),
    ]


def _blocks(header: Sequence[str]) -> list[BlockLog]:
    """The blocks whose columns these are."""
    found, at = [], 1
    while at < len(header):
        block = header[at].removesuffix(_CONFLICT)
        branches = []
        for column in header[at + 1 :]:
            if not column.startswith(block + _WEIGHTS):
                break
            branches.append(column.removeprefix(block + _WEIGHTS))
        mine = columns(block, branches)
        if not branches or list(header[at : at + len(mine)]) != mine:
            raise LogError(f"column {at + 1} is {header[at]!r}, with which no block of a Monitor's file begins")
        found.append(BlockLog(block, tuple(branches)))
        at += len(mine)
    return found


def read(path: str | Path) -> Log:
    """The rows of a Monitor's CSV file, at most about 2,000 of them.

    Args:
        path: of the file. A last line that was cut off is left out.

    Raises:
        LogError: no Monitor wrote this.
    """
    try:
        with Path(path).open(newline="", encoding="utf-8") as file:
            header = next(csv.reader(file), [])
            if header[:1] != ["step"] or len(header) < 2:
                raise LogError(f"{path} does not begin with a column 'step', expected a file that mmfast.Monitor wrote")
            lines = [line for line in file if line.endswith("\n")]
    except UnicodeDecodeError as error:
        raise LogError(f"{path} is no text in UTF-8, as mmfast.Monitor writes it: {error}") from None
    log = Log([], _blocks(header), len(lines))
    if not lines:
        raise LogError(f"{path} holds no rows yet")
    stride = -(-len(lines) // MOST_ROWS)
    kept = lines[(len(lines) - 1) % stride :: stride]  # with the last one
    for number, cells in enumerate(csv.reader(kept)):
        try:
            if len(cells) != len(header):
                raise ValueError(f"{len(cells)} cells, expected {len(header)}")
            step, values = int(cells[0]), [float(cell) if cell else nan for cell in cells[1:]]
        except ValueError as error:
            raise LogError(f"{path}, row {(len(lines) - 1) % stride + number * stride + 1}: {error}") from None
        log.steps.append(step)
        for block in log.blocks:
            k = len(block.branches)
            n = 1 + 2 * k + k * (k - 1) // 2
            mine, values = values[:n], values[n:]
            block.conflict.append(mine[0])
            block.weights.append(mine[1 : 1 + k])
            block.norms.append(mine[1 + k : 1 + 2 * k])
            block.cosines.append(mine[1 + 2 * k :])
    return log
