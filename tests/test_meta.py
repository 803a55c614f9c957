"""Blocks that start on the meta device, as FSDP's models do: what memory held before must reach no state, stream or record."""

import copy

import pytest
import torch
from torch import nn

import mmfast as mf

MAKES = {
    "block": lambda rule, **kwargs: mf.ImpartialityBlock([nn.Linear(4, 2) for _ in range(3)], rule, **kwargs),
    "heads": lambda rule, **kwargs: mf.LinearHeads(4, [2, 1, 3], rule, **kwargs),
}
RULES = {
    "PCGrad": mf.PCGrad,
    "GradVac": mf.GradVac,
    "GradNorm": lambda: mf.GradNorm(lr=0.1, update_at=1),
    "PCD": mf.PCD,
    "CRMOGM": lambda: mf.CRMOGM(mf.NSGD(update_at=1)),
    "Compose": lambda: mf.Compose(mf.GradVac(), mf.CRMOGM(mf.PCGrad())),
    "GradDrop": mf.GradDrop,
}
rules = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())


@pytest.fixture
def poison(monkeypatch):
    """Memory that is not initialised holds rubbish, and not by chance zeros."""
    empty_like = torch.empty_like

    def rubbish(x, **kwargs):
        made = empty_like(x, **kwargs)
        return made if made.is_meta else made.fill_(float("nan") if made.is_floating_point() else -7)

    monkeypatch.setattr(torch, "empty_like", rubbish)


def materialised(module, reset):
    module.to_empty(device="cpu")
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.linspace(-1, 1, p.numel()).view(p.shape))
    for part in module.modules() if reset else ():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    return module


def states(module):
    return {name: b for name, b in module.named_buffers() if name.endswith("state") and b is not None}


def streams(module):
    return [b for name, b in module.named_buffers() if name.endswith("rng") and b is not None]


def step(module):
    y = torch.randn(5, 4, requires_grad=True)
    sum(output.sin().sum() * (i + 1) for i, output in enumerate(module(y))).backward()
    return y.grad


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES.keys())
@rules
def test_to_empty(make, rule, reset, poison):
    if make is MAKES["heads"] and rule is mf.GradDrop:
        pytest.skip("LinearHeads takes no elementwise rule")
    with torch.device("meta"):
        module = make(rule(), local=[1.0, 2.0, 3.0])
    module = materialised(copy.deepcopy(module), reset)
    assert all((state == 0).all() for state in states(module).values())
    assert all(stream[0] >= 0 and stream[1] == 0 for stream in streams(module))
    assert torch.equal(module.beta, torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    with pytest.raises(RuntimeError, match="neither weights nor Gramian" if rule is mf.GradDrop else "no backward pass"):
        module.stats()
    assert all(step(module).isfinite().all() for _ in range(3))


@rules
def test_seeds_are_drawn_anew(rule, poison):
    def seeds(seed, reset):
        with torch.device("meta"):
            module = rule()
        torch.manual_seed(seed)
        return [stream[0].item() for stream in streams(materialised(module, reset))]

    for reset in (False, True):
        assert seeds(1, reset) == seeds(1, reset)  # torch.manual_seed governs them
        assert not seeds(1, reset) or seeds(1, reset) != seeds(2, reset)


@rules
def test_to_empty_of_a_module_that_has_values(rule, poison):
    """There the parameters are lost, not what the rule knows: it is no worse than before."""
    block = MAKES["block"](rule())
    step(block)
    before = [b.clone() for b in (*states(block).values(), *streams(block))]
    block.to_empty(device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(before, (*states(block).values(), *streams(block)), strict=True))


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES.keys())
@pytest.mark.parametrize("whole", [True, False])
def test_assigned_checkpoints(make, whole):
    """load_state_dict(assign=True) materialises no more than the checkpoint has."""
    trained = make(mf.GradVac(), local=[1.0, 2.0, 3.0])
    step(trained)
    saved = copy.deepcopy(trained.state_dict())
    if not whole:
        saved = {name: value for name, value in saved.items() if "resolver" not in name and name != "beta"}
    with torch.device("meta"):
        module = make(mf.GradVac(), local=[1.0, 2.0, 3.0])
    module.load_state_dict(saved, assign=True, strict=whole)
    torch.manual_seed(5)
    found = step(module)
    assert found.isfinite().all() and module.stats().weights.isfinite().all()
    if whole:
        torch.manual_seed(5)
        assert torch.equal(found, step(copy.deepcopy(trained)))


def test_reset_parameters_of_a_rule():
    for make in RULES.values():
        rule = make()
        g = [torch.randn(6) for _ in range(3)]
        before = [stream[0].item() for stream in streams(rule)]
        mf.resolve(g, rule)
        for part in rule.modules():
            if hasattr(part, "reset_parameters"):
                part.reset_parameters()
        assert all((state == 0).all() for state in states(rule).values())
        assert all(stream[0] != seed and stream[1] == 0 for stream, seed in zip(streams(rule), before, strict=True))


def test_half_precision_keeps_every_digit():
    rule = mf.GradNorm(alpha=1.0, update_at=1)
    mf.resolve([torch.randn(6) for _ in range(3)], rule)
    before = rule.state.clone()
    assert torch.equal(rule.half().state, before)
