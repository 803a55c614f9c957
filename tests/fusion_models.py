"""Small fusion models and batches with missing modalities, for the tests of mmfast.models.fusion."""

import torch
from torch import nn

NAMES = ("image", "sound", "text")
INPUTS = {"image": 5, "sound": 4, "text": 3}
SIZES = {"image": 6, "sound": 7, "text": 5}  # of the features
ROWS, CLASSES = 12, 3


def encoders(dtype=torch.float64):
    made = {name: nn.Sequential(nn.Linear(INPUTS[name], SIZES[name]), nn.Tanh()) for name in NAMES}
    return {name: encoder.to(dtype) for name, encoder in made.items()}


def batch(rows=ROWS, dtype=torch.float64, seed=0):
    """Inputs, classes, and absences that leave the first row without anything and the second whole."""
    g = torch.Generator().manual_seed(seed)
    x = {name: torch.randn(rows, n, generator=g, dtype=torch.float64).to(dtype) for name, n in INPUTS.items()}
    present = {name: torch.rand(rows, generator=g) > 0.4 for name in NAMES}
    for name in NAMES:
        present[name][0], present[name][1] = False, True
    return x, torch.randint(CLASSES, (rows,), generator=g), present


def matrix(present):
    return torch.stack([present[name] for name in NAMES], 1)


def features_of(dtype=torch.float64, rows=ROWS, seed=0):
    """Features that a fusion is called with, zero where absent, and where they are present."""
    g = torch.Generator().manual_seed(seed)
    _, target, present = batch(rows, seed=seed)
    there = matrix(present)
    made = {name: torch.randn(rows, d, generator=g, dtype=torch.float64).to(dtype) for name, d in SIZES.items()}
    return {name: f * there[:, i : i + 1] for i, (name, f) in enumerate(made.items())}, there, target


def grads(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(a, b, **tolerances):
    assert a.keys() == b.keys() and a
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], msg=lambda m, name=name: f"{name}: {m}", **(tolerances or {"rtol": 1e-9, "atol": 1e-11}))


def assert_absent_cells_are_never_read(model, poisons=(float("nan"), float("inf"), 1e300)):
    """The same loss, logits and gradients whatever absent cells hold; no gradient goes back to them."""
    x, target, present = batch()
    present["text"] = torch.zeros(ROWS, dtype=torch.bool)  # and one of which nothing is there
    found = []
    for poison in (0.0, *poisons):
        leaves = {n: torch.where(present[n].unsqueeze(1), v, poison).requires_grad_() for n, v in x.items()}
        state = {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
        torch.manual_seed(3)
        own = grads(model, model.loss(leaves, target, present))
        for n, leaf in leaves.items():
            assert leaf.grad is None or (leaf.grad[~present[n]] == 0).all(), n
        model.load_state_dict(state, strict=False)  # running statistics moved on
        torch.manual_seed(3)
        found.append(own | {"logits": model(leaves, present).detach()})
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        assert all(torch.equal(other[k], found[0][k]) and other[k].isfinite().all() for k in other)


def overfit(model, steps=150, lr=3e-2):
    """Trains on 32 samples with missing modalities, one at least of each; the share of classes that it gets right."""
    x, target, present = batch(32, torch.float32)
    present["image"][:] = True
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        model.loss(x, target, present).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        return (model(x, present).argmax(1) == target).float().mean().item()
