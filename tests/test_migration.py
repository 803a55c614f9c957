"""docs/migration.md: every call on our side runs, and gives what TorchJD's on the left gives."""

import ast
import re
from pathlib import Path

import pytest
import torch

TEXT = (Path(__file__).parent.parent / "docs" / "migration.md").read_text()
SETUP = re.search(r"```python\n(.*?)```", TEXT, re.DOTALL).group(1)


def rows():
    for section in TEXT.split("\n## ")[1:]:
        for line in section.splitlines():
            cells = [cell.strip() for cell in line.strip("|").split(" | ")]
            if line.startswith("| ") and "mf." in line or "sum(losses)" in line:
                yield pytest.param(cells[0], cells[1].strip("` |"), id=f"{section.split()[1]} {cells[0][:60]}")


def run(code, names=""):
    """(the value of its last expression, the encoder's gradient) of the model of the document."""
    torch.manual_seed(0)
    tree = ast.parse(names + SETUP + code)
    last = tree.body.pop()
    if not isinstance(last, ast.Expr):
        tree.body.append(last)
        last = ast.parse("None").body[0]
    space: dict = {}
    exec(compile(tree, "docs/migration.md", "exec"), space)  # noqa: S102 the document is ours
    value = eval(compile(ast.Expression(last.value), "docs/migration.md", "eval"), space)
    return value, space["encoder"][0].weight.grad


@pytest.mark.filterwarnings("ignore")  # TorchJD's solvers give advice
@pytest.mark.parametrize(("there", "here"), list(rows()))
def test_row(there, here):
    ours, gradient = run(here)
    if ".backward(" in here or here.startswith("mf.backward"):
        assert gradient is not None and gradient.isfinite().all()
    if not re.search(r"\(J|jac_to_grad", there):
        return
    pytest.importorskip("torchjd")
    theirs, other = run(
        there.strip("`"), "from torchjd.aggregation import *\nfrom torchjd.autojac import backward, jac_to_grad, mtl_backward\n"
    )
    found, wanted = (gradient, other) if "jac_to_grad" in there else (ours, theirs)
    assert (found.double() - wanted.double()).norm() < 5e-3 * wanted.norm()


def test_there_are_three_tables():
    sections = [row.id.split()[0] for row in rows()]
    assert [len([s for s in sections if s == name]) >= 10 for name in ("TorchJD", "LibMTL", "impartial-vaes")] == [True] * 3
