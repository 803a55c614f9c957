"""The systems at the sizes of these runs, and their stages."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil, prod
from typing import cast

import torch
from torch import nn

from mmfast.experiments.collapse.parts import Parts
from mmfast.experiments.collapse.settings import Settings
from mmfast.experiments.settings import SettingsError, make_resolver
from mmfast.models.fusion import CMAE, EBR, KD, MT, MUSE, SMIL, Concat, Fusion, FusionModel, Grape, Late, M3Care, ShaSpec
from mmfast.models.fusion.base import network
from mmfast.resolvers.names import ResolverLike

WIDTH = 64  # of features, hidden layers, the code and EBR's factors
HIDDEN = 128  # of EBR's networks and CM-AE's


@dataclass
class System:
    """A model, and where it is looked at."""

    model: FusionModel
    first: nn.Linear | None  # the layer that takes the modalities' features side by side
    last: nn.Linear | None  # the one that makes the logits, of the fused features


def make(run: Settings, parts: Parts) -> System:
    """The system of a run; encoders and fusion have the same first weights whatever the cure and the rule.

    Raises:
        SettingsError: it does not suit the data.
    """
    torch.manual_seed(run.seed)
    encoders = {name: encoder(tuple(x.shape[1:])) for name, x in parts.train.inputs.items()}
    sizes = dict.fromkeys(encoders, WIDTH)
    if len(sizes) < 2:
        raise SettingsError(f"data is {run.data!r}, which has {', '.join(sizes)}; expected two modalities at least")
    rule = make_resolver(run.rule)
    if run.system == "cmae":
        decoders = {name: decoder(tuple(x.shape[1:])) for name, x in parts.train.inputs.items()}
        cmae = CMAE(encoders, decoders, parts.classes, WIDTH, HIDDEN, rule, sizes=sizes)
        return System(cmae, _linear(cmae.fusion, 0), _linear(cmae.classifier, -1))
    if run.system == "smil":
        smil = SMIL(encoders, _may_be_missing(run, parts), parts.classes, WIDTH, sizes=sizes)
        return System(smil, smil.fusion.fuse, smil.fusion.classify)
    fusion = FUSIONS[run.system](sizes, parts.classes, None if run.cure == "ebr" else rule)  # of EBR it is in EBR's own block
    if run.cure == "kd":
        model: FusionModel = KD(encoders, fusion, parts.classes, run.weight, sizes=sizes)
    elif run.cure == "ebr":
        model = EBR(encoders, fusion, WIDTH, HIDDEN, run.weight, resolver=rule, sizes=sizes)
        for h in model.factors.values():  # else they escape the discriminator by growing without end, see docs/collapse_runs.md
            cast(nn.Sequential, h).append(nn.LayerNorm(WIDTH, elementwise_affine=False))
    else:
        model = FusionModel(encoders, fusion, sizes)
    return System(model, _linear(fusion, 0) if run.system == "early" else None, None if run.system == "late" else _linear(fusion, -1))


FUSIONS: dict[str, Callable[[Mapping[str, int], int, ResolverLike | None], Fusion]] = {
    "late": lambda sizes, classes, rule: Late(sizes, classes),
    "early": lambda sizes, classes, rule: Concat(network(sum(sizes.values()), WIDTH, classes)),
    "mt": lambda sizes, classes, rule: MT(sizes, classes, WIDTH, 2, resolver=rule),
    "grape": lambda sizes, classes, rule: Grape(sizes, classes),
    "m3care": lambda sizes, classes, rule: M3Care(sizes, classes, WIDTH),
    "shaspec": lambda sizes, classes, rule: ShaSpec(sizes, classes, WIDTH, resolver=rule),
    "muse": lambda sizes, classes, rule: MUSE(sizes, classes, WIDTH, resolver=rule),
}


def encoder(shape: tuple[int, ...]) -> nn.Module:
    """From inputs of this shape to `WIDTH` features: two layers of numbers; the convolutions of SMIL's networks of 28 x 28 or 20 x 20, and a layer."""
    if len(shape) == 1:
        return network(shape[0], WIDTH, WIDTH)
    if shape == (1, 28, 28):
        return nn.Sequential(
            nn.Conv2d(1, 5, 5),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Conv2d(5, 10, 5),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(160, WIDTH),
        )
    if shape == (1, 20, 20):
        layers: list[nn.Module] = []
        for before, after in ((1, 32), (32, 48)):
            layers += [nn.Conv2d(before, after, 2, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
        layers += [nn.Conv2d(48, 20, 2), nn.BatchNorm2d(20), nn.ReLU(), nn.Flatten(), nn.Linear(320, WIDTH)]
        return nn.Sequential(*layers)
    raise SettingsError(f"an input has shape {shape}, expected numbers, or pictures of 1 x 28 x 28 or 1 x 20 x 20")


def decoder(shape: tuple[int, ...]) -> nn.Module:
    """From the code to inputs of this shape."""
    return nn.Sequential(network(WIDTH, HIDDEN, prod(shape)), nn.Unflatten(1, shape))


def _may_be_missing(run: Settings, parts: Parts) -> str:
    lacking = [name for name, there in parts.train.present.items() if not there.all()]
    if len(lacking) != 1:
        raise SettingsError(
            f"system is 'smil', but of {run.data} {', '.join(lacking) or 'no modality'} is missing for some; expected one modality that is"
        )
    return lacking[0]


def _linear(module: nn.Module, place: int) -> nn.Linear:
    """Of the linear layers in it the first or last."""
    return [m for m in module.modules() if isinstance(m, nn.Linear)][place]


def plan(run: Settings, modalities: int) -> list[int]:
    """Epochs of each stage; the last has `run.epochs`, all before it together as many (each one at least)."""
    before = {"cmae": 1, "smil": 1}.get(run.system, 0)
    if run.cure == "kd":
        half = ceil(run.epochs / 2)
        return [half, *[ceil(half / (modalities - 1))] * (modalities - 1), run.epochs]
    return [run.epochs] * (before + 1)
