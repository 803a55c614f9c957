"""From a table to what a model is trained on: split by seed, standardised by the training rows, missing cells masked."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmfast.data.table import Column, DataError, Table, check

POSITIVE = ("log", "log1p")


@dataclass
class Part:
    """Rows for a model: x with missing cells filled by some valid value, and 1 where a cell was observed."""

    x: Tensor  # [rows, columns] float32
    seen: Tensor  # [rows, columns] float32


@dataclass
class Prepared:
    """The three parts of a table in a model's units, (original - shift) * scale, and the scales w of the local step."""

    columns: list[Column]
    train: Part
    validation: Part
    test: Part
    w: Tensor  # [columns] 1 / standard deviation of real columns and of the logarithm of positive ones, 1 for discrete ones
    shift: Tensor  # [columns] float64
    scale: Tensor  # [columns] float64


def prepare(table: Table, seed: int, positive: str = "log") -> Prepared:
    """Splits a table at random into 70 / 10 / 20 % and standardises it as Javaloy et al. (ICML 2022) do, on the training rows alone.

    Real columns are centred; of a count whose smallest value in the table is one or more, one is taken off; a positive column keeps its unit, and a zero,
    which has no logarithm, becomes a small random number ("log"); or it is 1 + x over the geometric mean of that, and counts stay as they are ("log1p",
    as HI-VAE takes them).

    Args:
        table: what `load` gives.
        seed: of the split and of the small numbers; the same seed gives the same parts.
        positive: "log" or "log1p".

    Returns:
        A `Prepared` with float32 parts on the CPU.

    Raises:
        DataError: too few rows to split, or a cell that is not of its column's kind.
        ValueError: `positive` is neither.
    """
    if positive not in POSITIVE:
        raise ValueError(f"positive is {positive!r}, expected one of {', '.join(POSITIVE)}")
    check(table)
    rows, k = table.x.shape
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    a, b = round(0.7 * rows), round(0.8 * rows)
    if not 1 < a < b < rows:
        raise DataError(f"{table.name} has {rows} rows, too few for a training, a validation and a test part")
    x = table.x
    is_positive = torch.tensor([c.kind == "positive" for c in table.columns])
    if positive == "log":
        x = torch.where((x == 0) & is_positive, _small(rows, seed).unsqueeze(1), x)
    w, shift, scale = torch.ones(k, dtype=torch.float64), torch.zeros(k, dtype=torch.float64), torch.ones(k, dtype=torch.float64)
    for i, column in enumerate(table.columns):
        seen = x[order[:a], i]
        seen = seen[~seen.isnan()]
        if not len(seen):
            continue
        if column.kind == "real":
            shift[i] = seen.mean()
        elif column.kind == "count" and positive == "log" and table.x[:, i].nan_to_num(torch.inf).min() > 0:
            shift[i] = 1.0
        elif column.kind == "positive":
            if positive == "log1p":
                shift[i], scale[i] = -1.0, (-seen.log1p().mean()).exp()
            seen = seen.log1p() if positive == "log1p" else seen.log()
        # of equal numbers the standard deviation is rounding, 1e-17 or so, and would be divided by
        if column.kind in ("real", "positive") and seen.min() < seen.max():
            w[i] = 1 / seen.std()
    x = (x - shift) * scale

    def part(index: Tensor) -> Part:
        cells = x[index]
        return Part(torch.where(cells.isnan(), is_positive.double(), cells).float(), (~cells.isnan()).float())

    return Prepared(table.columns, part(order[:a]), part(order[a:b]), part(order[b:]), w.float(), shift, scale)


def _small(rows: int, seed: int) -> Tensor:
    """One number per row that stands for zero, drawn from Beta(0.2, 60) as in the paper's experiments."""
    draws = torch._standard_gamma(
        torch.tensor([0.2, 60.0], dtype=torch.float64).expand(rows, 2), generator=torch.Generator().manual_seed(seed)
    )
    return 1e-20 + draws[:, 0] / draws.sum(1)


def errors(predicted: Tensor, part: Part, columns: Sequence[Column]) -> Tensor:
    """Per feature, float64 [columns]: share of wrong classes, or root mean squared error over the range of the observed values.

    The same in the model's units as in the original ones; NaN for a feature without an observed cell, or without a range; infinite where a prediction is NaN.
    """
    found = []
    for i, column in enumerate(columns):
        seen = part.seen[:, i] > 0
        p, x = predicted[seen, i].double(), part.x[seen, i].double()
        if not len(x) or (not column.discrete and x.max() == x.min()):  # nothing to divide by
            found.append(torch.tensor(torch.nan, dtype=torch.float64))
        elif column.discrete:
            found.append((p != x).double().mean())
        else:
            found.append(
                (p - x).square().mean().sqrt().nan_to_num(torch.inf, torch.inf) / (x.max() - x.min())
            )  # a mean of features leaves NaN out
    return torch.stack(found)
