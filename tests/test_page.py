"""What the table says: prose that follows the record, and pages of the docs that are the record's."""

import json
import re
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
from records import result
from typer.testing import CliRunner

from mmfast.cli import app
from mmfast.demo.data import builtin
from mmfast.experiments import missing, page, results, run
from mmfast.experiments.report import cells
from mmfast.experiments.settings import MODELS, Settings, SettingsError, settings

ROOT = Path(__file__).parent.parent
RECORD = ROOT / "benchmarks" / "results" / "table1" / "runs.jsonl"
NEW = {"revision": "2"}


def grid(errors, data=("Wine",), model="elbo", **changes):
    """Runs at the paper's sizes: {rule: test errors by seed} on each data set."""
    at = settings(model, "Wine")
    sizes = {"model": model, "batch": at.batch, "samples": at.samples, **changes}
    return [
        result(rule, seed, error, data=name, epochs=settings(model, name).epochs, **sizes)
        for name in data
        for rule, found in errors.items()
        for seed, error in enumerate(found)
    ]


@pytest.mark.parametrize("name", ["docs/table1.md", "docs/experiments.md", "README.md"])
def test_the_docs_say_what_the_record_says(tmp_path, name):
    """Where this fails, `make table1` writes them anew."""
    copy = tmp_path / "page.md"
    copy.write_text((ROOT / name).read_text())
    page.write(copy, results.read(RECORD))
    assert copy.read_text() == (ROOT / name).read_text()


def test_every_claim_has_its_row():
    """The two medians of each sentence, made once more from the lines of the record."""
    errors = {}
    for line in RECORD.read_text().splitlines():
        values = json.loads(line)
        s = values["settings"]
        errors.setdefault((MODELS[s["model"]], s["data"]), {}).setdefault(s["rule"], {})[s["seed"]] = values["test_error"]
    text = page.page(results.read(RECORD))
    claims = re.findall(r"(VAE|IWAE|DReG|HI-VAE) on (\w+) \((\d\.\d{3}) to (\d\.\d{3})", text)
    assert len(claims) >= sum(len(rules) - 1 for rules in errors.values())
    for model, data, before, after in claims:
        rules = errors[model, data]
        medians = [
            [statistics.median(by[s] for s in rule.keys() & rules["none"].keys()) for by in (rules["none"], rule)]
            for rule in rules.values()
        ]
        assert [before, after] in [[f"{m:.3f}" for m in pair] for pair in medians]


def test_a_changed_record_changes_the_claims():
    found = results.read(RECORD)
    before = page.page(found)
    (best,) = re.findall(r"\*\*Begin with (.+?)\*\*", before)
    assert "Losses of single rules" in page.section(cells(found))
    for r in found:  # that rule and no block trade their places
        names = {"none": best, best: "none"}
        object.__setattr__(r.settings, "rule", names.get(r.settings.rule, r.settings.rule))
    after = page.page(found)
    assert f"**Begin with {best}**" not in after
    assert re.search(rf"\*\*Beware of\*\* .*{re.escape(best)} \(a loss in \d+ of \d+ cells", after)
    assert "better: " in line(before, f"* **{best}**") and "better: " not in line(after, f"* **{best}**")


def test_the_short_form_counts_each_models_cells():
    """By hand: on Wine MGDA is chosen and better, on Adult no rule is, on Magic the chosen one is a loss."""
    runs = grid({"none": [0.3, 0.31, 0.32], "MGDA": [0.2, 0.21, 0.22]}) + grid(
        {"none": [0.4, 0.41, 0.42], "MGDA": [0.4, 0.41, 0.42]}, ("Adult",)
    )
    runs += grid({"none": [0.1, 0.11, 0.12], "MGDA": [0.2, 0.21, 0.22]}, ("Magic",)) + grid(
        {"none": [0.2, 0.21], "IMTLG": [0.1, 0.11]}, model="hivae"
    )
    text = page.short(cells(runs))
    assert "\n| VAE | 3 | 1 | 1 | 1 | 0 % (−32 %, +91 %) | " in text and "\n| HI-VAE | 1 | 1 | 0 | 0 | −49 % (−49 %, −49 %) | " in text
    assert "better than no block in 2 of 4 cells, a loss in 1 (VAE on Magic)" in text.replace("\n", " ")
    assert max(map(len, text.splitlines()[-3:])) <= page.WIDTH and "| IWAE" not in text


def line(text, start):
    (found,) = [line for line in text.splitlines() if line.startswith(start)]
    return found


