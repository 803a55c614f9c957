"""The report on representation collapse: means, differences and tests against computations by hand, the choice on validation, what is said of the paper's claims."""

import math
import statistics
from pathlib import Path

import pytest
import torch
from collapse_records import result
from scipy import stats
from typer.testing import CliRunner

from mmfast.cli import app
from mmfast.data import modalities
from mmfast.data.planted import Planted, Source
from mmfast.data.samples import Samples, Split
from mmfast.experiments import published, results
from mmfast.experiments.collapse import oracle, page, report, tables
from mmfast.experiments.collapse.report import Variant
from mmfast.experiments.collapse.results import RECORD, read
from mmfast.experiments.settings import SettingsError

BASE, KD, EBR = (Variant("early", cure) for cure in ("none", "kd", "ebr"))
A, B = (0.80, 0.82, 0.81, 0.79, 0.80), (0.84, 0.85, 0.86, 0.83, 0.83)


def sheet(runs):
    (found,) = report.sheets(runs)
    return found


def cells_of(text, start):
    """The first line of a table whose cells begin so."""
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[: len(start)] == list(start):
            return cells
    raise AssertionError(f"{start} is not in\n{text}")


# numbers


@pytest.mark.parametrize("data", ["Credit", "planted"])
def test_a_difference_is_of_pairs_and_tested_as_such(data):
    """The variance of the mean is 1/5 + n_test / n_train of that of a difference where splits share rows, else 1/5."""
    runs = [result(seed=s, roc=x, data=data) for s, x in enumerate(A)] + [
        result(cure="ebr", seed=s, roc=x, data=data) for s, x in enumerate(B)
    ]
    d = sheet(runs).difference(BASE, EBR, report.mean_of("roc"))
    differences = [b - a for a, b in zip(A, B, strict=True)]
    factor = 1 / 5 + (4000 / 8000 if data == "Credit" else 0)
    t = statistics.mean(differences) / math.sqrt(factor * statistics.variance(differences))
    assert d.p == pytest.approx(2 * stats.t.sf(abs(t), 4))
    if data == "planted":
        assert d.p == pytest.approx(stats.ttest_rel(B, A).pvalue)
    assert (d.a, d.b, d.mean) == pytest.approx((0.804 - 0.04, 0.842 - 0.04, 0.038))
    assert d.low == pytest.approx(0.032) and d.high == pytest.approx(0.044)  # by all 3,125 resamples of .04, .03, .05, .04, .03
    assert (d.verdict, d.seeds) == ("higher", 5)


def test_the_interval_is_between_the_percentiles_of_all_resamples():
    import itertools

    values = [0.04, 0.03, 0.05, 0.04, 0.03]
    means = sorted(statistics.mean(of) for of in itertools.product(values, repeat=5))
    runs = [result(seed=s, roc=0.0) for s in range(5)] + [result(cure="kd", seed=s, roc=x) for s, x in enumerate(values)]
    d = sheet(runs).difference(BASE, KD, report.mean_of("roc"))
    assert (d.low, d.high) == pytest.approx((means[156], means[-157]))


def test_only_seeds_that_both_have_are_compared():
    runs = [result(seed=s, roc=0.5 + s / 10) for s in range(3)] + [result(cure="kd", seed=s, roc=0.9) for s in (1, 2, 7)]
    d = sheet(runs).difference(BASE, KD, report.mean_of("roc"))
    assert d.seeds == 2 and (d.a, d.b) == pytest.approx((0.65 - 0.04, 0.86))
    assert sheet(runs).difference(BASE, EBR, report.mean_of("roc")) is None
    lost = sheet([*runs, result(cure="ebr", seed=1), result(cure="ebr", seed=2, diverged=True)])
    assert lost.difference(BASE, EBR, report.mean_of("roc")) is None and lost.value(EBR, report.mean_of("roc")) is None
    one = sheet([result(), result(cure="kd", roc=0.9)]).difference(BASE, KD, report.mean_of("roc"))
    assert math.isnan(one.low) and one.p is None and one.verdict == ""


@pytest.mark.parametrize(("after", "verdict"), [(B, "higher"), ((0.83, 0.79, 0.80, 0.82, 0.79), ""), (tuple(x - 0.1 for x in B), "lower")])
def test_a_verdict_needs_the_test(after, verdict):
    runs = [result(seed=s, roc=x) for s, x in enumerate(A)] + [result(cure="kd", seed=s, roc=x) for s, x in enumerate(after)]
    assert sheet(runs).difference(BASE, KD, report.mean_of("roc")).verdict == verdict


# what is chosen on validation rows


