"""Modality imbalance under one runner: unimodal heads as further rows at each encoder, and gradient modulation, on two modalities made from a formula.

    python -m benchmarks.unimodal_heads      # five seeds, the table of docs/imbalance.md: some minutes of one core

Each encoder's output is forked between the fusion and a head of its own modality: two rows, g_multimodal and g_unimodal, under a rule. Where a method has no unimodal loss the heads learn all the
same, from features that they send no gradient to; so every method's encoders are judged by heads of one kind.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mmfast as mf

CLASSES, TRAIN, HELD_OUT, TEST = 10, 1050, 1000, 4500  # avMNIST of 1,050 training pairs; validation and test cost nothing here
SIZES, WIDTH, BATCH = (64, 64), 64, 50
RATES = (0.01, 0.03, 0.1)  # for each method the best on validation is taken: modulation changes how large steps are
TUNING = 100  # the seed of the runs that show which is the best; no other use is made of it
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 8: 2.365, 10: 2.262}  # 95 % of Student's t for so many seeds


class Pairs(NamedTuple):
    inputs: tuple[Tensor, Tensor]  # image-like, learned in a few epochs; sound-like, slowly
    labels: Tensor


def pairs(n: int, generator: torch.Generator) -> Pairs:
    """An "image" is its class's pattern in noise; a "sound" a tone in noise whose pitch is the class and whose phase is anything, so that no linear map shows it.

    The noise is such that a network trained on one modality alone is right about as often on either; they differ in how soon.
    """
    labels = torch.randint(CLASSES, (n,), generator=generator)
    place = torch.linspace(0, 1, 64)
    pattern = torch.cos(place * (17 * torch.arange(1, CLASSES + 1)[:, None]).float().remainder(23) + torch.arange(CLASSES)[:, None])
    image = pattern[labels] + 1.8 * torch.randn(n, 64, generator=generator)
    phase = 2 * torch.pi * torch.rand(n, 1, generator=generator)
    sound = torch.cos(2 * torch.pi * (2 + labels[:, None]) * place + phase) + 1.2 * torch.randn(n, 64, generator=generator)
    return Pairs((image, sound), labels)


class Model(nn.Module):
    """Two encoders, a linear layer that fuses what they give, and a head for each."""

    def __init__(self) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(nn.Sequential(nn.Linear(size, 128), nn.ReLU(), nn.Linear(128, WIDTH), nn.ReLU()) for size in SIZES)
        self.fusion = nn.Linear(2 * WIDTH, CLASSES)
        self.heads = nn.ModuleList(nn.Linear(WIDTH, CLASSES) for _ in SIZES)

    def encode(self, inputs: tuple[Tensor, ...]) -> list[Tensor]:
        return [encoder(x) for encoder, x in zip(self.encoders, inputs, strict=True)]

    def parts(self, features: list[Tensor] | tuple[Tensor, ...]) -> list[Tensor]:
        """Each modality's part in the fused logits, which are their sum."""
        weights = self.fusion.weight.split(WIDTH, 1)
        return [F.linear(f, w, self.fusion.bias / 2) for f, w in zip(features, weights, strict=True)]

    def alone(self, features: list[Tensor]) -> list[Tensor]:
        return [head(f) for head, f in zip(self.heads, features, strict=True)]


class Method(NamedTuple):
    name: str
    rule: Callable[[], mf.Resolver] | None = None  # of each encoder's two rows
    modulation: Callable[[], nn.Module] | None = None


METHODS = [
    Method("multimodal loss alone", lambda: mf.Constant([1.0, 0.0])),
    Method("OGM(alpha=0.1)", modulation=lambda: mf.OGM(2)),
    Method("OGM(alpha=0.8)", modulation=lambda: mf.OGM(2, alpha=0.8)),
    Method("AGM(alpha=1)", modulation=lambda: mf.AGM(2)),
    Method("CGGM(rho=1.3)", modulation=lambda: mf.CGGM(2)),
    Method("rows: Sum", mf.Sum),
    Method("rows: PCGrad", mf.PCGrad),
    Method("rows: UPGrad", mf.UPGrad),
    Method("rows: MMPareto(gamma=1.5)", mf.MMPareto),
    Method("rows: Constant([0, 1]), which is DGL", lambda: mf.Constant([0.0, 1.0])),
]


def gradients(model: Model, method: Method, state: list[nn.Module], batch: Pairs) -> None:
    """One backward pass of a method; `state` is what it keeps."""
    features = model.encode(batch.inputs)
    if method.rule is None:
        (modulation,) = state
        fused, own = modulation(features), [f.detach() for f in features]
    else:
        forks = [mf.fork(f, 2, rule, preserve_norm=False) for f, rule in zip(features, state, strict=True)]
        fused, own = zip(*forks, strict=True)
    parts, alone = model.parts(fused), model.alone(own)
    if method.rule is None:
        modulation.update(alone if isinstance(modulation, mf.CGGM) else parts, batch.labels)
    losses = [F.cross_entropy(logits, batch.labels) for logits in (sum(parts), *alone)]
    sum(losses).backward()


def accuracies(model: Model, data: Pairs) -> list[float]:
    """Of the fused model and of each modality's head, in percent."""
    with torch.no_grad():
        features = model.encode(data.inputs)
        every = (sum(model.parts(features)), *model.alone(features))
        return [100 * (logits.argmax(1) == data.labels).double().mean().item() for logits in every]


def run(method: Method, rate: float, seed: int, epochs: int) -> tuple[list[float], list[float]]:
    """Accuracies on validation and test; a seed gives all methods the same data, first weights and batches."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    train, held_out, test = (pairs(n, generator) for n in (TRAIN, HELD_OUT, TEST))
    model = Model()
    state = [method.modulation()] if method.rule is None else [method.rule() for _ in SIZES]
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, max(1, epochs * 7 // 10), 0.1)
    for _ in range(epochs):
        for rows in torch.randperm(TRAIN, generator=generator).split(BATCH):
            optimizer.zero_grad()
            gradients(model, method, state, Pairs(tuple(x[rows] for x in train.inputs), train.labels[rows]))
            optimizer.step()
        schedule.step()
    return accuracies(model, held_out), accuracies(model, test)


def interval(values: Sequence[float]) -> str:
    """Mean and half the width of its 95 % interval."""
    half = STUDENT[len(values)] * statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):.1f} ± {half:.1f}"


def table(seeds: int, epochs: int) -> str:
    lines = [
        "| method | learning rate | fused | image head | sound head | fused, less the first row |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    first: tuple[float, ...] = ()
    for method in METHODS:
        start = time.process_time()
        rate = max(RATES, key=lambda rate: run(method, rate, TUNING, epochs)[0][0])
        fused, image, sound = zip(*(run(method, rate, seed, epochs)[1] for seed in range(seeds)), strict=True)
        first = first or fused
        difference = interval([a - b for a, b in zip(fused, first, strict=True)])
        lines.append(f"| {method.name} | {rate:g} | {interval(fused)} | {interval(image)} | {interval(sound)} | {difference} |")
        print(f"{lines[-1]} {time.process_time() - start:.0f} s", file=sys.stderr, flush=True)
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, choices=sorted(STUDENT))
    parser.add_argument("--epochs", type=int, default=40)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(table(arguments.seeds, arguments.epochs))
