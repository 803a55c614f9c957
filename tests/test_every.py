"""every=R: a rule is solved at each R-th call, and its weights are kept in between."""

import copy

import pytest
import torch
from problems import gramian
from rule_table import RULES

import mmfast as mf
from mmfast.backends import direct

BACKENDS = ["auto", "reference"]
K, CALLS = 4, 8
MAKE = {
    "PCGrad": mf.PCGrad,
    "GradVac": mf.GradVac,
    "MGDA": mf.MGDA,
    "CAGrad": lambda **every: mf.CAGrad(0.4, **every),
    "UPGrad": mf.UPGrad,
    "DualProj": mf.DualProj,
    "PCD": mf.PCD,
    "NashMTL": mf.NashMTL,
    "FairGrad": lambda **every: mf.FairGrad(0.5, **every),
    "IMTLG": mf.IMTLG,
    "AlignedMTL": mf.AlignedMTL,
    "ConFIG": mf.ConFIG,
    "MMPareto": mf.MMPareto,
    "GradNorm": lambda **every: mf.GradNorm(alpha=1.0, lr=0.1, update_at=1, **every),
    "NSGD": lambda **every: mf.NSGD(update_at=2, **every),
    "Unit": mf.Unit,
    "DBMTL": mf.DBMTL,
    "Krum": lambda **every: mf.Krum(1, **every),
    "Random": mf.Random,
    "Sum": mf.Sum,
    "Mean": mf.Mean,
    "Constant": lambda **every: mf.Constant([1.0, 2.0, 3.0, 4.0], **every),
}


def grams():
    return [gramian(K, seed=seed) for seed in range(CALLS)]


def run(rule, problems, masks=None, **kwargs):
    masks = masks or [None] * len(problems)
    return [mf.weights(G, rule, mask, **kwargs) for G, mask in zip(problems, masks, strict=True)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MAKE)
def test_weights_are_those_of_the_last_call_that_solved(name, backend):
    """What the rule alone gives for every third problem, times what the mean change of the norms makes of them; its own state sees those problems alone."""
    torch.manual_seed(1)
    plain = MAKE[name]()
    held = MAKE[name](every=3)
    if plain.rng is not None:
        held.rng.copy_(plain.rng)
    for call, G in enumerate(grams()[: 5 if backend == "auto" else 4]):
        found = mf.weights(G, held, backend=backend)
        if call % 3 == 0:
            if plain.rng is not None:
                plain.rng[1] = call
            solved, norms = mf.weights(G, plain, backend=backend), G.diagonal().sqrt()
        change = (G.diagonal().sqrt() / norms).mean()
        torch.testing.assert_close(found, solved * change**plain.degree, rtol=1e-12, atol=0)
    assert plain.state is None or torch.equal(held.state, plain.state)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_that_was_missing_is_solved_for_at_once(backend):
    rule, problems = mf.UPGrad(every=100), grams()
    mask = torch.tensor([True, True, False, True])
    first, second, third = run(rule, problems[:3], [None, mask, None], backend=backend)
    assert torch.equal(second, torch.where(mask, first, 0)) and torch.equal(third, first)  # gone for a call: the others keep theirs
    rule.reset()
    first, second, third = run(rule, problems[:3], [mask, None, None], backend=backend)
    torch.testing.assert_close(first, mf.weights(problems[0], mf.UPGrad(), mask, backend=backend))
    torch.testing.assert_close(second, mf.weights(problems[1], mf.UPGrad(), backend=backend))
    assert torch.equal(third, second)


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_problem_counts_its_own_calls(backend):
    rule, G = mf.MGDA(every=2), torch.stack(grams()[:2])
    broken = G.clone()
    broken[0, 0, 0] = torch.nan
    one = mf.weights(broken, rule, backend=backend)
    two = mf.weights(G, rule, backend=backend)
    assert one[0].isnan().all() and torch.equal(two[1], one[1])  # the first problem has begun now, the second was kept
    three = mf.weights(G.flip(0), rule, backend=backend)
    assert torch.equal(three[0], two[0])
    torch.testing.assert_close(three[1], two[0])


