"""TorchJD: our rules in its aggregators, its weightings as our rules, our solver in its UPGrad. `python examples/with_torchjd.py`"""

import torch
from torch import Tensor
from torchjd.aggregation import GramianWeightedAggregator, UPGrad, UPGradWeighting, Weighting
from torchjd.autojac import backward, jac_to_grad
from torchjd.linalg import DualConeProjector
from toy import Model, losses, targets, x

import mmfast as mf


class Ours(Weighting):  # a rule as a weighting
    rule = mf.UPGrad()

    def forward(self, gramian: Tensor, /) -> Tensor:
        return mf.weights(gramian, self.rule).to(gramian)


class Theirs(mf.Resolver):  # a weighting as a rule
    weighting = UPGradWeighting()

    def forward(self, G: Tensor, mask: Tensor | None = None) -> Tensor:
        there = torch.ones(len(G), dtype=torch.bool) if mask is None else mask
        return G.new_zeros(len(G)).masked_scatter(there, self.weighting(G[there][:, there]))


class Projector(DualConeProjector):  # what solves UPGrad's quadratic programs: exactly, without a ridge
    def __call__(self, U: Tensor, G: Tensor) -> Tensor:
        return torch.stack([mf.weights(G, mf.DualProj(u.tolist())) for u in U]).to(U)


for aggregator in (UPGrad(), UPGrad(projector=Projector()), GramianWeightedAggregator(Ours())):
    model = Model()
    backward(losses(model(x), targets), inputs=model.encoder.parameters())
    print(aggregator, "gives the weights", jac_to_grad(model.encoder.parameters(), aggregator))
print("mmfast with TorchJD's", mf.backward(losses(Model()(x), targets), Theirs()).weights)