def test_a_weight_is_chosen_on_validation_and_reported_on_test():
    runs = [result(seed=s) for s in range(2)]
    runs += [result(cure="ebr", seed=s, roc=0.99, validation=0.7, weight=1.0) for s in range(2)]  # better on test, worse on validation
    runs += [result(cure="ebr", seed=s, roc=0.6, validation=0.8, weight=0.1) for s in range(2)]
    runs += [result(cure="ebr", seed=0, roc=0.5, validation=0.9, weight=0.01)]  # fewer seeds
    made = sheet(runs)
    assert {r.settings.weight for r in made.runs[EBR].values()} == {0.1} and len(made.runs) == 2
    assert made.value(EBR, report.mean_of("roc")).mean == pytest.approx(0.56)


def test_the_eliminated_modality_is_found_on_validation_rows():
    runs = [result(seed=s, contribution=(0.0, 0.2), of_validation=(0.3, x)) for s, x in enumerate((0.5, -0.2, -0.1))]
    assert sheet(runs).eliminated == "weak"
    assert sheet([result(contribution=(None, 0.2))]).eliminated == "weak"
    assert sheet([result(cure="ebr")]).eliminated is None and sheet([result(cure="ebr")]).ranked == []


def test_runs_of_other_epochs_rows_or_data_are_not_mixed():
    runs = [result(), result(epochs=3), result(batch=7), result(full=True), result(data="planted"), result(cure="ebr")]
    found = report.sheets(runs)
    assert [(s.data, s.epochs, s.batch, s.full) for s in found] == [
        ("planted", 20, 128, False),
        ("Credit", 3, 128, False),
        ("Credit", 20, 7, False),
        ("Credit", 20, 128, False),
        ("Credit", 20, 128, True),
    ]
    assert set(found[3].runs) == {BASE, EBR}


# tables


def test_the_tables_have_the_means_and_the_papers_numbers():
    runs = [
        result(system, cure, s, x, 0.3 + x / 10)
        for system in ("muse", "early")
        for cure, of in (("none", A), ("ebr", B))
        for s, x in enumerate(of)
    ]
    runs += [result("cmae", seed=s, roc=0.7) for s in range(2)]
    made = sheet(runs)
    rows = tables.missing(made)
    assert cells_of(rows, ["Early fusion + EBR"]) == [
        "Early fusion + EBR", "5", "0.802 [0.794, 0.810]", "0.384 [0.383, 0.385]", "0.842 [0.834, 0.850]", "0.762 [0.754, 0.770]", "2.0 ms", "0.853", "0.428",
    ]  # fmt: skip
    assert cells_of(rows, ["CM-AE", "2"])[-2:] == ["0.787", "0.362"] and cells_of(rows, ["Early fusion"])[-2:] == ["", ""]
    added = tables.plus(made)
    assert "CM-AE" not in added
    assert cells_of(added, ["MUSE", "ROC"])[2:] == [
        "0.764 [0.756, 0.772]", "", "", "", "", "0.802", "+0.038 [+0.032, +0.044]", "< .01", "better", "+0.015", "+0.018",
    ]  # fmt: skip
    assert cells_of(added, ["MUSE", "PRC"])[-2:] == ["+0.011", "+0.012"]
    assert tables.plus(sheet([result()])) is None and tables.noise(made) is None and tables.rules(made) is None


def test_published_numbers_are_those_of_the_paper():
    assert published.PLUS["muse", "ebr"] == (0.9380, 0.5001, 0.7597, 0.5138) and published.PLUS["grape", "none"][2] == 0.7085
    assert published.MISSING["ebr"] == (0.8533, 0.4277, 0.7030, 0.4290) and set(published.MISSING) < {"ebr", *tables.SYSTEMS}


def test_the_inside_of_early_fusion_stands_beside_its_base():
    runs = [result(seed=s, part=2.0 + s / 100, contribution=(0.3, 0.01)) for s in range(5)]
    runs += [result(cure="ebr", seed=s, part=1.5 + s / 50, contribution=(0.2, 0.01 + s / 1000)) for s in range(5)]
    text = tables.diagnosis(sheet(runs))
    assert cells_of(text, ["participation, of 2"])[1:4] == ["2.020 [2.010, 2.030]", "1.540 [1.520, 1.560]", "-0.480 [-0.490, -0.470]"]
    assert cells_of(text, ["participation, of 2"])[-1] == "lower"
    assert cells_of(text, ["contribution of status"])[3] == "-0.100 [-0.100, -0.100]"
    assert cells_of(text, ["contribution of weak (eliminated)"])[1:3] == ["0.010 [0.010, 0.010]", "0.012 [0.011, 0.013]"]
    assert cells_of(text, ["weak (eliminated) alone"])[1] == "0.750 [0.750, 0.750]"
    assert tables.diagnosis(sheet([result("late")])) is None