@pytest.mark.parametrize(
    "make, backend",
    [
        (lambda: mf.NashMTL(every=3), "auto"),
        (lambda: mf.FairGrad(2.0, every=4), "auto"),
        (lambda: mf.Compose(mf.GradVac(), mf.NashMTL(max_norm=1.0, every=2)), "auto"),
        (lambda: mf.CRMOGM(mf.NashMTL(every=2)), "auto"),
        (lambda: mf.CRMOGM(mf.Unit(every=2)), "reference"),  # takes a tenth of the time
        (lambda: mf.Compose(mf.GradVac(), mf.Unit(every=2)), "reference"),
    ],
    ids=["NashMTL", "FairGrad", "Compose", "CRMOGM", "CRMOGM-reference", "Compose-reference"],
)
def test_a_loss_scale_that_changes_is_not_seen(make, backend):
    found = []
    for scales in ([1.0] * CALLS, [2.0 ** (7 * call % 12) for call in range(CALLS)]):
        torch.manual_seed(2)
        rule = make()
        masks = [None, None, *([torch.tensor([True, False, True, True])] * 3), *[None] * (CALLS - 5)]
        grads = [torch.randn(K, 9, dtype=torch.float64) for _ in scales]
        found.append([mf.resolve(list(g * s), rule, mask=m, backend=backend) / s for g, s, m in zip(grads, scales, masks, strict=True)])
    law = make().degree  # the result of s times the gradients is s^(1 + degree) times theirs
    for ours, plain, s in zip(found[1], found[0], [2.0 ** (7 * call % 12) for call in range(CALLS)], strict=True):
        torch.testing.assert_close(ours * s**-law, plain, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["PCGrad", "NashMTL", "GradNorm"])
def test_a_checkpoint_goes_on_where_it_was(name):
    rule, problems = MAKE[name](every=4), grams()
    run(rule, problems[:2])
    saved = copy.deepcopy(rule.state_dict())
    assert "hold.state" in saved
    other = MAKE[name](every=4)
    other.load_state_dict(saved)
    twin = copy.deepcopy(rule)
    assert twin.hold.of is twin
    for a, b, c in zip(run(rule, problems[2:]), run(other, problems[2:]), run(twin, problems[2:]), strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    rule.reset()
    assert rule.hold.state is None
    other.hold.reset_parameters()
    assert not other.hold.state.any()


@pytest.mark.parametrize("name", ["UPGrad", "PCGrad", "GradVac"])
def test_past_the_dispatcher_and_through_it(name):
    """The same bits, calls that solve and calls that do not; a rule with a state of its own goes through it."""
    torch.manual_seed(4)
    one, grads = MAKE[name](every=3), [list(torch.randn(K, 50)) for _ in range(7)]
    two = copy.deepcopy(one)
    for g in grads:
        served = direct.resolve(g, copy.deepcopy(one), False, False) is not None
        assert served == (one.hold.state is not None and name != "GradVac")
        assert torch.equal(mf.resolve(g, one), mf.resolve(g, two, backend="cpu"))
    assert torch.equal(one.hold.state, two.hold.state)


def test_a_rule_of_rules_row_by_row():
    """Held weights are weights: a step that maps rows is one that scales them between its solves."""
    G = gramian(K)
    rule = mf.Compose(mf.PCGrad(order="fixed", every=2), mf.MGDA())
    w = mf.weights(G, rule)
    scaled = mf.weights(G, mf.PCGrad(order="fixed"))
    torch.testing.assert_close(w, scaled * mf.weights(G * scaled * scaled.unsqueeze(1), mf.MGDA()))


@pytest.mark.parametrize("every", [0, -1, 2.0, True, None])
def test_errors(every):
    with pytest.raises(ValueError, match="CAGrad: every is .*, expected a number of calls, 1 or more"):
        mf.CAGrad(every=every)


def test_every_rule_of_the_table_takes_it():
    rules = {type(rule) for row in RULES.values() for rule in (row.make(8).chain() or ())[:1]} - {type(mf.CRMOGM(mf.Sum()))}
    assert rules == {type(make()) for make in MAKE.values()}
    assert repr(mf.CAGrad(every=10)) == "CAGrad(c=0.5, rescale=0, every=10)" and repr(mf.IMTLG(every=2)) == "IMTLG(every=2)"
