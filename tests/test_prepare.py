"""Splits, standardisation, masks and the metric of the tabular experiments."""

import math

import pytest
import torch

from mmfast.data import Column, DataError, Table
from mmfast.data.prepare import Part, errors, prepare

KINDS = ["real", "positive", "count", "count", "binary", "categorical"]


def table(rows: int = 200) -> Table:
    g = torch.Generator().manual_seed(3)
    x = torch.stack(
        [
            5 + 3 * torch.randn(rows, generator=g),
            torch.randn(rows, generator=g).exp() * (torch.rand(rows, generator=g) > 0.3),  # a third of it zero
            torch.randint(1, 9, (rows,), generator=g),
            torch.randint(0, 9, (rows,), generator=g),
            torch.randint(0, 2, (rows,), generator=g),
            torch.randint(0, 4, (rows,), generator=g),
        ],
        1,
    ).double()
    x[::7, 0] = math.nan
    x[3::11, 1] = math.nan
    labels = {"binary": ["0", "1"], "categorical": list("abcd")}
    return Table("made", [Column(f"{kind}{i}", kind, labels.get(kind, [])) for i, kind in enumerate(KINDS)], x)


def original(parts, part):
    """The cells of a part in original units, NaN where missing."""
    x = part.x.double() / parts.scale + parts.shift
    return torch.where(part.seen > 0, x, math.nan)


@pytest.mark.parametrize("positive", ["log", "log1p"])
def test_parts_hold_every_row_once_and_the_seed_alone_decides(positive):
    source = table()
    parts = prepare(source, 1, positive)
    assert [len(p.x) for p in (parts.train, parts.validation, parts.test)] == [140, 20, 40]
    rows = torch.cat([original(parts, p) for p in (parts.train, parts.validation, parts.test)])
    key = [3, 2, 4, 5, 0]  # columns that are not changed, the real one last
    found = sorted(map(tuple, rows[:, key].nan_to_num(-99).round(decimals=4).tolist()))
    expected = sorted(map(tuple, source.x[:, key].nan_to_num(-99).round(decimals=4).tolist()))
    for a, b in zip(found, expected, strict=True):
        assert a == pytest.approx(b, abs=2e-4)
    again, other = prepare(source, 1, positive), prepare(source, 2, positive)
    assert torch.equal(parts.train.x, again.train.x) and torch.equal(parts.test.seen, again.test.seen)
    assert not torch.equal(parts.train.x[:, 3], other.train.x[:, 3])


def test_the_callers_random_stream_is_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    prepare(table(), 0)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("positive", ["log", "log1p"])
def test_w_standardises_the_training_rows(positive):
    parts = prepare(table(), 0, positive)
    train, seen = parts.train.x.double(), parts.train.seen > 0
    real = train[seen[:, 0], 0]
    assert real.mean().abs() < 1e-6 and (parts.w[0] * real).std().item() == pytest.approx(1, abs=1e-5)
    log = train[seen[:, 1], 1].log()
    assert (parts.w[1] * log).std().item() == pytest.approx(1, abs=1e-5)
    if positive == "log1p":
        assert log.mean().abs() < 1e-5
    assert parts.w[2:].tolist() == [1, 1, 1, 1]


def test_nothing_of_the_other_parts_leaks_into_the_scales():
    source = table()
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    changed = table()
    changed.x[order[140:], :2] = 1e6
    for positive in ("log", "log1p"):
        parts, found = prepare(source, 0, positive), prepare(changed, 0, positive)
        assert torch.equal(found.w, parts.w) and torch.equal(found.shift, parts.shift) and torch.equal(found.scale, parts.scale)


def test_zeros_of_a_positive_column_become_small_and_others_stay():
    source = table()
    source.x[:, 1] *= 1e-3  # below many of the small numbers
    parts = prepare(source, 0)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    x, before = torch.cat([p.x[:, 1] for p in (parts.train, parts.validation, parts.test)]), source.x[order, 1]
    zero = before == 0
    assert 0 < zero.sum() < 100 and torch.equal(x[before > 0], before[before > 0].float())
    assert (x[zero] > 0).all() and x[zero].max() < 0.3 and len(x[zero].unique()) == zero.sum()
    # of Beta(0.2, 60), to three standard errors
    assert abs(x[zero].mean() - 0.2 / 60.2) < 3 * 0.0075 / zero.sum() ** 0.5
    assert (prepare(source, 0, "log1p").train.x[:, 1] > 0).all()


def test_counts_start_at_zero():
    parts = prepare(table(), 0)
    assert parts.shift[2:4].tolist() == [1, 0] and min(p.x[:, 2].min() for p in (parts.train, parts.validation, parts.test)) == 0
    assert prepare(table(), 0, "log1p").shift[2].item() == 0


def test_missing_cells_are_filled_by_something_finite():
    parts = prepare(table(), 0)
    for part in (parts.train, parts.validation, parts.test):
        assert part.x.isfinite().all() and part.seen.unique().tolist() == [0, 1]
    missing = sum(int((p.seen == 0).sum()) for p in (parts.train, parts.validation, parts.test))
    assert missing == int(table().x.isnan().sum())