def test_what_was_planted_stands_beside_what_was_found(monkeypatch):
    """Scores of the function that the labels are drawn from, by its own latent features."""
    small = Planted({"status": Source(8, 3, 2), "weak": Source(9, 2, 4, strength=0.5, loudness=3.0)}, 1, classes=8, sharpness=6.0, seed=5)
    x, target = small.draw(500, 1)
    there = {name: torch.ones(500, dtype=torch.bool) for name in x}
    rows = Samples(x, there, target)
    monkeypatch.setattr(modalities, "planted", lambda seed: small)
    monkeypatch.setattr(modalities, "load", lambda name, seed: Split(rows, rows, rows, 8, name))
    found = oracle.planted(0)
    c = x["status"].double() @ small.predictive["status"][:1].T
    own = [x[name].double() @ small.predictive[name][1:].T for name in x]

    def accuracy(*kept):
        latent = torch.cat([c, *(s * k for s, k in zip(own, kept, strict=True))], 1)
        return float(((latent @ small._logits.T).argmax(1) == target).double().mean())

    assert found["contribution"] == pytest.approx({"status": accuracy(1, 1) - accuracy(0, 1), "weak": accuracy(1, 1) - accuracy(1, 0)})
    assert found["alone"] == pytest.approx({"status": accuracy(1, 0), "weak": accuracy(0, 1)})
    # 3 features of strength 1, 2 of strength 1/2, and of the common one a half each, which is a quarter of its square
    assert found["shares"] == pytest.approx({"status": 3.25 / 4, "weak": 0.75 / 4})
    text = tables.diagnosis(sheet([result(data="planted", seed=s) for s in range(2)]))
    assert cells_of(text, ["share of weak (eliminated) in the gradients"])[1:] == ["0.188", "0.100 [0.100, 0.100]"]


def test_rules_and_noise_have_tables_of_their_own():
    runs = [result("mt", seed=s, roc=x) for s, x in enumerate(A)] + [result("mt", seed=s, roc=x, rule="PCGrad") for s, x in enumerate(B)]
    runs += [
        result(cure=cure, seed=s, roc=0.8 - level / 10, noise=level) for cure in ("none", "ebr") for s in range(2) for level in (0.0, 1.0)
    ]
    made = sheet(runs)
    assert cells_of(tables.rules(made), ["MT", "PCGrad", "ROC"])[3:] == ["0.764", "0.802", "+0.038 [+0.032, +0.044]", "< .01", "better"]
    assert cells_of(tables.noise(made), ["Early fusion + EBR"])[1:] == ["0.760 [0.760, 0.760]", "0.660 [0.660, 0.660]"]
    mixed = sheet([*runs, *[result(cure="ebr", seed=s, noise=2.0, weight=0.1) for s in range(2)]])
    assert cells_of(tables.noise(mixed), ["Early fusion + EBR"])[2:] == [
        "0.660 [0.660, 0.660] (weight 1)",
        "0.760 [0.760, 0.760] (weight 0.1)",
    ]
    fewer = sheet([*runs, result(cure="ebr", seed=0, noise=2.0)])
    assert cells_of(tables.noise(fewer), ["Early fusion + EBR"])[2:] == ["0.660 [0.660, 0.660] (2 seeds)", "0.760 (1 seed)"]
    assert "seed" not in tables.noise(made)
    assert "PCGrad" not in tables.missing(made) and tables.missing(made).count("Early fusion") == 2


# what is said


def line_of(said, start):
    (found,) = [line for line in said if line.startswith(start)]
    return found


def test_claims_are_judged_by_the_numbers():
    runs = [result(system, seed=s, roc=x) for system in ("early", "muse", "late") for s, x in enumerate(A)]
    runs += [result("early", "ebr", s, roc=x, part=1.5 - s / 100, contribution=(0.3, -0.1 - s / 100)) for s, x in enumerate(B)]
    runs += [result("muse", "ebr", s, roc=x - 0.1) for s, x in enumerate(B)]
    runs += [result("late", "ebr", s, roc=x) for s, x in enumerate((0.83, 0.79, 0.80, 0.82, 0.79))]
    said = page.claims(sheet(runs))
    assert line_of(said, "EBR raises ROC:") == (
        "EBR raises ROC: shown in 1 of 3 (Early fusion +0.038), the opposite in 1 of 3 (MUSE -0.062), no difference shown in 1 of 3 (Late fusion +0.002)."
    )
    assert "reproduced, 2.000 to 1.480, -0.520" in line_of(said, "In early fusion EBR lowers participation (polysemanticity): reproduced")
    gone = line_of(said, "In early fusion EBR raises the contribution of weak (eliminated)")
    assert "not reproduced, the opposite is shown, 0.010 to -0.120" in gone and "5 seeds" in gone
    assert "not reproduced, no difference is shown, 0.100 to 0.100" in line_of(said, "In early fusion EBR raises the share of weak")
    assert "Early fusion + EBR (0.802); reproduced, by the means." in line_of(said, "EBR is best")
    assert not any("KD" in line or "status" in line for line in said)


