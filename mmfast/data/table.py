"""What a table of heterogeneous features is, wherever it comes from."""

from dataclasses import dataclass, field

from torch import Tensor

from mmfast import contract
from mmfast.models.likelihoods import Bernoulli, Categorical, Likelihood, LogNormal, Normal, Poisson

KINDS = ("real", "positive", "count", "binary", "categorical", "ordinal")


class DataError(ValueError):
    """What is wrong with the data, for the person who brought them."""


@dataclass
class Column:
    """One feature: its name, its kind, and the labels of its classes if it has any."""

    name: str
    kind: str  # one of KINDS
    labels: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind of column {self.name!r} is {self.kind!r}, expected one of {', '.join(KINDS)}")

    @property
    def likelihood(self) -> Likelihood:
        """The one the paper's experiments give this kind (a categorical one for ordinal features too)."""
        plain: dict[str, Likelihood] = {"real": Normal(), "positive": LogNormal(), "count": Poisson(), "binary": Bernoulli()}
        return plain[self.kind] if self.kind in plain else Categorical(len(self.labels))

    @property
    def discrete(self) -> bool:
        return self.kind in ("binary", "categorical", "ordinal")


@dataclass
class Table:
    """Rows of features; x is [rows, columns] float64 with NaN where a cell is missing, classes as 0, 1, ..."""

    name: str
    columns: list[Column]
    x: Tensor
    notes: list[str] = field(default_factory=list)


_CELLS = {
    "positive": "a number from 0 on",
    "count": "a whole number from 0 on",
    "binary": "0 or 1",
    "categorical": "the number of a class",
    "ordinal": "the number of a class",
}


def check(table: Table) -> None:
    """Raises DataError where a table's cells are not what its columns say, naming the column and the row."""
    x, names = table.x, [column.name for column in table.columns]
    if not isinstance(x, Tensor) or x.dim() != 2 or x.shape[1] != len(names) or not x.is_floating_point():
        found = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        raise DataError(
            f"the cells of {table.name} are {found}, expected a float64 tensor [rows, {len(names)}], a column for each of {contract.shortened(names)}"
        )
    if twice := {name for name in names if names.count(name) > 1}:
        raise DataError(f"{table.name} has several columns named {', '.join(map(repr, sorted(twice)))}, expected each name once")
    for i, column in enumerate(table.columns):
        cells = x[:, i]
        right = cells.isnan() | cells.isfinite()
        if column.kind != "real":
            right &= ~(cells < 0)
        if column.kind not in ("real", "positive"):
            right &= cells.isnan() | (cells == cells.floor())
        expected = _CELLS.get(column.kind, "a finite number")
        if column.discrete:
            classes = 2 if column.kind == "binary" else len(column.labels)
            right &= ~(cells >= classes)
            if column.kind != "binary":
                expected += f", 0 to {classes - 1}"
        if not bool(right.all()):
            row = int((~right).nonzero()[0])
            raise DataError(
                f"column {column.name!r} of {table.name}, which is {column.kind}, has {cells[row].item():g} in row {row}, expected {expected}, or NaN where it is missing"
            )
