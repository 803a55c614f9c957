"""Tables with columns of several kinds: scikit-learn's own, or a user's CSV with kinds inferred and errors that name the line."""

import math
from pathlib import Path

import torch

from mmfast.data.table import Column, DataError, Table
from mmfast.demo.cells import MISSING, number, point_decimals, read_cells

KINDS = ("real", "positive", "count", "binary", "categorical")
LARGEST_COUNT = 2000  # whole numbers beyond are measurements rather than counts
FEW = 5  # whole numbers with at most so many values are codes
MOST_CLASSES = 30
LEAST_ROWS = 30
MOST_COLUMNS = 256  # that a block takes


def builtin(name: str) -> Table:
    """A table that comes with scikit-learn: "diabetes" (442 patients) or "wine" (178 wines of three cultivars)."""
    from sklearn import datasets

    if name == "diabetes":
        names = [
            "age",
            "sex",
            "bmi",
            "blood_pressure",
            "cholesterol",
            "ldl",
            "hdl",
            "chol_hdl_ratio",
            "log_triglycerides",
            "glucose",
            "progression",
        ]
        kinds = ["count", "binary", "positive", "positive", "positive", "positive", "positive", "positive", "real", "count", "count"]
        bunch = datasets.load_diabetes(scaled=False)
    else:
        bunch = datasets.load_wine()
        names = [*(n.replace("od280/od315_of_diluted_wines", "od280_od315") for n in bunch.feature_names), "cultivar"]
        kinds = ["count" if n in ("magnesium", "proline") else "positive" for n in names[:-1]] + ["categorical"]
    x = torch.cat([torch.as_tensor(bunch.data), torch.as_tensor(bunch.target, dtype=torch.float64).unsqueeze(1)], 1)
    columns = []
    for i, (column, kind) in enumerate(zip(names, kinds, strict=True)):
        labels = []
        if kind in ("binary", "categorical"):
            values, x[:, i] = x[:, i].unique(return_inverse=True)
            labels = [f"{v:g}" for v in values]
        columns.append(Column(column, kind, labels))
    return Table(name, columns, x)


def read_csv(path: Path, types: dict[str, str] | None = None, encoding: str = "utf-8", header: bool | None = None) -> Table:
    """The table in a CSV file (.csv or .csv.gz; comma, semicolon, tab or bar), of its first 256 usable columns.

    Args:
        path: the file.
        types: kinds of columns, by name, that inference should not decide.
        encoding: of its text.
        header: whether its first line names the columns (else they are column_1, column_2, ...); None finds out, and refuses what may be either.

    Raises:
        DataError: naming the line and column where something is wrong.
    """
    types = types or {}
    names, rows, lines, named = read_cells(path, encoding, header)
    _check_rows(path, len(rows))
    for name, kind in types.items():
        if name not in names:
            raise DataError(f"--types names the column {name!r}, which {path.name} does not have; it has {shortened(names)}")
        if kind not in KINDS:
            raise DataError(f"--types {name}={kind}: a kind is one of {', '.join(KINDS)}")
    notes = [] if named else [f"no line names the columns: they are column_1 to column_{len(names)}"]
    columns, values = [], []
    for i, name in enumerate(names):
        column, value, note = _column(name, [row[i] for row in rows], lines, types.get(name))
        if note:
            notes.append(note)
        if column is not None:
            columns.append(column)
            values.append(value)
    if len(columns) < 2:
        raise DataError(f"{path.name} has {len(columns)} usable column(s), at least 2 are needed" + "".join(f"; {note}" for note in notes))
    if len(columns) > MOST_COLUMNS:
        notes.insert(
            0,
            f"{len(columns)} usable columns, but a block takes at most {MOST_COLUMNS}: the first {MOST_COLUMNS} are used, the others left out",
        )
        columns, values = columns[:MOST_COLUMNS], values[:MOST_COLUMNS]
    x = torch.tensor(values, dtype=torch.float64).T
    empty = x.isnan().all(1)
    if empty.any():
        notes.append(f"{int(empty.sum())} row(s) without any value dropped")
        x = x[~empty]
    _check_rows(path, len(x))
    return Table(path.name.removesuffix(".gz").removesuffix(".csv"), columns, x.contiguous(), notes)


