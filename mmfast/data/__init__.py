"""Data sets by name, with the kind of every column: `load("Wine")`."""

import csv
import math
from collections.abc import Iterable

import torch

from mmfast.data.files import read
from mmfast.data.sets import SETS, DataSet
from mmfast.data.table import Column, DataError, Table

__all__ = ["SETS", "Column", "DataError", "DataSet", "Table", "check", "load", "names"]

_MISSING = {"", "na", "nan"}


def names() -> list[str]:
    """Of the data sets that `load` knows."""
    return list(SETS)


def load(name: str) -> Table:
    """A data set of Table 1 of Javaloy et al. (ICML 2022), from the folder that MMFAST_DATA names, the user's cache, or where it was published.

    Args:
        name: one of `names()`.

    Returns:
        A `Table` with x [rows, columns] float64 on the CPU in original units, NaN where a cell is missing, classes as 0, 1, ...

    Raises:
        DataError: an unknown name, a file that cannot be had or has another checksum, or a cell that does not fit its column.

    Example:
        >>> table = load("Wine")  # doctest: +SKIP
        >>> table.x.shape, table.columns[-1].kind  # doctest: +SKIP
        (torch.Size([6497, 13]), 'binary')
    """
    if name not in SETS:
        close = [known for known in SETS if known.lower() == name.lower()]
        raise DataError(
            f"there is no data set {name!r}; " + (f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(SETS)}")
        )
    data = SETS[name]
    return parse(name, data, read(name, data))


def check(name: str) -> None:
    """Makes sure that the file of a data set is there, downloading it if need be, without reading the rows.

    Raises:
        DataError: as `load`, but for what is wrong in the cells.
    """
    read(name, SETS[name])


def parse(name: str, data: DataSet, lines: list[str]) -> Table:
    """The table in the lines of a data set's file."""
    specs = [spec.split() for spec in data.columns.split(",")]
    first = 2 if data.header or data.separator == " " else 1  # the number of the first line of data
    rows: Iterable[list[str]] = (line.split() for line in lines) if data.separator == " " else csv.reader(lines, delimiter=data.separator)
    cells = list(rows)[first - 1 :]
    for i, row in enumerate(cells):
        if len(row) != len(specs):
            raise DataError(f"{name}, line {i + first}: {len(row)} cells, expected {len(specs)}")
    if len(cells) != data.rows:
        raise DataError(f"{name} has {len(cells)} rows, expected {data.rows}: the file is not whole, or another version")
    columns, values = [], []
    for i, spec in enumerate(specs):
        if spec[1] == "-":
            continue
        column, value = _column(name, spec, [row[i].strip() for row in cells], first)
        columns.append(column)
        values.append(value)
    x = torch.tensor(values, dtype=torch.float64).T.contiguous()
    notes = [data.note] if data.note else []
    if data.complete:
        whole = ~x.isnan().any(1)
        notes.append(f"{int((~whole).sum())} of {len(x)} rows have a missing cell and were left out")
        x = x[whole]
    return Table(name, columns, x, notes)


def _column(name: str, spec: list[str], cells: list[str], first: int) -> tuple[Column, list[float]]:
    """A column and its values; classes that are numbers count from the smallest, others stand in the order of their letters."""
    title, kind = spec[:2]
    missing = [cell.lower() in _MISSING for cell in cells]
    classes = 2 if kind == "binary" else int(spec[2]) if kind in ("categorical", "ordinal") else 0
    values, bad = [], None
    for line, (cell, gone) in enumerate(zip(cells, missing, strict=True), first):
        try:
            values.append(math.nan if gone else float(cell))
        except ValueError:
            bad = bad or line
            values.append(math.nan)
    where = f"{name}, column {title!r}"
    known = [v for v in values if not math.isnan(v)]
    if bad is None and not known:
        raise DataError(f"{where} has no values")
    for line, v in enumerate(values, first):
        if math.isinf(v) or (kind == "count" and not math.isnan(v) and not v.is_integer()):
            raise DataError(f"{where}, line {line}: {cells[line - first]} is not a {'whole' if math.isfinite(v) else 'finite'} number")
    if not classes:
        if bad:
            raise DataError(f"{where}, line {bad}: {cells[bad - first]!r} is not a number")
        low = min(known, default=0.0)
        if kind in ("positive", "count") and low < 0:
            raise DataError(f"{where}, line {values.index(low) + first}: {low:g} is negative, but the column is {kind}")
        return Column(title, kind), values
    if bad is None:
        low = min(known)
        labels = [f"{low + i:g}" for i in range(classes)]
        codes = [v - low for v in values]
    else:
        labels = sorted({cell for cell, gone in zip(cells, missing, strict=True) if not gone})
        place = {label: float(i) for i, label in enumerate(labels)}
        codes = [math.nan if gone else place[cell] for cell, gone in zip(cells, missing, strict=True)]
    for line, code in enumerate(codes, first):
        if not math.isnan(code) and not (code.is_integer() and code < classes):
            raise DataError(f"{where}, line {line}: {cells[line - first]!r} is not one of {classes} classes")
    return Column(title, kind, labels[:classes]), codes
