"""README and the pages that hold what is more than a first screen: short, true to the record of benchmarks, no dead links, code that runs."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import report
from benchmarks.rows import read
from mmfast.plots.log import read as read_log

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SPEED = (ROOT / "docs" / "speed.md").read_text()
PAGES = ["README.md", "docs/install.md", "docs/features.md", "docs/speed.md"]


def rows(text):
    """The rows of the tables in it, cell by cell."""
    return {tuple(cell.strip() for cell in line.strip("|").split("|")) for line in text.splitlines() if line.startswith("|")}


def code(text, language):
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_it_is_one_that_a_person_reads():
    lines = README.splitlines()
    assert len(lines) <= 120 and max(map(len, lines)) <= 160


def test_speed_says_what_the_quoted_run_says():
    """Every row that the run measured, under the run's own name; README quotes rows of that page."""
    measured, env = read(report.QUOTED)
    assert f"benchmarks/results/{report.QUOTED.name}" in SPEED and env["commit"] in SPEED
    told = {row for row in rows(report.summary(measured, env)) if "not measured" not in row and not row[0].startswith("-")}
    assert len(told) > 15 and told <= rows(SPEED)
    (quoted,) = [part for part in README.split("\n\n") if part.startswith("| target |")]
    assert len(rows(quoted)) > 5 and {row for row in rows(quoted) if "--:" not in row} <= rows(SPEED)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text()
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith("http")]
    assert links
    for link in links:
        name, _, anchor = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        assert target.exists(), link
        headings = (
            [
                re.sub(r"[^\w\- ]", "", h).strip().lower().replace(" ", "-")
                for h in re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            ]
            if anchor
            else []
        )
        assert not anchor or anchor in headings, link


@pytest.mark.parametrize("page", ["README.md", "docs/features.md"])
def test_its_code_runs(page, capsys):
    (text,) = code((ROOT / page).read_text(), "python")
    exec(text, {})  # noqa: S102 it is ours
    assert "conflict" in capsys.readouterr().out


class Model(nn.Module):
    """The reader's own, with the names that the README uses."""

    def __init__(self):
        super().__init__()
        self.encoder, self.image_head, self.text_head = nn.Linear(6, 4), nn.Linear(4, 2), nn.Linear(4, 3)

    def forward(self, image, text):
        y = self.encoder(image + text)
        return self.image_head(y).square().mean(), (self.text_head(y) - 1).square().mean()


def test_the_lines_that_a_loop_needs(tmp_path, monkeypatch):
    """The loop of the diff before and after it, on a model with the names it uses: after it the block has its say, and the file of conflicts can be drawn."""
    (diff,) = code(README, "diff")
    assert 0 < sum(line.startswith("+") for line in diff.splitlines()) <= 5
    monkeypatch.chdir(tmp_path)
    weights = {}
    for marks in (" ", " +"):
        torch.manual_seed(0)
        model = Model()
        loader = [(torch.randn(8, 6), torch.randn(8, 6)) for _ in range(20)]
        names = {"Model": lambda model=model: model, "loader": loader, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}
        exec("\n".join(line[1:] for line in diff.splitlines() if line[0] in marks), names)  # noqa: S102
        weights[marks] = model.encoder.weight.detach().clone()
    assert not torch.equal(weights[" "], weights[" +"])
    names["monitor"].remove()
    log = read_log("run.csv")
    assert log.steps == [10, 20] and log.blocks[0].branches == ("image", "text")
