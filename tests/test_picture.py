"""The picture of README: it shows what the record says, and is written anew where that has changed."""

import html
import json
import re
import statistics

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("scipy")

from benchmarks import picture
from mmfast.experiments.settings import MODELS


def description_in(path):
    (found,) = re.findall(r"<dc:description>(.*?)</dc:description>", path.read_text(), re.DOTALL)
    return html.unescape(found)


def test_the_file_shows_todays_record(tmp_path):
    """Where this fails, `make table1` draws it anew."""
    picture.draw(tmp_path / "picture.svg")
    assert description_in(picture.PICTURE) == description_in(tmp_path / "picture.svg") == picture.description()


def test_the_plain_sum_works_against_one_and_the_block_against_none():
    grads, total, resolved = picture.directions()
    assert torch.equal(total, grads.sum(0)) and ((grads @ total) < -0.5).sum() == 1
    assert (grads @ resolved).min() > -1e-6 and resolved.norm() == pytest.approx(total.norm().item())


def test_the_worst_feature_is_that_of_the_lines():
    """Made once more from the file: without a block the largest median over the seeds is in the picture, with the rule one of the rules'."""
    errors = {}
    for line in picture.RECORD.read_text().splitlines():
        run = json.loads(line)
        errors.setdefault((run["settings"]["model"], run["settings"]["data"]), {}).setdefault(run["settings"]["rule"], []).append(run)
    found = picture.worst()
    assert len(found) == len({name for name, _, _ in found}) > 0
    for (model, data), rules in errors.items():
        if "none" not in rules or len(rules) < 2:  # nothing to compare yet
            continue
        largest = {
            rule: max(
                statistics.median(r["test_errors"][name] for r in runs) for name, e in runs[0]["test_errors"].items() if e is not None
            )
            for rule, runs in rules.items()
        }
        ((before, after),) = [(a, b) for name, a, b in found if name == f"{MODELS[model]}, {data}"]
        assert before == pytest.approx(largest.pop("none")) and any(after == pytest.approx(value) for value in largest.values())


def test_a_steps_times():
    times = picture.steps()
    assert times["no block"] == 1.0 < times["mmfast"] < times["naive block"]