def shortened(names: list[str], most: int = 12) -> str:
    """The names, or the first of them and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _check_rows(path: Path, count: int) -> None:
    if count < LEAST_ROWS:
        raise DataError(f"{path.name} has {count} usable row(s), at least {LEAST_ROWS} are needed")


def _column(name: str, cells: list[str], lines: list[int], kind: str | None) -> tuple[Column | None, list[float], str]:
    """The column, its values (NaN where missing), and a remark; or None, nothing, and why it is dropped."""
    here, note = f"column {name!r}", ""
    first = {cell: line for cell, line in reversed(list(zip(cells, lines, strict=True))) if cell.lower() not in MISSING}
    if kind not in ("categorical", "binary"):
        try:
            pointed = point_decimals(first)
        except DataError as error:
            raise DataError(f"{here}, {error}, or say --types {name}=categorical") from None
        if pointed:
            cells, note = [pointed.get(cell, cell) for cell in cells], f"{here} has decimal commas"
    present = [(cell, line) for cell, line in zip(cells, lines, strict=True) if cell.lower() not in MISSING]
    distinct = {cell for cell, _ in present}
    if len(distinct) < 2:
        return None, [], f"{here} dropped: " + (f"every value is {distinct.pop()}" if distinct else "it has no values")
    numbers = {cell: number(cell) for cell in distinct}
    bad = [(cell, line) for cell, line in present if numbers[cell] is None]
    as_numbers = kind in ("real", "positive", "count") or (kind is None and len(bad) < 0.5 * len(present))
    if as_numbers and bad:
        cell, line = bad[0]
        raise DataError(
            f"line {line}, {here}: {cell!r} is not a number, though {len(present) - len(bad)} of {len(present)} values are; "
            f"correct it, leave the cell empty, or say --types {name}=categorical"
        )
    if not as_numbers:
        if kind is None and len(distinct) > MOST_CLASSES:
            return None, [], f"{here} dropped: text with {len(distinct)} different values"
        return _classes(name, cells, kind, distinct, numeric=not bad)
    for cell, line in present:
        if not math.isfinite(numbers[cell] or 0.0):
            raise DataError(f"line {line}, {here}: {cell} is not a finite number")
    values = [math.nan if cell.lower() in MISSING else float(numbers[cell] or 0.0) for cell in cells]
    seen = {float(numbers[cell] or 0.0) for cell in distinct}
    if len(seen) < 2:
        return None, [], f"{here} dropped: every value is {seen.pop():g}"
    whole = all(v == int(v) for v in seen)
    if kind is None:
        if values == [values[0] + i for i in range(len(values))]:
            return None, [], f"{here} dropped: it numbers the rows"
        if len(seen) == 2 or (whole and len(seen) <= FEW):
            column, codes, _ = _classes(name, cells, "binary" if len(seen) == 2 else "categorical", distinct, numeric=True)
            return column, codes, note
        kind = "count" if whole and 0 <= min(seen) and max(seen) <= LARGEST_COUNT else "positive" if min(seen) > 0 else "real"
    wrong = {"positive": lambda v: v <= 0, "count": lambda v: v < 0 or v != int(v), "real": lambda v: False}[kind]
    for cell, line in present:
        if wrong(float(numbers[cell] or 0.0)):
            raise DataError(f"line {line}, {here}: {cell} is not a {'positive number' if kind == 'positive' else 'count'}")
    return Column(name, kind), values, note


def _classes(name: str, cells: list[str], kind: str | None, distinct: set[str], numeric: bool) -> tuple[Column | None, list[float], str]:
    """A column of classes, in the order of their numbers or letters; cells that are the same number are one class."""
    keys = {cell: float(cell) if numeric else cell for cell in distinct}
    order = sorted(set(keys.values()))  # type: ignore[type-var]
    if len(order) < 2:
        return None, [], f"column {name!r} dropped: every value is {order[0]}"
    kind = kind or ("binary" if len(order) == 2 else "categorical")
    if kind == "binary" and len(order) > 2:
        raise DataError(f"--types {name}=binary, but the column has {len(order)} different values")
    if len(order) > MOST_CLASSES:
        raise DataError(f"--types {name}={kind}, but the column has {len(order)} different values, at most {MOST_CLASSES} are allowed")
    code = {key: float(i) for i, key in enumerate(order)}
    values = [math.nan if cell.lower() in MISSING else code[keys[cell]] for cell in cells]
    return Column(name, kind, [f"{key:g}" if isinstance(key, float) else str(key) for key in order]), values, ""
