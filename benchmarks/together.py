"""A training step of several VAEs together, against one by itself: Wine's thirteen features, a rule in every model's block."""

import torch

import mmfast as mf
from benchmarks.likelihoods import FEATURES, Case
from benchmarks.timing import Call
from mmfast.models.likelihoods import Joint
from mmfast.models.together import Together
from mmfast.models.vae import VAE

CASES = [("elbo", 1, 5), ("elbo", 1, 8), ("iwae", 20, 5)]  # objective, samples, models
ROWS = 128


def _model(objective: str, samples: int, seed: int) -> VAE:
    torch.manual_seed(seed)
    return VAE(Joint(FEATURES["Wine"]), 50, 7, [mf.GradNorm()], objective, samples)


def steps(objective: str, samples: int, count: int) -> tuple[dict[str, Call], float, bool]:
    """(the calls by provider, largest difference of a loss from that of the same model by itself, whether they may be timed)."""
    case = Case("Wine", ROWS, 1)
    x, seen = (t.expand(count, -1, -1).contiguous() for t in (case.x, case.seen))
    together = Together([_model(objective, samples, e) for e in range(count)], range(count))
    one = _model(objective, samples, 0)
    optimizer = torch.optim.Adam(one.parameters(), 1e-3, fused=True)

    def single() -> torch.Tensor:
        optimizer.zero_grad()
        loss = one.loss(case.x, case.seen)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss.detach()

    error = 0.0
    torch.manual_seed(0)
    for _ in range(20):
        alone, all_of_them = single(), together.step(x, seen)
        error = max(error, float((all_of_them[0] - alone).abs() / alone.abs()))
    return {"ours": lambda: together.step(x, seen), "single": single}, error, error < 1e-5