def test_the_advice_names_the_best_rule_its_losses_and_its_price():
    errors = {"none": [0.3, 0.31, 0.32], "MGDA": [0.2, 0.21, 0.22], "PCGrad": [0.4, 0.41, 0.42]}
    text = page.advice(cells(grid(errors, ("Wine", "Adult")) + grid({"none": [0.2, 0.21, 0.22], "IMTLG": [0.1, 0.11, 0.12]}, ("Magic",))))
    assert (
        "**Begin with MGDA**: of the 2 rules that ran in at least half of the cells it has the best balance, better in 2 and a loss in 0 of 2"
        in text
    )
    assert "changes by −32 % (median over cells), and a step's time is 1.10x (wall) that of one without" in text
    assert "better than no block in 3 and a loss in 0 of 3 cells" in text
    assert "In every cell the chosen rule had a lower validation error than no block." in text
    assert "**Beware of** PCGrad (a loss in 2 of 2 cells, up to +32 %)." in text


def test_the_advice_is_none_where_nothing_helps():
    runs = grid({"none": [0.2, 0.21, 0.22], "MGDA": [0.4, 0.41, 0.43]}, ("Wine", "Adult"))
    text = page.advice(cells(runs))
    assert "**This record recommends no rule**" in text and "Begin with" not in text
    assert "in VAE on Adult and VAE on Wine its validation error was not above" in text and "was not better in 2 of 2." in text
    whole = page.page(runs)
    assert "In 2 of 2 cells no rule is better than no block by the test:" in whole
    assert "better than no block in 0 of 2 cells, a loss in 2 (VAE on Adult and VAE on Wine)." in page.section(cells(runs))
    assert "In every cell some rule is better" in page.page(grid({"none": [0.4, 0.41], "MGDA": [0.2, 0.21]}))


@pytest.mark.parametrize("seeds", [1, 2, 3])
def test_few_seeds(seeds):
    errors = {"none": [0.3, 0.31, 0.32][:seeds], "MGDA": [0.2, 0.21, 0.221][:seeds]}
    text = page.page(grid(errors))
    assert f"The rules of a cell ran on {seeds} seed{'' if seeds == 1 else 's'}." in text
    assert f"{0 if seeds == 1 else 1} of 1 comparisons have a test" in text
    assert ("Begin with MGDA" in text) == (seeds > 1)


def test_what_older_code_made_is_said():
    errors = {"none": [0.3, 0.31], "MGDA": [0.2, 0.21]}
    old, new = (grid(errors, model="hivae", versions=versions) for versions in ({"mmfast": "0.1.0"}, NEW))
    text = page.page(old)
    assert "4 runs of HI-VAE (on Wine) were made with the biased divergence of s" in text and "beside" not in text.split("\n")[0]
    assert "Times of older runs are the wall clock's" in text and "(wall)" in text
    mixed = [*old[:1], *new[1:]]
    assert "1 run of HI-VAE (on Wine) was made" in page.page(mixed) and "on Wine they stand beside later ones." in page.page(mixed)
    assert "older" not in page.page(new) and "(wall)" not in page.page(new)
    assert "biased" not in page.page(grid(errors)) and "(wall)" in page.page(
        grid(errors)
    )  # the VAE's errors are the same, its times are not


def test_what_todays_code_makes_is_not_older_codes(tmp_path):
    made = run.train(Settings("hivae", "Wine", "none", 0, 1, 64, 1), table=builtin("diabetes"))
    results.append(tmp_path / "runs.jsonl", made)
    (found,) = results.read(tmp_path / "runs.jsonl")
    assert found.revision == 2 and not found.outdated
    of_old = {name: version for name, version in found.versions.items() if name != "revision"}
    assert replace(found, versions=of_old).outdated


def test_errors_out_of_range_are_told_with_what_they_hide():
    before = [{"a": 0.4, "b": e} for e in (0.81, 400.0, 0.8)]
    after = [{"a": 0.2, "b": b} for b in (0.01, 0.0, 0.02)]
    runs = [
        result(rule, s, (f["a"] + f["b"]) / 2, 0.3 if rule == "none" else 0.1, features=f)
        for rule, fs in (("none", before), ("MGDA", after))
        for s, f in enumerate(fs)
    ]
    text = page.page(runs)
    assert "1 error of features is above the range of the column" in text and "400 ranges: VAE on Wine, none, seed 1, b." in text
    assert re.search(r"Cutting changes the verdict of MGDA in VAE on Wine, from no difference \(p \.5\d\) to better \(p < \.01\)\.", text)
    assert "with errors cut at their column's range it is better." in text
    worse = grid({"none": [0.2, 0.21, 0.22], "MGDA": [1.4, 1.41, 1.43]})
    assert "3 errors of features are above the range" in page.page(worse) and "Cutting changes no verdict." in page.page(worse)
    assert "No feature of a run has an error above" in page.page(grid({"none": [0.3], "MGDA": [0.2]}))


def test_runs_of_other_sizes_are_left_out_of_the_claims():
    runs = grid({"none": [0.3], "MGDA": [0.2]})
    short = [result(rule, 0, 0.9, epochs=3) for rule in ("none", "MGDA")]
    assert "1 cell of other epochs, batches or samples than the paper's is left out here." in page.page(runs + short)
    assert "0.900" not in page.page(runs + short)
    with pytest.raises(SettingsError, match="no model and data set with the paper's epochs"):
        page.page(short)


