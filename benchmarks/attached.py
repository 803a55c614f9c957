"""A training step with `attach` against the same with a block built in, and without one: an encoder of two layers, four heads of ten, SGD."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

import mmfast as mf
from benchmarks.timing import Call

HEADS = 4


class Step:
    """One training step; `how` is attach, built or none."""

    def __init__(self, width: int, batch: int, how: str) -> None:
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.heads = nn.ModuleList(nn.Linear(width, 10) for _ in range(HEADS))
        self.block = mf.ImpartialityBlock(self.heads, mf.UPGrad()) if how == "built" else None
        self.handle = mf.attach(self.heads, mf.UPGrad()) if how == "attach" else None
        self.x = torch.randn(batch, width)
        self.parameters = [*self.encoder.parameters(), *self.heads.parameters()]
        self.optimizer = torch.optim.SGD(self.parameters, lr=1e-3)

    def outputs(self, y: Tensor) -> Sequence[Tensor]:
        return [head(y) for head in self.heads] if self.block is None else self.block(y)  # type: ignore[return-value]

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        sum(((i + 1) * (out - i)).square().mean() for i, out in enumerate(self.outputs(self.encoder(self.x)))).backward()  # type: ignore[union-attr]
        self.optimizer.step()


def steps(width: int, batch: int) -> tuple[dict[str, Call], float, bool]:
    """(the calls by provider, largest difference of a gradient from the built-in block's, whether they may be timed)."""
    ours, built, none = (Step(width, batch, how) for how in ("attach", "built", "none"))
    for step in (ours, built):
        step()
    error = max(float((a.grad - b.grad).abs().max()) for a, b in zip(ours.parameters, built.parameters, strict=True))  # type: ignore[operator]
    return {"ours": ours, "built": built, "none": none}, error, error == 0