def test_where_another_system_is_best_that_is_said():
    runs = [result("muse", seed=s, roc=0.9) for s in range(2)] + [result(cure="ebr", seed=s, roc=0.8) for s in range(2)]
    best = line_of(page.claims(sheet(runs)), "EBR is best")
    assert "has MUSE (0.860), the highest with EBR Early fusion + EBR (0.760): not reproduced, -0.100" in best
    assert page.claims(sheet([result()])) == []


def test_the_page_is_written_between_its_lines(tmp_path):
    results.append(
        tmp_path / RECORD, *[result(cure=cure, seed=s) for cure in ("none", "ebr") for s in range(2)], result("muse", diverged=True)
    )
    path = tmp_path / "page.md"
    path.write_text("before\n<!-- mmfast report collapse: page -->\nold\n<!-- end of mmfast report collapse -->\nafter\n")
    for _ in range(2):
        shown = CliRunner().invoke(app, ["report", "collapse", "--out", str(tmp_path), "--page", str(path)])
        assert shown.exit_code == 0, shown.output
    text = path.read_text()
    assert text.startswith("before\n<!-- mmfast") and text.endswith("-->\nafter\n") and "old" not in text and text.count("## Credit") == 1
    assert "5 runs are recorded. 1 had no epoch" in text and "weight of EBR 1" in text and "| MUSE | 1 |  |" in text
    printed = CliRunner().invoke(app, ["report", "collapse", "--out", str(tmp_path)]).output
    assert printed.strip() in text
    path.write_text("nothing")
    shown = CliRunner().invoke(app, ["report", "collapse", "--out", str(tmp_path), "--page", str(path)])
    assert shown.exit_code == 2 and "has no line <!-- mmfast report collapse: page -->" in shown.output
    with pytest.raises(SettingsError, match="cannot be read"):
        page.write(tmp_path / "nowhere.md", [])


def test_without_a_record_the_command_says_what_makes_one(tmp_path):
    shown = CliRunner().invoke(app, ["report", "collapse", "--out", str(tmp_path / "none")])
    assert shown.exit_code == 2 and "mmfast train collapse --out" in shown.output


def test_figures_are_drawn_where_there_is_something_to_draw(tmp_path):
    pytest.importorskip("matplotlib")
    runs = [result(cure=cure, seed=s, noise=n) for cure in ("none", "kd", "ebr") for s in range(2) for n in (0.0, 1.0)]
    results.append(tmp_path / RECORD, *runs)
    shown = CliRunner().invoke(app, ["report", "collapse", "--out", str(tmp_path), "--figures", str(tmp_path / "new")])
    assert shown.exit_code == 0 and sorted(p.name for p in (tmp_path / "new").iterdir()) == ["noise.png", "ranks.png"], shown.output
    assert all(p.read_bytes()[:4] == b"\x89PNG" and p.stat().st_size > 8000 for p in (tmp_path / "new").iterdir())
    from mmfast.experiments.collapse.figures import draw

    assert draw(report.sheets([result("muse")]), tmp_path / "other") == []


def test_the_figure_of_noise_says_where_its_weights_differ():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    from mmfast.experiments.collapse.figures import _noise

    runs = [result(cure=cure, noise=n) for cure in ("none", "kd") for n in (0.0, 1.0)]
    runs += [result(cure="ebr", weight=weight, noise=n) for weight, n in ((0.1, 0.0), (1.0, 1.0))]
    figure, ax = pyplot.subplots()
    _noise(ax, sheet(runs))
    assert [line.get_label() for line in ax.lines] == ["no cure", "KD", "EBR, weight 0.1, 1"]
    pyplot.close(figure)


def test_the_docs_say_what_the_record_says(tmp_path):
    """Where this fails, `make collapse` writes them anew."""
    root = Path(__file__).parent.parent
    copy = tmp_path / "page.md"
    copy.write_text((root / "docs/collapse_runs.md").read_text())
    page.write(copy, read(root / "benchmarks/results/collapse"))
    assert copy.read_text() == (root / "docs/collapse_runs.md").read_text()