def test_a_step_and_a_run_that_was_cut_off():
    runs = grid({"none": [0.3], "MGDA": [0.2]})
    runs[1].epochs_done = 100
    assert "In 1 run the parameters became NaN" in page.page(runs)


def test_the_plan_and_what_a_run_costs():
    runs = missing.planned()
    assert len(set(runs)) == len(runs) == 2 * 11 * 7 * 5 + 2 * 6 * 3 * 3
    assert missing.core_hours(runs[0], []) is None
    found = [result("none", 0, data="Adult", epochs=400, step_us=2000.0), result("none", 0, data="Credit", epochs=400, step_us=5000.0)]
    # 0.7 of 6497 rows are 35 batches of 128; no run on Wine, so a step is the model's median; 0.7 of 32561 rows are 178
    assert missing.core_hours(settings("elbo", "Wine", "PCGrad"), found) == pytest.approx(2000 * 35 * 3500e-6 / 3600)
    assert missing.core_hours(settings("elbo", "Adult", "PCGrad"), found) == pytest.approx(400 * 178 * 2000e-6 / 3600)
    assert missing.core_hours(settings("hivae", "Adult"), found) is None
    text = missing.table(found)
    assert text.startswith("876 of the 878 runs of the plan are missing. ") and "| VAE | Adult | 34 | 35 | " in text
    assert "| DReG | HI | 9 | 9 | not known |" in text
    steps = f"{34 * 400 * 178 * 2000e-6 / 3600:.1f}"
    assert f"| VAE | Adult | 34 | 35 | {steps} |" in text


def test_nothing_is_missing_from_a_whole_record():
    whole = [result(**{**vars(one), "versions": NEW}) for one in missing.planned()]
    assert missing.table(whole) == "0 of the 878 runs of the plan are missing."
    whole[-1].settings, whole[800].versions = whole[0].settings, {}
    assert missing.table(whole).startswith("1 of the 878 runs")
    old = [result(**{**vars(one), "versions": NEW if one.seed else {}}) for one in missing.planned()]
    assert "77 others were made by older code" in missing.table(old)  # HI-VAE, seven rules on eleven data sets


@pytest.fixture
def folder(tmp_path):
    results.append(tmp_path / "runs.jsonl", *grid({"none": [0.3, 0.31, 0.33], "MGDA": [0.2, 0.21, 0.22]}))
    return tmp_path


def report(folder, *arguments):
    return CliRunner().invoke(app, ["report", "table1", "--out", str(folder), *map(str, arguments)])


def test_the_command_prints_or_writes(folder):
    file = folder / "page.md"
    kept = "# Mine\n\n<!-- mmfast report table1: page -->\nwhat was\n<!-- end of mmfast report table1 -->\n\nbehind\n"
    file.write_text(kept)
    printed = report(folder)
    assert printed.exit_code == 0 and "| VAE | ours: impartial | no runs | no runs | **0.210** |" in printed.output
    shown = report(folder, "--page", file)
    assert shown.exit_code == 0 and shown.output == f"written into {file}\n"
    text = file.read_text()
    assert text.startswith(kept.split("what was")[0]) and text.endswith(kept.split("what was\n")[1]) and "what was" not in text
    assert "**Begin with MGDA**" in text
    report(folder, "--page", file)
    assert file.read_text() == text
    assert report(folder, "--missing").output.startswith("875 of the 878 runs of the plan are missing.")


def test_the_command_writes_everything_that_a_file_asks_for(folder):
    """In whatever order, and twice."""
    asked = ["summary", "table", "page", "table"]
    file = folder / "page.md"
    lines = [
        f"<!-- mmfast report table1: {part} -->\nwhat was\n<!-- end of mmfast report table1 -->\nbehind {i}" for i, part in enumerate(asked)
    ]
    file.write_text("\n".join(lines))
    assert report(folder, "--page", file).exit_code == 0
    found = file.read_text().split("<!-- end of mmfast report table1 -->")
    assert "what was" not in file.read_text() and found[1].split("-->")[1] == found[3].split("-->")[1]
    for i, part in enumerate(asked):
        alone = folder / "alone.md"
        alone.write_text(lines[i])
        report(folder, "--page", alone)
        assert alone.read_text().split("<!-- end")[0].split("-->")[1] == found[i].split("-->")[1] and f"behind {i}" in found[i + 1]


def test_the_command_writes_into_no_file_that_does_not_ask_for_it(folder):
    file = folder / "mine.md"
    file.write_text("# Mine\n<!-- mmfast report table1: page -->\n")  # without an end
    shown = report(folder, "--page", file)
    assert shown.exit_code == 2 and f"{file} has no line <!-- mmfast report table1: page --> (or: table, summary) with" in shown.output
    assert file.read_text() == "# Mine\n<!-- mmfast report table1: page -->\n"
    shown = report(folder, "--page", folder / "nowhere.md")
    assert shown.exit_code == 2 and "nowhere.md cannot be read" in shown.output
