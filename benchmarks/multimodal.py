"""A training step of MMVAE and MoPoE on MNIST, SVHN and text with the paper's networks (SVHN's at half width): with blocks against without any,
against the same written with loops over components and samples, without blocks and with the naive one, and against MultiVae's MMVAE."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import mmfast as mf
from benchmarks import naive
from benchmarks.multivae_peer import mmvae
from benchmarks.providers import Unavailable
from benchmarks.timing import Call
from mmfast.models.multimodal import MultimodalVAE

CASES = ["moe", "mopoe"]
SAMPLES, BATCH, LATENT = 5, 64, 20
Split = Callable[[Tensor, int], Sequence[Tensor]]


def model(mixture: str, blocks: str = "") -> MultimodalVAE:
    """The same parameters whatever the blocks."""
    from mmfast.models.multimodal.networks import mnist_svhn_text

    torch.manual_seed(0)
    return MultimodalVAE(mnist_svhn_text(LATENT, 0.5), LATENT, mixture, "siwae", SAMPLES, blocks, mf.IMTLG if blocks else None)


def data(rows: int = BATCH) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    text = torch.nn.functional.one_hot(torch.randint(71, (rows, 8), generator=g), 71).float()
    return {"mnist": torch.rand(rows, 1, 28, 28, generator=g), "svhn": torch.rand(rows, 3, 32, 32, generator=g), "text": text}


def by_loops(vae: MultimodalVAE, x: dict[str, Tensor], split: Split = lambda z, k: [z] * k) -> Tensor:
    """The loss as it is usually written: component by component, sample by sample, density by density."""
    experts = {name: vae.modalities[name].encoder(value) for name, value in x.items()}  # type: ignore[operator]
    parts = []
    for subset in vae.components:
        precision = sum(experts[name][1] ** -2 for name in subset)
        mean = sum(experts[name][0] * experts[name][1] ** -2 for name in subset) / precision
        parts.append((mean, precision**-0.5))
    rows = len(next(iter(x.values())))
    noise = torch.randn(len(parts), vae.samples, rows, vae.latent, dtype=parts[0][0].dtype)
    log_w = []
    for (mean, std), own in zip(parts, noise, strict=True):
        z = mean + std * own  # all samples: the gradients of all are one problem
        branches = split(z, len(x))
        for k in range(vae.samples):
            log_p = -0.5 * z[k].square().sum(-1)
            for branch, (name, value) in zip(branches, x.items(), strict=True):
                m = vae.modalities[name]
                log_p = log_p + m.scale * m.log_prob(m.decoder(branch[k]), value)  # type: ignore[operator]
            log_q = [-0.5 * ((z[k] - m.detach()) / s.detach()).square().sum(-1) - s.detach().log().sum(-1) for m, s in parts]
            log_w.append(log_p - (torch.stack(log_q).logsumexp(0) - math.log(len(parts))))
    return -(torch.stack(log_w).logsumexp(0) - math.log(len(log_w))).sum()


class Step:
    """Forward and backward pass and Adam, of a loss of the batch."""

    def __init__(self, vae: MultimodalVAE, loss: Callable[[dict[str, Tensor]], Tensor] | None = None) -> None:
        self.loss, self.x = loss or vae.loss, data()
        # a learning rate of zero: every step of every provider sees the same parameters, and so log-weights as far apart
        self.optimizer = torch.optim.Adam(vae.parameters(), 0.0, amsgrad=True)

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        self.loss(self.x).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()


def _naive(z: Tensor, k: int) -> Sequence[Tensor]:
    return naive.fork(z, k, naive.imtlg)


def peak(step: Call) -> float:
    """Megabytes that a step has at most alive at once beyond what it starts with, by the account of torch's allocator."""
    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as run:
        step()
    waiting, changes = list(run.profiler.kineto_results.experimental_event_tree()), []  # type: ignore[union-attr]
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.tag.name == "Allocation":
            changes.append((event.start_time_ns, event.extra_fields.total_allocated, event.extra_fields.alloc_size))
    _, first, size = min(changes)  # the account goes on from what an earlier call has left
    return (max(total for _, total, _ in changes) - (first - size)) / 2**20


def _multivae(vae: MultimodalVAE) -> Step:
    peer = mmvae(vae, {name: tuple(value.shape[1:]) for name, value in data(1).items()})
    from multivae.data.datasets.base import MultimodalBaseDataset

    return Step(vae, lambda x: peer(MultimodalBaseDataset(x)).loss)


def steps(mixture: str) -> tuple[dict[str, Call], dict[str, str], float, bool]:
    """(the calls by provider, why others are not there, largest relative error of a gradient against the loops with the naive block in float64, whether
    they may be timed)."""
    calls: dict[str, Call] = {
        "ours": Step(model(mixture, "p")),
        "none": Step(model(mixture)),
        "pq": Step(model(mixture, "pq")),
        "pqs": Step(model(mixture, "pqs")),
        "loops": Step(looped := model(mixture), lambda x: by_loops(looped, x)),
        "naive": Step(blocked := model(mixture), lambda x: by_loops(blocked, x, _naive)),
    }
    missing = {}
    if mixture == "moe":
        try:
            calls["multivae"] = _multivae(model(mixture))
        except Unavailable as reason:
            missing["multivae"] = str(reason)
    error = gate(mixture)
    return calls, missing, error, error < 1e-6


def gate(mixture: str, rows: int = 4) -> float:
    """Largest error of a parameter's gradient, relative to its length, in float64 and of the same noise."""
    x = {name: value.double() for name, value in data(rows).items()}
    ours, other = model(mixture, "p").double(), model(mixture).double()
    torch.manual_seed(2)
    ours.loss(x).backward()  # type: ignore[no-untyped-call]
    torch.manual_seed(2)
    by_loops(other, x, _naive).backward()  # type: ignore[no-untyped-call]
    pairs = zip(ours.modalities.parameters(), other.modalities.parameters(), strict=True)
    return max(float((a.grad - b.grad).norm() / b.grad.norm()) for a, b in pairs)  # type: ignore[operator,union-attr]
