"""The average gradient outer product of a layer of 1,024 over 10,000 samples, against one backward pass over the same samples."""

import copy

import torch
from torch import Tensor, nn

import mmfast as mf
from benchmarks.timing import Call

WIDTH, SAMPLES, BATCH = 1024, 10_000, 500
# first: on the data, where a backward pass finds the weight's gradient alone, and Agop has least to lean on. Outputs, probes
CASES = [("first", 1, None), ("behind", 1, None), ("first", 10, 1), ("behind", 10, 1)]


class Case:
    """A layer with a head, on the data or behind another layer; batches whose graphs are kept."""

    def __init__(self, place: str, outputs: int, probes: int | None) -> None:
        torch.manual_seed(0)
        before = [] if place == "first" else [nn.Linear(WIDTH, WIDTH), nn.ReLU()]
        self.layer, self.probes = nn.Linear(WIDTH, WIDTH), probes
        self.model = nn.Sequential(*before, self.layer, nn.ReLU(), nn.Linear(WIDTH, outputs))
        self.x = torch.randn(SAMPLES, WIDTH)

    def calls(self) -> dict[str, Call]:
        agop = mf.collapse.Agop(self.layer, self.probes)
        batches = [self.model(x) for x in self.x.split(BATCH)]
        agop.remove()

        def ours() -> Tensor:
            agop.reset()
            for outputs in batches:
                agop.add(outputs)
            return agop.matrix

        def backward() -> None:
            self.model.zero_grad()
            for outputs in batches:
                outputs.sum().backward(retain_graph=True)

        return {"ours": ours, "backward": backward}

    def gate(self) -> tuple[float, bool]:
        """(error against Jacobians in float64, relative to their norm, whether it may be timed), of one output, for which a random sign is exact too."""
        x, model = self.x[:BATCH], nn.Sequential(*self.model[:-1], nn.Linear(WIDTH, 1))
        with mf.collapse.Agop(self.layer, self.probes) as agop:
            agop.add(model(x))
        wide, at = copy.deepcopy(model).double(), len(model) - 3
        h = wide[:at](x.double()).detach().requires_grad_()
        (J,) = torch.autograd.grad(wide[at:](h).sum(), h)
        exact = J.T @ J / BATCH
        error = float((agop.matrix - exact).norm() / exact.norm())
        return error, error < 1e-5
