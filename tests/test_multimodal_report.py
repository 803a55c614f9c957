"""The reports of Tables 5 and 9: differences, intervals, margins, the choice on validation."""

import math

import pytest
from multimodal_records import result
from typer.testing import CliRunner

from mmfast.cli import app
from mmfast.experiments import published, results
from mmfast.experiments.multimodal import grid, report
from mmfast.experiments.multimodal.metrics import SUBSETS
from mmfast.experiments.multimodal.results import RECORD


def cell(runs):
    (found,) = report.cells(runs)
    return found


def own(scores):
    return scores.self_accuracy


# intervals and verdicts


def test_the_interval_takes_all_resamples_of_few_seeds():
    # of 27 resamples of (0, 0, 3) eight have mean 0, twelve 1, six 2, one 3: a twentieth of either end is cut off
    assert report.interval([0.0, 0.0, 3.0]) == (0.0, 2.0)
    assert report.interval([2.0, 2.0]) == (2.0, 2.0)
    assert all(map(math.isnan, report.interval([1.0])))
    wide = report.interval([float(i) for i in range(12)])
    assert wide == report.interval([float(i) for i in range(12)]) and 2.5 < wide[0] < 5.5 < wide[1] < 8.5


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        ((0.50, 0.50, 0.50), (0.56, 0.57, 0.58), "better"),
        ((0.56, 0.57, 0.58), (0.50, 0.50, 0.50), "worse"),
        ((0.50, 0.50, 0.50), (0.53, 0.53, 0.53), "none"),  # all alike, but within the margin
        ((0.50, 0.50, 0.50), (0.80, 0.46, 0.50), "none"),  # 8.7 points, and the interval holds zero
        ((0.50,), (0.90,), "one seed"),  # it has no interval
    ],
)
def test_a_difference_is_none_within_the_margin_or_the_noise(before, after, verdict):
    runs = [result("none", s, (x, 0.5)) for s, x in enumerate(before)] + [result("PCGrad", s, (x, 0.5)) for s, x in enumerate(after)]
    found = cell(runs).difference(own, ("PCGrad", "p"))
    assert found.verdict == verdict
    assert found.points == pytest.approx(100 * (sum(after) - sum(before)) / len(before))


@pytest.mark.parametrize(("points", "plain", "ours"), [(0.009, "none", "none"), (0.02, "better", "none"), (0.05, "better", "better")])
def test_losses_are_compared_with_the_margin_of_their_column(points, plain, ours):
    runs = [
        result(rule, s, (0.5 + 0.001 * s + points * (objective == "iwae"), 0.5), objective=objective)
        for objective in ("elbo", "iwae")
        for rule in ("none", "MGDA")
        for s in range(3)
    ]
    line = next(line for line in report.table5(report.cells(runs)).splitlines() if "ELBO to IWAE | self" in line)
    values = [value.strip() for value in line.strip("|").split("|")]
    assert (values[4], values[6]) == (plain, ours)


def test_losses_without_a_seed_in_common_are_not_called_diverged():
    runs = [result("none", 0), result("none", 1, objective="iwae"), result("none", 1, None, objective="siwae")]
    text = report.table5(report.cells(runs))
    assert "| MMVAE | ELBO to IWAE | self |  | no seed in common |" in text and "| MMVAE | IWAE to SIWAE | self |  | diverged |" in text


def test_iwae_and_siwae_of_mvae_are_one_estimator():
    runs = [result("none", s, (0.4 + 0.4 * (o == "siwae"), 0.5), model="mvae", objective=o) for o in ("iwae", "siwae") for s in range(3)]
    assert "| MVAE | IWAE to SIWAE | self | +40.0 [+40.0, +40.0] | none, one estimator |" in report.table5(report.cells(runs))


# the choice


def test_rule_and_blocks_are_chosen_on_validation_and_reported_on_test():
    runs = [result("none", s) for s in range(3)]
    runs += [result("PCGrad", s, (0.9, 0.9), validation=(0.7, 0.5)) for s in range(3)]  # better on test, worse on validation
    runs += [result("MGDA", s, (0.75, 0.6), validation=(0.8, 0.6)) for s in range(3)]
    runs += [result("MGDA", s, (0.8, 0.7), validation=(0.8, 0.7), blocks="pq") for s in range(3)]
    found = cell(runs)
    assert found.chosen == ("MGDA", "pq")
    text = report.table5([found])
    assert "| MMVAE | ELBO | 3 | MGDA | pq | self | 71.8 | 87.8 | 70.0 | 80.0 | +10.0 [+10.0, +10.0] | better |" in text
    assert "| MMVAE | ELBO | 70.0 / 50.0 | 75.0 / 60.0 | 90.0 / 90.0 | 80.0 / 70.0 |" in text


