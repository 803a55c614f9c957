"""The report of a grid: medians over the same seeds, the rule chosen on validation, the corrected t-test."""

import math
from dataclasses import replace

import pytest
from records import result

from mmfast.experiments import published, report


def test_the_corrected_t_test():
    # differences 1, 2, 3: mean 2, variance 1; t = 2 / sqrt(1/3 + 2/7), of which two degrees of freedom leave 1 - t / sqrt(2 + t^2) outside
    t = 2 / math.sqrt(1 / 3 + 2 / 7)
    assert report.corrected_t_test([2, 4, 6], [1, 2, 3]) == pytest.approx(1 - t / math.sqrt(2 + t * t), abs=1e-9)
    assert report.corrected_t_test([1.0], [2.0]) is None
    assert report.corrected_t_test([1, 1], [1, 1]) == 1.0 and report.corrected_t_test([2, 2], [1, 1]) == 0.0


def test_the_rule_is_chosen_on_validation_and_reported_on_test():
    runs = [result("none", s, 0.3) for s in range(3)]
    runs += [result("PCGrad", s, 0.1 + 0.01 * s, validation=0.25) for s in range(3)]  # better on test, worse on validation
    runs += [result("MGDA", s, 0.2 + 0.001 * s, validation=0.15) for s in range(3)]
    runs += [result("IMTLG", 0, 0.01, validation=0.01)]  # on one seed alone: not in the choice
    (cell,) = report.cells(runs)
    assert (cell.rule, cell.seeds, cell.plain) == ("MGDA", 3, 0.3) and cell.ours == pytest.approx(0.201)
    assert (cell.paper_plain, cell.paper_ours) == (0.086, 0.071) and cell.verdict == "better"
    assert cell.by_rule == pytest.approx({"none": 0.3, "PCGrad": 0.11, "MGDA": 0.201})
    text = report.markdown([cell])
    assert "| VAE | Wine | 2000, 128, 1 | 3 | 0.086 | 0.071 | 0.300 | 0.201 | MGDA |" in text and "| 1.00 ms | 1.10x |" in text


@pytest.mark.parametrize(("p", "text"), [(None, ""), (0.0, "< .01"), (0.00999, "< .01"), (0.01, ".01"), (0.039, ".04"), (1.0, "1.00")])
def test_a_small_p_is_not_printed_as_zero(p, text):
    (cell,) = report.cells([result("none", s, 0.3) for s in range(3)] + [result("MGDA", s, 0.2) for s in range(3)])
    assert f"| MGDA | {text} |" in report.markdown([replace(cell, p=p)])


def test_a_loss_is_reported_as_one():
    (cell,) = report.cells([result("none", s, 0.1) for s in range(3)] + [result("MGDA", s, 0.2 + 0.001 * s) for s in range(3)])
    assert cell.verdict == "worse"


def test_runs_of_other_lengths_are_other_cells():
    runs = [result(rule, 0, 0.1, epochs=epochs) for rule in ("none", "MGDA") for epochs in (5, 2000)]
    assert [c.run.epochs for c in report.cells(runs)] == [5, 2000]
    assert report.cells([result("none"), result("none", 1)]) == []


def test_the_papers_table_is_whole():
    assert len(published.TABLE1) == 48 and published.TABLE1["hivae", "Credit"] == (0.107, 0.060)


def test_medians_are_of_the_same_seeds():
    runs = [result("none", s, 0.1 * (s + 1)) for s in range(5)] + [result("MGDA", s, 0.1 * (s + 1) - 0.01) for s in range(2)]
    (cell,) = report.cells(runs)
    assert cell.seeds == 2 and (cell.plain, cell.ours) == pytest.approx((0.15, 0.14)) and cell.gain == pytest.approx(0.01)


def test_a_grid_that_was_stopped_does_not_choose_by_the_order_of_its_rules():
    runs = [result(rule, s, 0.1) for rule in ("none", "GradNorm") for s in range(3)]
    runs += [result("PCGrad", s, 0.05) for s in range(2)]  # its third run was not made yet
    (cell,) = report.cells(runs)
    assert (cell.rule, cell.seeds) == ("PCGrad", 2)


@pytest.mark.parametrize("diverged", [0, 1, 2])
def test_a_run_that_diverged_counts_as_the_worst(diverged):
    runs = [result(rule, s, 0.1 * s + 0.1 + 0.01 * (rule == "IMTLG")) for rule in ("none", "MGDA", "IMTLG") for s in range(3)]
    runs = [r if (r.settings.rule, r.settings.seed) != ("MGDA", diverged) else result("MGDA", diverged, None) for r in runs]
    (cell,) = report.cells(runs)
    expected = sorted(math.inf if s == diverged else 0.1 * s + 0.1 for s in range(3))[1]
    assert cell.by_rule["MGDA"] == pytest.approx(expected)
    assert cell.rule == ("MGDA" if expected < 0.21 else "IMTLG")
    assert cell.rule != "MGDA" or cell.p is None
    assert report.markdown(report.cells([result("none"), result("MGDA", error=None)])).count("diverged") == 2


def test_the_verdict_has_the_sign_of_the_mean():
    before, after = [0.10, 0.20, 0.60], [0.09, 0.20, 0.59]  # the medians are equal
    runs = [result("none", s, e) for s, e in enumerate(before)] + [result("MGDA", s, e) for s, e in enumerate(after)]
    (cell,) = report.cells(runs)
    assert cell.plain == cell.ours and cell.gain > 0 and cell.verdict in ("", "better")
