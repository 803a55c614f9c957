"""The likelihoods of a batch and their gradients by the compiled operator, against the same in plain torch, and against a backward pass without any:
the features of three data sets of Table 1."""

import torch
from torch import Tensor

from benchmarks.timing import Call
from mmfast.models.likelihoods import Bernoulli, Categorical, Joint, Likelihood, LogNormal, Normal, Poisson

_CLASSES = {"Credit": (3, 7, 4, *[11] * 6), "Adult": (7, 16, 7, 14, 6, 5)}
FEATURES: dict[str, list[Likelihood]] = {
    "Wine": [*[LogNormal()] * 11, Poisson(), Bernoulli()],
    "Credit": [*map(Categorical, _CLASSES["Credit"]), *[Normal()] * 6, *[LogNormal()] * 7, Poisson(), Bernoulli()],
    "Adult": [*map(Categorical, _CLASSES["Adult"]), *[LogNormal()] * 3, *[Poisson()] * 2, Bernoulli()],
}
CASES = [("Wine", 128, 1), ("Credit", 128, 1), ("Adult", 1000, 1), ("Wine", 128, 20), ("Credit", 128, 20)]  # name, rows, samples


class Case:
    """A batch of a data set's features, 20 % of the cells missing."""

    def __init__(self, name: str, rows: int, samples: int) -> None:
        torch.manual_seed(0)
        features = FEATURES[name]
        self.joint = Joint(features)
        self.raw = torch.randn(samples, rows, sum(self.joint.sizes))
        values = [torch.randint(part.classes, (rows,)) if isinstance(part, Categorical) else torch.randint(2, (rows,)) for part in features]
        discrete = torch.tensor([isinstance(part, Categorical | Bernoulli | Poisson) for part in features])
        self.x = torch.where(discrete, torch.stack(values, -1).float(), torch.rand(rows, len(features)) + 0.5)
        self.seen = (torch.rand(rows, len(features)) > 0.2).float()

    def ours(self, raw: Tensor) -> Tensor:
        return self.joint.log_prob(raw, self.x, self.seen)

    def torch(self, raw: Tensor) -> Tensor:
        return self.joint.in_torch(raw, self.x.expand(*raw.shape[:-1], -1)) * self.seen

    def call(self, provider: str) -> Call:
        """Values and gradient, as a training step asks for them; "none" is what a backward pass takes without likelihoods."""
        function = {"ours": self.ours, "torch": self.torch, "none": lambda raw: raw}[provider]
        raw = self.raw.clone().requires_grad_()

        def call() -> None:
            raw.grad = None
            function(raw).sum(-1).sum().backward()  # type: ignore[no-untyped-call]

        return call

    def gate(self) -> tuple[float, bool]:
        """(largest error of a derivative against float64, whether it may be timed)."""
        wide = Joint(self.joint.likelihoods).double()
        raw, exact = self.raw.clone().requires_grad_(), self.raw.double().requires_grad_()
        self.ours(raw).sum().backward()  # type: ignore[no-untyped-call]
        (wide.in_torch(exact, self.x.double().expand(*exact.shape[:-1], -1)) * self.seen.double()).sum().backward()
        assert raw.grad is not None and exact.grad is not None
        error = float(((raw.grad - exact.grad).abs() / exact.grad.abs().clamp_min(1)).max())
        return error, error < 1e-6