def test_a_run_that_diverged_is_the_worst_choice():
    runs = [result("none", s) for s in range(2)]
    runs += [result("PCGrad", 0, (0.99, 0.99)), result("PCGrad", 1, None), *(result("MGDA", s, (0.5, 0.4)) for s in range(2))]
    found = cell(runs)
    assert found.chosen == ("MGDA", "p") and found.difference(own, ("PCGrad", "p")) is None
    assert "| 70.0 / 50.0 | 50.0 / 40.0 | diverged / diverged |" in report.table5([found])
    assert "diverged" in report.table5([cell([result("none"), result("PCGrad", 0, None)])])


def test_a_grid_that_was_stopped_does_not_choose_by_the_order_of_its_rules():
    runs = [result(rule, s) for rule in ("none", "GradNorm") for s in range(3)]
    runs += [result("PCGrad", s, (0.8, 0.6)) for s in range(2)]  # its third run was not made yet
    runs += [result("CAGrad", 0, (0.9, 0.9))]  # nor two of its
    found = cell(runs)
    assert found.chosen == ("PCGrad", "p")
    assert "| MMVAE | ELBO | 2 | PCGrad | p | self |" in report.table5([found])


def test_the_second_stage_takes_the_rule_that_is_best_on_p():
    first = grid.first_stage(["mvae", "mmvae"], ["elbo"], ["none", "MGDA", "PCGrad"], 2, "MNIST-SVHN*-Text", "small", 3)
    assert [run.seed for run in first] == [0] * 6 + [1] * 6 and {run.blocks for run in first if run.rule != "none"} == {"p"}
    test = {"none": (0.9, 0.9), "MGDA": (0.6, 0.5), "PCGrad": (0.5, 0.65)}
    done = [result(run.rule, run.seed, test[run.rule], model=run.model) for run in first]
    second = grid.second_stage(first, done, ["p", "pq", "pqs"])
    assert [(run.model, run.rule, run.blocks, run.seed) for run in second] == [
        ("mmvae", "PCGrad", blocks, seed) for seed in range(2) for blocks in ("pq", "pqs")
    ]
    assert grid.second_stage(first, done[:-1], ["pq"]) == []  # one that failed: nothing is chosen
    assert grid.second_stage(first, done, ["p"]) == [] and grid.second_stage(first[:1], done, ["pq"]) == []


# what is printed


def test_the_papers_tables_are_whole():
    assert len(published.TABLE5) == 18 and published.TABLE5["mmvae", "siwae", "cross"] == (40.60, 60.50)
    assert len(published.TABLE9) == 27 and published.TABLE9["mopoe", "siwae", "S"] == (67.16, 89.01)


def test_table9_has_every_modality_and_what_judged_it():
    runs = [result(rule, s, (0.7, 0.5, 0.6 + 0.2 * (rule == "MGDA"))) for rule in ("none", "MGDA") for s in range(3)]
    text = report.table9(report.cells(runs))
    assert "| MMVAE | ELBO | 3 | MGDA | p | S | 45.6 | 45.8 | 60.0 | 80.0 | +20.0 [+20.0, +20.0] | better |" in text
    assert "| MMVAE | ELBO | impartial | 80.0 | 80.0 | 80.0 | 80.0 | 80.0 | 80.0 | 25.0 | -1234.5 |" in text
    assert "98.0% on MNIST, 90.0% on SVHN, 100.0% on text" in text and "stand-in" in text


def test_table9_has_each_coherence_at_its_place():
    run = result()
    run.test.coherence = {d: {a: (10 * i + j) / 100 for j, a in enumerate(SUBSETS)} for i, d in enumerate("MST", 1)}
    text = report.table9([cell([run])])
    # M from S, T and ST: (11 + 12 + 15) / 3
    assert "| MMVAE | ELBO | plain | 10.0 | 12.7 | 21.0 | 22.0 | 32.0 | 31.3 | 25.0 | -1234.5 |" in text
    for row in ("M | 86.0 | 89.4 | 16.0", "S | 45.6 | 45.8 | 26.0", "T | 89.2 | 91.5 | 36.0"):
        assert f"| {row} |" in text


