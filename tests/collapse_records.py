"""Made-up records of runs on representation collapse, and small data for real ones."""

import torch

from mmfast.data import modalities
from mmfast.data.planted import Planted, Source
from mmfast.data.samples import Samples, Split
from mmfast.experiments.collapse.measures import Look, Scores
from mmfast.experiments.collapse.parts import RATES
from mmfast.experiments.collapse.results import Result
from mmfast.experiments.collapse.settings import settings

ROWS = {"train": 96, "valid": 60, "test": 60}


def split(name, seed, classes=3):
    """Rows of two modalities; as avMNIST half of the training rows and a third of the validation rows lack the second."""
    names = ("image", "audio") if name == "avMNIST" else ("status" if name == "Credit" else "strong", "weak")
    planted, made = source(seed, names, classes), {}
    for i, (part, rows) in enumerate(ROWS.items()):
        inputs, target = planted.draw(rows, 10 * seed + i)
        target[:classes] = torch.arange(classes)  # none is missing
        present = {of: torch.ones(rows, dtype=torch.bool) for of in names}
        if name == "avMNIST" and part != "test":
            present["audio"] = torch.arange(rows) % (2 if part == "train" else 3) > 0
            inputs["audio"] = torch.where(present["audio"].unsqueeze(1), inputs["audio"], torch.nan)
        made[part] = Samples(inputs, present, target)
    return Split(**made, classes=classes, name=name)


def source(seed, names=("strong", "weak"), classes=3):
    return Planted(dict(zip(names, (Source(8, 3, 2), Source(6, 2, 3)), strict=True)), classes=classes, sharpness=6.0, seed=seed)


def use(monkeypatch, load=split):
    monkeypatch.setattr(modalities, "load", load)
    monkeypatch.setattr(modalities, "planted", source)


def tiny(system="early", cure="none", data="planted", **changes):
    """Settings of a run that takes no time on that data."""
    return settings(data, system, cure, **{"epochs": 2, "batch": 32, **changes})


def numbers(found):
    """All but the time."""
    return tuple(value for name, value in vars(found).items() if name not in ("step_us", "evaluation_s"))


def result(
    system="early",
    cure="none",
    seed=0,
    roc=0.8,
    prc=0.4,
    validation=0.7,
    part=2.0,
    contribution=(0.3, 0.01),
    of_validation=None,
    data="Credit",
    diverged=False,
    **changes,
):
    """A run whose ROC at each rate is lower by that rate's tenth than `roc`, .04 in the mean."""
    made = settings(data, system, cure, seed=seed, **changes)
    names = ("status", "weak")
    test = {f"{rate:g}": None if diverged else Scores(roc - rate / 10, prc, 0.9) for rate in RATES}
    contributions = [dict(zip(names, of, strict=True)) for of in (contribution, of_validation or contribution)]
    ranks = {"status": 5.0, "weak": 4.0, "fused": 6.0 + part}
    look = Look(part, part / 2, {"status": 0.9, "weak": 0.1}, ranks, ranks, [[1.0, 0.1], [0.1, 1.0]])
    return Result(
        made,
        2,
        2 * made.epochs if cure == "kd" else made.epochs,
        None if diverged else 2,
        [0.7, 0.6],
        [validation - 0.1, validation],
        [5.0, 6.0 + seed],
        1 if cure == "ebr" else None,
        ["status", "weak"] if cure == "kd" else [],
        test,
        {name: None if diverged else Scores(0.75, 0.3, 0.8) for name in names},
        *contributions,
        None if diverged else look,
        2000.0,
        1.5,
        {"train": 8000, "valid": 2000, "test": 4000},
        1234,
    )