def test_errors_are_those_of_the_original_units():
    parts = prepare(table(), 0, "log1p")
    g = torch.Generator().manual_seed(1)
    predicted = parts.test.x + 0.3 * torch.randn(parts.test.x.shape, generator=g)
    predicted[:, 4:] = parts.test.x[:, 4:]
    predicted[:10, 5] += 1
    found = errors(predicted, parts.test, parts.columns)
    truth, guess = original(parts, parts.test), predicted.double() / parts.scale + parts.shift
    for i in range(4):
        seen = ~truth[:, i].isnan()
        x = truth[seen, i]
        expected = (guess[seen, i] - x).square().mean().sqrt() / (x.max() - x.min())
        assert found[i].item() == pytest.approx(expected.item(), rel=1e-5)
    assert found[4].item() == 0 and found[5].item() == 10 / 40


def test_a_missing_cell_has_no_error():
    parts = prepare(table(), 0)
    wild = Part(torch.where(parts.test.seen == 0, 1e6, parts.test.x), parts.test.seen)
    assert torch.equal(errors(parts.test.x + 1, parts.test, parts.columns), errors(parts.test.x + 1, wild, parts.columns))


def test_a_feature_without_observed_test_cells_has_no_error():
    parts = prepare(table(), 0)
    parts.test.seen[:, 0] = 0
    assert errors(parts.test.x, parts.test, parts.columns).isnan().tolist() == [True] + [False] * 5


@pytest.mark.parametrize("value", [0.1, 1 / 3, 123.456, 7.7])
@pytest.mark.parametrize("rows", [15, 150, 1500])
def test_a_constant_column_has_no_scale(value, rows):
    """The standard deviation of equal numbers is rounding, 1e-17 or so, whose inverse would be its w."""
    x = torch.full((rows, 3), value, dtype=torch.float64)
    x[:, 2] = torch.randn(rows, dtype=torch.float64)
    source = Table("made", [Column("a", "real"), Column("b", "positive"), Column("c", "real")], x)
    for positive in ("log", "log1p"):
        w = prepare(source, 0, positive).w
        assert w[:2].tolist() == [1, 1] and 0.5 < w[2] < 2


def test_a_prediction_that_is_no_number_is_an_infinite_error():
    """NaN is left out of a mean over features, as for those that have no error: the run would look the better for it."""
    parts = prepare(table(), 0)
    seen = parts.test.seen > 0
    for column in range(6):
        predicted = parts.test.x.clone()
        predicted[seen[:, column].nonzero()[3], column] = torch.nan
        found = errors(predicted, parts.test, parts.columns)
        others = torch.arange(6) != column
        assert (found[others] == 0).all()
        assert found[column].item() == pytest.approx(1 / int(seen[:, column].sum()) if parts.columns[column].discrete else float("inf"))


@pytest.mark.parametrize(
    "column, value, expected",
    [
        (0, math.inf, "column 'real0' of made, which is real, has inf in row 5, expected a finite number, or NaN where it is missing"),
        (1, -0.5, "'positive1' .* has -0.5 in row 5, expected a number from 0 on"),
        (2, 1.5, "'count2' .* has 1.5 in row 5, expected a whole number from 0 on"),
        (3, -1.0, "'count3' .* has -1 in row 5"),
        (4, 2.0, "'binary4' .* has 2 in row 5, expected 0 or 1"),
        (5, 4.0, "'categorical5' .* has 4 in row 5, expected the number of a class, 0 to 3"),
        (5, 0.5, "'categorical5' .* has 0.5 in row 5"),
    ],
)
def test_a_cell_that_is_not_of_its_kind_is_named(column, value, expected):
    made = table()
    made.x[5, column] = value
    with pytest.raises(DataError, match=expected):
        prepare(made, 0)
    made.x[5, column] = math.nan
    prepare(made, 0)


def test_a_table_that_does_not_fit_its_columns():
    made = table()
    with pytest.raises(DataError, match=r"the cells of made are torch.float64 of shape \(200, 5\), expected a float64 tensor \[rows, 6\]"):
        prepare(Table("made", made.columns, made.x[:, 1:]), 0)
    with pytest.raises(DataError, match="the cells of made are a ndarray"):
        prepare(Table("made", made.columns, made.x.numpy()), 0)
    with pytest.raises(DataError, match="made has several columns named 'real0', expected each name once"):
        prepare(Table("made", [made.columns[0], *made.columns[:5]], made.x), 0)


def test_bad_arguments():
    with pytest.raises(ValueError, match="positive is 'sqrt', expected one of log, log1p"):
        prepare(table(), 0, "sqrt")
    with pytest.raises(DataError, match="made has 3 rows, too few"):
        prepare(table(3), 0)
    with pytest.raises(
        ValueError, match="kind of column 'age' is 'numeric', expected one of real, positive, count, binary, categorical, ordinal"
    ):
        Column("age", "numeric")
    with pytest.raises(ValueError, match="classes is 0"):
        _ = Column("colour", "categorical").likelihood
