"""The page of Tables 5 and 9: what it says follows from the record, and the docs' page is the record's."""

from pathlib import Path

import pytest
from multimodal_records import result
from typer.testing import CliRunner

from mmfast.cli import app
from mmfast.experiments import results
from mmfast.experiments.multimodal import grid, page, report
from mmfast.experiments.multimodal.results import RECORD, read
from mmfast.experiments.multimodal.settings import MODELS, OBJECTIVES, RULES

DATA = "MNIST-SVHN*-Text"
ROOT = Path(__file__).parent.parent
PAGE, RECORDED = ROOT / "docs" / "multimodal.md", ROOT / "benchmarks" / "results" / "table5"


def test_the_docs_say_what_the_record_says(tmp_path):
    """Where this fails, `make table5` writes them anew."""
    copy = tmp_path / "page.md"
    copy.write_text(PAGE.read_text())
    page.write(copy, read(RECORDED))
    assert copy.read_text() == PAGE.read_text()


def test_each_rule_is_counted_over_all_cells():
    runs = [result(rule, s, (0.5 + gain * (objective == "elbo"), 0.5 - gain), objective=objective, step_us=t)
            for objective in ("elbo", "iwae") for rule, gain, t in (("none", 0.0, 1e4), ("MGDA", 0.2, 1.5e4)) for s in range(3)]  # fmt: skip
    text = page.rules(report.cells(runs))
    assert "| MGDA | p | 2 | 1, 1, 0 | +10.0 (+0.0, +20.0) | 0, 0, 2 | -20.0 (-20.0, -20.0) | 0, 2, 0 | +0.0 (+0.0, +0.0) | 1.50x |" in text


def test_a_rule_of_one_seed_or_without_scores_is_said_to_be():
    one = page.rules(report.cells([result("none", 0, (0.5, 0.5)), result("MGDA", 0, (0.9, 0.5))]))
    assert "| MGDA | p | 1 | 0, 0, 0 (1 of one seed) | +40.0 (+40.0, +40.0) |" in one
    diverged = page.rules(report.cells([result("none", 0, (0.5, 0.5)), result("MGDA", 0, None)]))
    assert "| MGDA | p | 1 | diverged |  | diverged |" in diverged


@pytest.mark.parametrize(("gain", "words"), [(0.2, "better"), (0.0, "no difference shown"), (-0.2, "worse")])
def test_the_papers_gains_are_looked_for(gain, words):
    runs = [result(rule, s, (0.5, 0.5 + add), model="mopoe") for rule, add in (("none", 0.0), ("MGDA", gain)) for s in range(3)]
    first = page.says(report.cells(runs))[0]  # of ELBO's two differences in the paper, 1.6 and 18.4 points
    assert first == f"Table 5, where the paper gains 3.5 points or more (1): {words} in 1 (MoPoE ELBO, cross accuracy {100 * gain:+.1f})."


def test_gains_that_the_paper_does_not_have_are_told():
    runs = [result(rule, s, (0.5 + add, 0.5), model="mvae") for rule, add in (("none", 0.0), ("MGDA", -0.2)) for s in range(3)]
    assert "where it does not: worse in 1 of 2 (MVAE ELBO, self accuracy -20.0)" in "\n".join(page.says(report.cells(runs)))


def test_what_is_missing_of_the_plan_is_said():
    first = grid.first_stage(tuple(MODELS), OBJECTIVES, RULES, 3, DATA, "small", 3)
    runs = [
        result(r.rule, r.seed, (0.9 if r.rule == "CAGrad" else 0.5, 0.5), model=r.model, objective=r.objective, step_us=1e6) for r in first
    ]
    others = "MMVAE on pq 9, MMVAE on pqs 9, MoPoE on pq 6 and MoPoE on pqs 6"  # not those of SIWAE, whose rule is not chosen yet
    hours = 32 * 1687 / 3600  # steps of a second
    assert page.lacking(runs[:-2]) == (
        f"32 of the plan are missing (MoPoE on p 2, {others}): their training steps take {hours:.1f} core-hours, "
        "without those on pq and pqs where a rule is not chosen yet."
    )
    second = grid.second_stage(first, runs, ["pq", "pqs"])
    runs += [result(r.rule, r.seed, blocks=r.blocks, model=r.model, objective=r.objective) for r in second]
    assert "3 of the plan are missing (MoPoE on pqs 2 and MoPoE on pq 1): " in page.lacking(runs[:-3]) and page.lacking(runs) == ""


def test_the_page_is_written_between_its_lines(tmp_path):
    results.append(tmp_path / RECORD, *[result(rule, s) for rule in ("none", "MGDA") for s in range(3)], result("PCGrad", 0, None))
    file = tmp_path / "page.md"
    file.write_text("before\n<!-- mmfast report table5: page -->\nold\n<!-- end of mmfast report table5 -->\nafter\n" * 2)
    for _ in range(2):
        shown = CliRunner().invoke(app, ["report", "table5", "--out", str(tmp_path), "--page", str(file)])
        assert shown.exit_code == 0 and shown.output == f"written into {file}\n"
    text = file.read_text()
    assert text.count("7 runs are recorded. ") == 2 == text.count(" 1 had no epoch") == text.count("after\n") and "\nold\n" not in text
    for number in (5, 9):
        printed = CliRunner().invoke(app, ["report", f"table{number}", "--out", str(tmp_path)]).output
        assert f"**Table {number}: " in printed and printed.strip() in text
    file.write_text("nothing")
    shown = CliRunner().invoke(app, ["report", "table5", "--out", str(tmp_path), "--page", str(file)])
    assert shown.exit_code == 2 and "has no line <!-- mmfast report table5: page --> with" in shown.output
    assert file.read_text() == "nothing"
