"""What a table of heterogeneous features is, wherever it comes from."""

from dataclasses import dataclass, field

from torch import Tensor

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
