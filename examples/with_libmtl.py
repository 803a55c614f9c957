"""LibMTL: a weighting class that takes any of our rules, for shared parameters or (rep_grad=True) its tensor. `python examples/with_libmtl.py`"""

import torch
from LibMTL.architecture import HPS
from LibMTL.weighting import AbsWeighting
from toy import Model, losses, targets, worst, x

import mmfast as mf


class Resolved(AbsWeighting):
    def init_param(self) -> None:
        self.rule = mf.IMTLG()

    def backward(self, losses: torch.Tensor, **kwargs: object) -> object:
        if self.rep_grad:
            grads = self._compute_grad(losses, "backward", rep_grad=True)
            rep = (
                next(iter(self.rep.values())) if isinstance(self.rep, dict) else self.rep
            )  # one tensor for all; release 1.1.5 keeps it in a dict
            return rep.backward(mf.resolve(list(grads), self.rule, per="batch_sum"))
        return mf.backward(list(losses), self.rule, params=self.get_share_params()).weights.numpy()


class Both(HPS, Resolved):  # Trainer(weighting=Resolved, architecture=HPS, ...) makes the same class
    pass


for rep_grad in (False, True):
    toy = Model()
    heads = torch.nn.ModuleDict({"first": toy.heads[0], "second": toy.heads[1]})
    model = Both(list(heads), lambda: toy.encoder, heads, rep_grad, False, torch.device("cpu"))  # noqa: B023
    model.init_param()
    optimizer = torch.optim.Adam(model.parameters(), 5e-2)
    for _ in range(40):
        optimizer.zero_grad(set_to_none=False)
        model.backward(torch.stack(losses(list(model(x).values()), targets)))
        optimizer.step()
    print(f"worst task with rep_grad={rep_grad}: {worst(toy):.3f}")
