"""The report of a grid: medians over the same seeds and their intervals, the rule chosen on validation, the corrected t-test, losses shown as losses."""

import math
from dataclasses import replace

import pytest
from records import result
from scipy import stats

from mmfast.experiments import published, report, tables

NEW = {"revision": "2"}


def chosen(runs):
    (cell,) = report.cells(runs)
    return cell.chosen


def test_the_corrected_t_test():
    # differences 1, 2, 3: mean 2, variance 1; t = 2 / sqrt(1/3 + 2/7), of which two degrees of freedom leave 1 - t / sqrt(2 + t^2) outside
    t = 2 / math.sqrt(1 / 3 + 2 / 7)
    assert report.corrected_t_test([2, 4, 6], [1, 2, 3]) == pytest.approx(1 - t / math.sqrt(2 + t * t), abs=1e-9)
    assert report.corrected_t_test([1.0], [2.0]) is None
    assert report.corrected_t_test([1, 1], [1, 1]) == 1.0 and report.corrected_t_test([2, 2], [1, 1]) == 0.0


@pytest.mark.parametrize(("n", "level"), [(3, 0.9), (3, 0.3), (5, 0.9), (5, 0.8), (5, 0.3), (9, 0.9), (9, 0.6)])
def test_the_bootstrap_interval_is_of_order_statistics(n, level):
    """The median of a resample is at most the k-th smallest value where at least half of its n draws are: a binomial number."""
    values = [float(v) for v in range(n)]
    at_most = [stats.binom.sf(n // 2, n, (k + 1) / n) for k in range(n)]
    low = next(k for k in range(n) if at_most[k] > (1 - level) / 2)
    for order in (values, values[::-1]):
        assert report.interval(order, level) == (low, n - 1 - low)


def test_intervals_of_few_runs():
    assert report.interval([0.3]) is None
    assert report.interval([0.3, 0.1]) == (0.1, 0.3)
    assert report.interval([0.1, math.inf, 0.2]) == (0.1, math.inf)
    assert tables.between([0.3]) == "0.300" and tables.between([0.1, math.inf, 0.2]) == "0.200 [0.100, diverged]"


def test_the_rule_is_chosen_on_validation_and_reported_on_test():
    runs = [result("none", s, 0.3) for s in range(3)]
    runs += [result("PCGrad", s, 0.1 + 0.01 * s, validation=0.25) for s in range(3)]  # better on test, worse on validation
    runs += [result("MGDA", s, 0.2 + 0.001 * s, validation=0.15) for s in range(3)]
    runs += [result("IMTLG", 0, 0.01, validation=0.01)]  # on one seed alone: not in the choice
    (cell,) = report.cells(runs)
    assert (cell.rule, cell.chosen.seeds, cell.chosen.plain) == ("MGDA", 3, 0.3) and cell.chosen.ours == pytest.approx(0.201)
    assert (cell.paper_plain, cell.paper_ours) == (0.086, 0.071) and cell.chosen.verdict == "better"
    assert (cell.plain_validation, cell.validation) == (0.3, 0.15)
    assert {rule: o.ours for rule, o in cell.outcomes.items()} == pytest.approx({"PCGrad": 0.11, "MGDA": 0.201, "IMTLG": 0.01})
    text = tables.details([cell])
    assert (
        "| VAE | Wine | 2000, 128, 1 | 3 | 0.086 | 0.071 | 0.300 [0.300, 0.300] | 0.201 [0.200, 0.202] | MGDA | < .01 | better | 0 of 1 |"
        in text
    )
    assert "| 0.300 | 0.010 (1 of 3 seeds) | **0.201** | **0.110** |" in tables.rules([cell])


@pytest.mark.parametrize(("p", "text"), [(None, ""), (0.0, "< .01"), (0.00999, "< .01"), (0.01, ".01"), (0.039, ".04"), (1.0, "1.00")])
def test_a_small_p_is_not_printed_as_zero(p, text):
    assert tables.p(p) == text


def test_a_loss_is_reported_as_one():
    (cell,) = report.cells([result("none", s, 0.1) for s in range(3)] + [result("MGDA", s, 0.2 + 0.001 * s) for s in range(3)])
    assert cell.chosen.verdict == "worse" and cell.chosen.lost and cell.chosen.change == pytest.approx(1.01)
    assert "0.201 worse" in tables.rules([cell]) and "0.201 worse" in tables.paper([cell])
    assert "| worse |" in tables.details([cell])


def test_runs_of_other_lengths_are_other_cells():
    runs = [result(rule, 0, 0.1, epochs=epochs) for rule in ("none", "MGDA") for epochs in (5, 2000)]
    short, whole = report.cells(runs)
    assert (short.run.epochs, short.of_paper, whole.run.epochs, whole.of_paper) == (5, False, 2000, True)
    assert report.cells([result("none"), result("none", 1)]) == [] == report.cells([result("none"), result("MGDA", 1)])


def test_the_papers_table_is_whole():
    assert len(published.TABLE1) == 48 and published.TABLE1["hivae", "Credit"] == (0.107, 0.060)
    assert {published.TABLE1[cell][1] for cell in published.DOUBTFUL} == {0.011, 0.015}


def test_the_table_has_all_of_the_papers_and_says_where_there_are_no_runs():
    runs = [result(rule, s, e) for rule, e in (("none", 0.3), ("MGDA", 0.2)) for s in range(2)]
    short = [result(rule, 0, 0.5, data="Adult", epochs=3) for rule in ("none", "MGDA")]  # not the paper's sizes
    rows = [line.split(" | ") for line in tables.paper(report.cells(runs + short)).splitlines()]
    assert len(rows) == 2 + 4 * 5 and {len(row) for row in rows[:1] + rows[2:]} == {14}
    assert [row[4] for row in rows if row[0] == "| VAE"] == ["0.086", "0.071", "0.300", "**0.200**", "MGDA"]
    assert sum(cell.strip(" |") == "no runs" for row in rows for cell in row) == 2 * (48 - 1)
    assert [cell.strip(" |") for row in rows for cell in row if "?" in cell] == ["0.011?", "0.015?"]


def test_medians_are_of_the_same_seeds():
    runs = [result("none", s, 0.1 * (s + 1)) for s in range(5)] + [result("MGDA", s, 0.1 * (s + 1) - 0.01) for s in range(2)]
    outcome = chosen(runs)
    assert outcome.seeds == 2 and (outcome.plain, outcome.ours) == pytest.approx((0.15, 0.14)) and outcome.gain == pytest.approx(0.01)


def test_a_rule_keeps_the_seeds_that_it_ran_on():
    """The loss of a rule that was given up after three seeds stays in the table."""
    runs = [result(rule, s, 0.1 + 0.001 * s) for rule in ("none", "GradNorm") for s in range(5)]
    runs += [result("MGDA", s, 0.4 + 0.01 * s) for s in range(3)]
    (cell,) = report.cells(runs)
    assert (cell.rule, cell.chosen.seeds, cell.outcomes["MGDA"].seeds) == ("GradNorm", 5, 3)
    assert "0.410 worse (3 of 5 seeds)" in tables.rules([cell])


def test_a_grid_that_was_stopped_does_not_choose_by_the_order_of_its_rules():
    runs = [result(rule, s, 0.1) for rule in ("none", "GradNorm") for s in range(3)]
    runs += [result("PCGrad", s, 0.05) for s in range(2)]  # its third run was not made yet
    (cell,) = report.cells(runs)
    assert (cell.rule, cell.chosen.seeds) == ("PCGrad", 2)


@pytest.mark.parametrize("diverged", [0, 1, 2])
def test_a_run_that_diverged_counts_as_the_worst(diverged):
    runs = [result(rule, s, 0.1 * s + 0.1 + 0.01 * (rule == "IMTLG")) for rule in ("none", "MGDA", "IMTLG") for s in range(3)]
    runs = [r if (r.settings.rule, r.settings.seed) != ("MGDA", diverged) else result("MGDA", diverged, None) for r in runs]
    (cell,) = report.cells(runs)
    expected = sorted(math.inf if s == diverged else 0.1 * s + 0.1 for s in range(3))[1]
    mgda = cell.outcomes["MGDA"]
    assert mgda.ours == pytest.approx(expected) and mgda.p is None and mgda.verdict == "diverged" and mgda.lost
    assert cell.rule == ("MGDA" if expected < 0.21 else "IMTLG")
    assert f"{expected:.3f} diverged" in tables.rules([cell])


def test_a_cell_whose_runs_all_diverged():
    (cell,) = report.cells([result("none"), result("MGDA", error=None)])
    assert "| diverged | MGDA |" in tables.details([cell]) and "| 0.100 | diverged |" in tables.rules([cell])


def test_the_verdict_has_the_sign_of_the_mean():
    before, after = [0.10, 0.20, 0.60], [0.09, 0.20, 0.59]  # the medians are equal
    outcome = chosen([result("none", s, e) for s, e in enumerate(before)] + [result("MGDA", s, e) for s, e in enumerate(after)])
    assert outcome.plain == outcome.ours and outcome.gain > 0 and outcome.verdict in ("", "better")


def test_features_that_became_worse_are_counted_by_their_medians():
    before = [
        {"a": 0.1, "b": 0.5, "c": 0.2, "d": None},
        {"a": 0.1, "b": 0.5, "c": 0.2, "d": None},
        {"a": 0.1, "b": 0.5, "c": 0.2, "d": None},
    ]
    after = [
        {"a": 0.2, "b": 0.9, "c": 0.2, "d": None},
        {"a": 0.3, "b": 0.1, "c": 0.2, "d": None},
        {"a": 0.0, "b": 0.1, "c": 0.2, "d": None},
    ]
    runs = [result(rule, s, 0.2, features=f) for rule, fs in (("none", before), ("MGDA", after)) for s, f in enumerate(fs)]
    assert chosen(runs).features == {"a": (0.1, 0.2), "b": (0.5, 0.1), "c": (0.2, 0.2)} and chosen(runs).features_worse == 1


def test_the_price_is_of_processor_times_where_there_are_any():
    runs = [result("none", s) for s in range(3)]
    old = [result("MGDA", s, step_us=1500.0) for s in range(2)]
    assert (chosen(runs + old).step_ratio, chosen(runs + old).wall) == (1.5, True)
    new = result("MGDA", 2, step_us=1100.0, versions=NEW)
    assert (chosen([*runs, *old, new]).step_ratio, chosen([*runs, *old, new]).wall) == (1.1, False)
    assert "| 1.50x (wall) |" in tables.details(report.cells(runs + old)) and "| 1.10x |" in tables.details(
        report.cells([*runs, *old, new])
    )


def test_errors_out_of_range_are_named_and_shown_both_ways():
    """One error of 400 ranges hides from the t-test what three seeds agree on."""
    before = [{"a": 0.4, "b": e} for e in (0.21, 400.0, 0.2)]
    after = [{"a": 0.2, "b": 0.2} for _ in range(3)]
    runs = [
        result(rule, s, (f["a"] + f["b"]) / 2, features=f) for rule, fs in (("none", before), ("MGDA", after)) for s, f in enumerate(fs)
    ]
    (cell,) = report.cells(runs)
    outcome, cut = cell.chosen, cell.chosen.capped()
    assert outcome.outlying and not replace(outcome, plain_runs=outcome.runs).outlying
    assert outcome.before == pytest.approx([0.305, 200.2, 0.3]) and cut.before == pytest.approx([0.305, 0.7, 0.3])
    assert cut.after == outcome.after and cut.p == pytest.approx(report.corrected_t_test([0.2] * 3, [0.305, 0.7, 0.3]))
    errors, both = tables.outlying([cell])
    assert errors.splitlines()[2:] == ["| VAE | Wine | none | 1 | b | 400 |"]
    assert both.splitlines()[2:] == [
        f"| VAE | Wine | MGDA | 0.305 | 0.200 | {tables.p(outcome.p)} |  | 0.305 | 0.200 | {tables.p(cut.p)} |  |"
    ]
    assert tables.outlying(report.cells([result("none"), result("MGDA", error=1.0)])) == []
