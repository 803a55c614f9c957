"""docs/methods.md: every method of the peers has its row, every name in it is ours, every test exists. And what no family's tests show of a method."""

import re
from functools import reduce
from pathlib import Path

import pytest
import torch
from rule_table import RULES

import mmfast as mf

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs/methods.md"
LIBMTL = {
    "AbsWeighting", "Aligned_MTL", "CAGrad", "DB_MTL", "DWA", "EW", "ExcessMTL", "FAMO", "FairGrad", "GLS", "GradDrop", "GradNorm", "GradVac", "IMTL", "MGDA", "MoCo",
    "MoDo", "Nash_MTL", "PCGrad", "RLW", "SDMGrad", "STCH", "UPGrad", "UW", "MOML", "FORUM", "AutoLambda",
}  # fmt: skip
IMPARTIAL_VAES = {"IMTLG", "GradNormModified", "GradNorm", "MGDAUB", "PCGrad", "CAGrad", "GradDrop", "NSGD", "GradVac"}


def tables():
    """{heading: [[method, ours, tested against], ...]}"""
    found = {}
    for part in PAGE.read_text().split("\n## ")[1:]:
        heading, _, text = part.partition("\n")
        if "| method |" in text:
            lines = [line for line in text.splitlines() if line.startswith("| ")][1:]
            found[heading] = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return found


ROWS = [row for rows in tables().values() for row in rows]


def first_names(heading):
    return {re.match(r"`([\w-]+)`", row[0])[1] for row in tables()[heading]}


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_every_name_is_ours_and_every_test_exists(row):
    assert len(row) == 3 and all(row), row
    _, ours, tested = row
    names = re.findall(r"\bmf\.([A-Za-z_.]+[A-Za-z_])", ours)
    for name in names:
        reduce(getattr, name.split("."), mf)
    known = re.findall(r"`(\w+)::(\w+)(?:\[(.+?)\])?`", tested)
    assert known or (tested == "-" and ours.startswith("not here: ")), row
    assert names or "not here: " in ours or "losses" in ours
    for file, test, case in known:
        assert f"\ndef {test}(" in (TESTS / f"{file}.py").read_text(), (file, test)
        assert not case or case in RULES
        what = {"test_against_torchjd": "torchjd", "test_optimality": "residual", "test_golden": "golden"}.get(test) if case else None
        assert not what or getattr(RULES[case], what) is not None, (test, case)


def test_every_method_of_the_peers_has_its_row():
    assert first_names("LibMTL (main, May 2025)") == LIBMTL
    assert first_names("impartial-vaes (Javaloy et al., ICML 2022)") == IMPARTIAL_VAES
    aggregation, scalarization = pytest.importorskip("torchjd.aggregation"), pytest.importorskip("torchjd.scalarization")
    bases = {"Aggregator", "GramianWeightedAggregator", "WeightedAggregator", "Weighting"}
    methods = {name.removesuffix("Weighting") for name in aggregation.__all__ if name not in bases}
    assert first_names("TorchJD 0.18: aggregators and weightings") == methods and len(methods) == 23
    methods = set(scalarization.__all__) - {"Scalarizer"}
    assert first_names("TorchJD 0.18: scalarizers") == methods and len(methods) == 12


def test_every_rule_of_ours_is_in_the_page():
    rules = {name for name in mf.resolvers.__all__ if name not in ("Resolver", "Rule", "resolver", "Compose")}
    assert rules <= set(re.findall(r"\bmf\.(\w+)", PAGE.read_text()))
    assert set(mf.losses.__all__) <= set(re.findall(r"\bmf\.losses\.(\w+)", PAGE.read_text()))


def test_plain_scalarizers():
    """Their gradient is the rule's direction."""
    scalarization = pytest.importorskip("torchjd.scalarization")
    x = torch.randn(7, requires_grad=True)
    losses = torch.stack([(x - i).square().mean() for i in range(3)])
    grads = [torch.autograd.grad(loss, x, retain_graph=True)[0] for loss in losses]
    w = torch.tensor([1.0, 2.0, 0.5])
    for peer, rule in (
        (scalarization.Sum(), mf.Sum()),
        (scalarization.Mean(), mf.Mean()),
        (scalarization.Constant(w), mf.Constant(w.tolist())),
    ):
        torch.testing.assert_close(torch.autograd.grad(peer(losses), x, retain_graph=True)[0], mf.resolve(grads, rule))


def test_random_weights_are_those_of_the_paper():
    """The softmax of standard normal draws: logarithms of ratios are normal with variance 2, independent of the others' scale."""
    w = mf.weights(torch.eye(3, dtype=torch.float64).expand(20_000, 3, 3), mf.Random())
    torch.testing.assert_close(w.sum(-1), torch.ones(20_000, dtype=torch.float64))
    ratio = (w[:, 0] / w[:, 1]).log() / 2**0.5
    quantiles = ratio.quantile(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64))
    torch.testing.assert_close(quantiles, torch.tensor([-1.2816, 0.0, 1.2816], dtype=torch.float64), rtol=0, atol=0.04)


def test_trimmed_mean():
    aggregation = pytest.importorskip("torchjd.aggregation")
    J = torch.randn(7, 50, dtype=torch.float64)
    for trim in (0, 1, 3):
        found = mf.resolve(list(J), mf.TrimmedMean(trim))
        torch.testing.assert_close(found, J.sort(0).values[trim : 7 - trim].mean(0))
        torch.testing.assert_close(found, aggregation.TrimmedMean(trim)(J))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_mmpareto_by_the_published_steps(backend):
    """Two rows: equal weights unless their cosine is not positive, else the min-norm point; twice that, made as long as the sum where it is shorter; 1.5 times."""
    seen = set()
    for seed in range(40):
        a, b = torch.randn(2, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * torch.tensor([[1.0], [3.0]])
        if torch.nn.functional.cosine_similarity(a, b, 0) > 0:
            share = 0.5
        else:
            share = (b @ (b - a) / ((a - b) @ (a - b))).item()
        d = 2 * share * a + 2 * (1 - share) * b
        longer = (a + b).norm() / d.norm()
        expected = 1.5 * d * (max(1, longer))
        seen.add((share == 0.5, bool(longer > 1)))
        torch.testing.assert_close(mf.resolve([a, b], mf.MMPareto(), backend=backend), expected, rtol=1e-9, atol=1e-9)
    assert len(seen) >= 2
    alone = mf.resolve([a, None], mf.MMPareto(gamma=2.0), backend=backend)
    torch.testing.assert_close(alone, 2 * a)
    assert (
        not mf.resolve([a, -2 * a], mf.MMPareto(), backend=backend).abs().gt(1e-12).any()
    )  # opposite rows: nothing that could be made longer
    with pytest.raises(ValueError, match="gamma is 0, expected a positive number"):
        mf.MMPareto(gamma=0)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_unit_rows_before_a_rule(backend):
    J = torch.randn(4, 30, dtype=torch.float64) * torch.logspace(-3, 3, 4).double().unsqueeze(1)
    units = J / J.norm(dim=1, keepdim=True)
    for make in (mf.MGDA, mf.UPGrad, mf.NashMTL):
        found = mf.resolve(list(J), mf.Compose(mf.Unit(), make()), backend=backend)
        torch.testing.assert_close(found, mf.resolve(list(units), make(), backend=backend), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(
        mf.resolve(list(J), mf.Compose(mf.Unit(), mf.MGDA()), backend=backend),
        mf.resolve(list(J), mf.MGDA("l2"), backend=backend),
        rtol=1e-8,
        atol=1e-10,
    )
