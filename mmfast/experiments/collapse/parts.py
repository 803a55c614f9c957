"""The rows of a run, and which modalities of them are missing: by the seed alone, whatever the system."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmfast.data import modalities
from mmfast.data.samples import Samples
from mmfast.experiments.collapse.settings import NOISY, Settings

ROWS = {"train": 8000, "valid": 2000, "test": 4000}  # at most, drawn by the seed
RATES = (0.0, 0.2, 0.4, 0.6, 0.8)  # of what is missing at inference
TRAIN_RATE = {"avMNIST": 0.0}  # of what is dropped in training; most of avMNIST's images have no sound as they are
OTHERS_RATE = 0.2


@dataclass
class Parts:
    """What a run is trained, chosen and tested on."""

    train: Samples  # with modalities dropped
    valid: Samples  # as it is
    valid_missing: Samples  # the same rows, the rates of the test in turn
    test: dict[float, Samples]  # by rate; 0 as it is
    classes: int

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.train.inputs)


def load(run: Settings) -> Parts:
    """The parts of a run.

    Raises:
        DataError: the data set is not here.
    """
    split = modalities.load(run.data, run.seed)
    generator = torch.Generator().manual_seed(run.seed)
    cut = {}
    for name, most in ROWS.items():  # every draw is made whatever the system, cure and noise
        rows: Samples = getattr(split, name)
        order = torch.randperm(len(rows), generator=generator)
        cut[name] = rows if run.full or len(rows) <= most else rows.part(order[:most])
    keys = {name: torch.rand(len(rows), len(rows.inputs), generator=generator) for name, rows in cut.items()}
    if run.noise:
        cut = {name: noisy(rows, NOISY[run.data], run.noise, generator) for name, rows in cut.items()}
    in_turn = torch.tensor(RATES)[torch.arange(len(cut["valid"])) % len(RATES)].unsqueeze(1)
    return Parts(
        dropped(cut["train"], keys["train"], TRAIN_RATE.get(run.data, OTHERS_RATE)),
        cut["valid"],
        dropped(cut["valid"], keys["valid"], in_turn),
        {rate: dropped(cut["test"], keys["test"], rate) for rate in RATES},
        split.classes,
    )


def dropped(rows: Samples, keys: Tensor, rate: float | Tensor) -> Samples:
    """The rows without the modalities whose key is below the rate; the last one of a row stays.

    Args:
        rows: n samples with m modalities; not changed.
        keys: [n, m], uniform in [0, 1): what is missing at a rate is missing at every larger one.
        rate: a number, or [n, 1].
    """
    there = torch.stack(list(rows.present.values()), 1)
    keys = keys.masked_fill(~there, -1.0)
    kept = there & ((keys >= rate) | (keys == keys.amax(1, keepdim=True)))
    return replace(rows, present=dict(zip(rows.present, kept.unbind(1), strict=True)))


def noisy(rows: Samples, name: str, size: float, generator: torch.Generator) -> Samples:
    """The rows with N(0, size^2) added to the inputs of a modality."""
    x = rows.inputs[name]
    return replace(rows, inputs={**rows.inputs, name: x + size * torch.randn(x.shape, generator=generator, dtype=x.dtype)})


def only(rows: Samples, name: str) -> Samples:
    """The rows that have this modality, with it alone."""
    found = rows.part(rows.present[name].nonzero().squeeze(1))
    return replace(found, present={other: there & (other == name) for other, there in found.present.items()})


def with_and_without(rows: Samples, name: str) -> tuple[Samples, Samples]:
    """The rows that have this modality and another one: as they are, and without it."""
    others = torch.stack([there for other, there in rows.present.items() if other != name], 1).any(1)
    found = rows.part((rows.present[name] & others).nonzero().squeeze(1))
    return found, replace(found, present={**found.present, name: torch.zeros_like(found.present[name])})