def test_table5_shows_the_conflict_and_the_time_of_a_step():
    runs = [result(seed=s, conflict=[[0.0, 0.2, 30.0], [5.0, 0.3, 5.0], [9.0, 0.4, 10.0]]) for s in range(2)]
    runs += [result("MGDA", s, conflict=[[0.0, 0.5, 7.0]], step_us=1.2e5) for s in range(2)]
    assert "| MMVAE | ELBO | 30% | 50% | 10 | 7 | 90.0 ms | 120.0 ms |" in report.table5([cell(runs)])


def test_a_log_likelihood_that_is_not_finite_is_said():
    first, second = (result("none", s) for s in range(2))
    second.test.log_likelihood = None
    assert "| 25.0 | not finite |" in report.table9(report.cells([first, second]))
    assert "| diverged | diverged |\n" in report.table9(report.cells([first, result("none", 1, None)]))


def test_the_commands_print_each_data_set_and_size_by_itself(tmp_path):
    runs = [result(rule, 0, size=size) for size in ("small", "full") for rule in ("none", "MGDA")]
    results.append(tmp_path / RECORD, *runs)
    for name in ("table5", "table9"):
        shown = CliRunner().invoke(app, ["report", name, "--out", str(tmp_path)])
        assert shown.exit_code == 0 and shown.output.count("**Table ") == 2 and "size full" in shown.output


def test_the_conflict_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    results.append(tmp_path / RECORD, *[result(rule, s, model=m) for m in ("mvae", "mopoe") for rule in ("none", "MGDA") for s in range(2)])
    shown = CliRunner().invoke(app, ["report", "table5", "--out", str(tmp_path), "--figure", str(tmp_path / "new" / "conflict.png")])
    assert shown.exit_code == 0 and (tmp_path / "new" / "conflict.png").read_bytes()[:4] == b"\x89PNG"


def test_a_rule_has_one_colour_and_a_size_its_own_rows(tmp_path, monkeypatch):
    """Whichever run of a cell is recorded first, and whatever else lies in the folder."""
    plt = pytest.importorskip("matplotlib.pyplot")
    from mmfast.experiments.multimodal import pictures

    drawn = []
    monkeypatch.setattr(pictures.plt, "close", drawn.append)
    rules = {"elbo": ("none", "PCGrad", "CAGrad"), "siwae": ("CAGrad", "none", "PCGrad")}
    runs = [
        result(rule, objective=o, size=size)
        for size in ("small", "full")
        for o, of in rules.items()
        for rule in of
        if size == "small" or rule == "none"
    ]
    pictures.conflict(report.cells(runs), tmp_path / "conflict.png")
    (figure,) = drawn
    legend = {
        text.get_text(): line.get_color() for text, line in zip(figure.legends[0].get_texts(), figure.legends[0].get_lines(), strict=True)
    }
    assert set(legend) == {"none", "PCGrad", "CAGrad"} and len(set(legend.values())) == 3
    shown = {ax.get_title("left"): {line.get_label(): line.get_color() for line in ax.lines} for ax in figure.axes}
    plt.close("all")
    assert len(shown) == 4 and sorted(map(len, shown.values())) == [1, 1, 3, 3]
    assert all(colour == legend[rule] for of in shown.values() for rule, colour in of.items())


def test_looks_are_averaged_at_their_step_where_one_was_not_finite():
    plt = pytest.importorskip("matplotlib.pyplot")
    from mmfast.experiments.multimodal import pictures

    looks = ([[0.0, 0.2, 3.0], [9.0, 0.4, 1.0], [18.0, 0.6, 1.0]], [[0.0, 0.4, 3.0], [18.0, 0.8, 1.0]])
    figure, ax = plt.subplots()
    pictures._curves(ax, cell([result(seed=s, conflict=conflict) for s, conflict in enumerate(looks)]), {"none": "black"})
    (line,) = ax.lines
    plt.close(figure)
    assert line.get_xdata().tolist() == [0, 9, 18] and line.get_ydata().tolist() == pytest.approx([0.3, 0.4, 0.7])


@pytest.mark.parametrize("name", ["table5", "table9"])
def test_a_report_of_nothing_names_the_command_that_is_missing(tmp_path, name):
    shown = CliRunner().invoke(app, ["report", name, "--out", str(tmp_path)])
    assert shown.exit_code == 2 and f"mmfast train table5 --out {tmp_path} makes it" in shown.output
    results.append(tmp_path / RECORD, result("MGDA"))
    shown = CliRunner().invoke(app, ["report", name, "--out", str(tmp_path)])
    assert shown.exit_code == 2 and "has no run without blocks" in shown.output
