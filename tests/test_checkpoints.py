"""Checkpoints of an ImpartialityBlock, of LinearHeads and of a plain ModuleList load into each other."""

import pytest
import torch
from torch import nn

import mmfast as mf

SIZES = [3, 1, 7]


class Model(nn.Module):
    def __init__(self, part):
        super().__init__()
        self.part = part


def linear(bias):
    return [nn.Linear(4, size, bias=bias) for size in SIZES]


MAKE = {
    "block": lambda bias, rule, **kw: mf.ImpartialityBlock(linear(bias), rule, **kw),
    "heads": lambda bias, rule, **kw: mf.LinearHeads(4, SIZES, rule, bias=bias, **kw),
    "list": lambda bias, rule, **kw: nn.ModuleList(linear(bias)),
    "dict": lambda bias, rule, **kw: mf.ImpartialityBlock(nn.ModuleDict(dict(zip("abc", linear(bias), strict=True))), rule, **kw),
    "plain dict": lambda bias, rule, **kw: nn.ModuleDict(dict(zip("abc", linear(bias), strict=True))),
}
PAIRS = [(a, b) for a in ("block", "heads", "list") for b in ("block", "heads")]
PAIRS += [("dict", "dict"), ("plain dict", "dict"), ("heads", "dict")]


def outputs(module, x):
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return torch.cat([head(x) for head in module.children()], 1)
    out = module(x)
    return torch.cat(list(out.values() if isinstance(out, dict) else out), 1)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("saved, loaded", PAIRS)
def test_strict_loading_converts(saved, loaded, bias, nested, assign):
    x = torch.randn(5, 4)
    theirs = MAKE[saved](bias, mf.PCGrad(), local=[1.0, 2.0, 3.0])
    ours = MAKE[loaded](bias, mf.PCGrad(), local=[3.0, 2.0, 1.0])
    own_stream = ours.resolver.rng.clone()
    checkpoint = (Model(theirs) if nested else theirs).state_dict()
    keys = list(checkpoint)
    (Model(ours) if nested else ours).load_state_dict(checkpoint, assign=assign)
    assert list(checkpoint) == keys  # the caller's stays as it was
    assert torch.allclose(outputs(ours, x), outputs(theirs, x), atol=1e-6)
    from_block = saved not in ("list", "plain dict")
    assert torch.equal(ours.resolver.rng, theirs.resolver.rng if from_block else own_stream)
    assert ours.beta.tolist() == ([1.0, 2.0, 3.0] if from_block else [3.0, 2.0, 1.0])
    with torch.no_grad():
        next(theirs.parameters()).zero_()
    if not assign:
        assert any(p.any() for p in ours.parameters())  # a copy


def test_a_plain_list_leaves_a_rules_state_alone():
    for make in (MAKE["block"], MAKE["heads"]):
        block = make(True, mf.GradVac())
        state = torch.rand_like(block.resolver.state)
        block.resolver.state.copy_(state)
        block.load_state_dict(nn.ModuleList(linear(True)).state_dict())
        assert torch.equal(block.resolver.state, state)


@pytest.mark.parametrize(
    "make", [mf.GradVac, mf.GradNorm, lambda: mf.PCGrad(every=3), lambda: mf.Compose(mf.PCD(), mf.MGDA()), lambda: mf.CRMOGM(mf.MGDA())]
)
def test_what_holds_nothing_of_a_rule_leaves_its_state_alone(make):
    """Weights swapped for their average and back, or those of one encoder: load_state_dict(some, strict=False) changes what it holds."""
    model = nn.ModuleDict({"encoder": nn.Linear(4, 4), "block": MAKE["block"](True, make())})
    outputs(nn.Sequential(model["encoder"], model["block"]), torch.randn(5, 4, requires_grad=True)).sum().backward()
    kept = {name: value.clone() for name, value in model["block"].resolver.state_dict().items()}
    assert any(name.endswith("state") for name in kept)
    for some in (model["encoder"].state_dict(prefix="encoder."), dict(model.named_parameters()), {}):
        model.load_state_dict(some, strict=False)
        now = model["block"].resolver.state_dict()
        assert now.keys() == kept.keys() and all(torch.equal(now[name], value) for name, value in kept.items())


def test_a_checkpoint_from_before_the_first_step_takes_the_state_back():
    rule, fresh = mf.GradVac(), mf.GradVac().state_dict()
    mf.resolve(torch.randn(3, 5), rule)
    rule.load_state_dict(rule.state_dict())
    assert rule.state is not None
    rule.load_state_dict(fresh)
    assert rule.state is None


@pytest.mark.parametrize("make", [mf.MoCo, lambda: mf.EMA(mf.MGDA())])
def test_what_is_kept_of_parameters_stays_with_a_part_of_a_checkpoint(make):
    rule, fresh, kept = make(), make().state_dict(), {}
    mf.resolve(torch.randn(3, 5), rule)
    kept = {name: value.clone() for name, value in rule.state_dict().items()}
    assert len(kept) > len(fresh)
    rule.load_state_dict({}, strict=False)
    assert all(torch.equal(rule.state_dict()[name], value) for name, value in kept.items())
    rule.load_state_dict(fresh)
    assert rule.state_dict().keys() == fresh.keys()


def test_branches_of_any_kind_load_from_their_list():
    def branches():
        return [nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), nn.Linear(4, 2)]

    plain, block = nn.ModuleList(branches()), mf.ImpartialityBlock(branches(), "pcgrad")
    block.load_state_dict(plain.state_dict())
    assert torch.equal(block.branches[0][0].weight, plain[0][0].weight)


BAD = {
    "other sizes": (lambda: nn.ModuleList([nn.Linear(4, n) for n in (1, 3, 7)]), "heads"),
    "fewer": (lambda: nn.ModuleList([nn.Linear(4, n) for n in (3, 1)]), "heads"),
    "more": (lambda: nn.ModuleList([nn.Linear(4, n) for n in (3, 1, 7, 2)]), "heads"),
    "more in a block": (lambda: nn.ModuleList([nn.Linear(4, n) for n in (3, 1, 7, 2)]), "block"),
    "another width": (lambda: nn.ModuleList([nn.Linear(5, n) for n in SIZES]), "heads"),
    "no bias": (lambda: nn.ModuleList(linear(False)), "heads"),
    "a bias too many": (lambda: nn.ModuleList([nn.Linear(4, 3), *linear(False)[1:]]), "heads"),
    "named": (lambda: MAKE["dict"](True, mf.PCGrad()), "heads"),
    "fewer rows": (lambda: mf.LinearHeads(4, [3, 1], mf.PCGrad()), "block"),
    "without a stream": (lambda: mf.LinearHeads(4, SIZES, mf.MGDA()), "block"),
    "something else": (lambda: nn.Linear(4, 11), "block"),
}


@pytest.mark.parametrize("kind", BAD)
def test_strict_loading_stays_strict(kind):
    make, into = BAD[kind]
    with pytest.raises(RuntimeError, match="Error.* in loading state_dict"):
        MAKE[into](True, mf.PCGrad()).load_state_dict(make().state_dict())


def test_unknown_keys_are_still_reported():
    for into in ("block", "heads"):
        checkpoint = {**nn.ModuleList(linear(True)).state_dict(), "other": torch.ones(1)}
        with pytest.raises(RuntimeError, match='Unexpected key.*"other"'):
            MAKE[into](True, mf.PCGrad()).load_state_dict(checkpoint)
