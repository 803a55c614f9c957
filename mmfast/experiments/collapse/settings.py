"""What one run on representation collapse is: data, system, cure, and how long."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mmfast.experiments.settings import NONE, SettingsError, canonical, check_whole, name_of

SYSTEMS = {
    "late": "Late fusion",
    "early": "Early fusion",
    "cmae": "CM-AE",
    "smil": "SMIL",
    "mt": "MT",
    "grape": "Grape",
    "m3care": "M3Care",
    "shaspec": "ShaSpec",
    "muse": "MUSE",
}
CURES = {NONE: "", "kd": "KD", "ebr": "EBR"}
CURABLE = ("late", "early", "grape", "m3care", "muse")  # a fusion of features, which KD and EBR take
WITH_BLOCK = ("mt", "shaspec", "cmae", "muse")  # and all with EBR
EPOCHS = {"planted": 20, "Credit": 20, "Bank": 20, "avMNIST": 30, "MIMIC-IV": 20, "MIMIC-IV-readmission": 20}
BATCH = {"avMNIST": 64}
SMIL_DATA = ("avMNIST",)  # all modalities but one are always there
NOISY = {"planted": "strong", "Credit": "status"}  # the modality that noise is added to, the one that predicts best
WEIGHT = {NONE: 0.0, "kd": 1.0, "ebr": 1.0}


@dataclass(frozen=True)
class Settings:
    """One run; made by `settings`, which checks them and fills in the rest."""

    data: str
    system: str
    cure: str
    rule: str
    seed: int
    epochs: int  # of the last stage, see `systems.plan`
    batch: int
    noise: float  # standard deviation of what is added to one modality's inputs
    weight: float  # of KD's distance or EBR's reversed gradient
    full: bool  # all rows, see `parts.ROWS`

    @property
    def variant(self) -> str:
        """System, cure and rule, for people."""
        cure = f" + {CURES[self.cure]}" if self.cure != NONE else ""
        return SYSTEMS[self.system] + cure + (f" ({self.rule})" if self.rule != NONE else "")

    @property
    def label(self) -> str:
        """For people."""
        return f"{self.data} {self.variant}{f' noise {self.noise:g}' if self.noise else ''} {self.seed}"

    @property
    def name(self) -> str:
        """Short, unique, and fit for a file."""
        return name_of(self, self.data, self.system, self.cure, self.rule, self.seed)


def settings(
    data: str,
    system: str,
    cure: str = NONE,
    rule: str = NONE,
    seed: int = 0,
    epochs: int | None = None,
    batch: int | None = None,
    noise: float = 0.0,
    weight: float | None = None,
    full: bool = False,
) -> Settings:
    """Checks a run and fills in the data set's number of epochs and rows of a step, and the cure's weight.

    Raises:
        SettingsError: what cannot be run.
    """
    expected: dict[str, tuple[str, Sequence[str]]] = {
        "data": (data, tuple(EPOCHS)),
        "system": (system, tuple(SYSTEMS)),
        "cure": (cure, tuple(CURES)),
    }
    for name, (given, known) in expected.items():
        if given not in known:
            raise SettingsError(f"{name} is {given!r}, expected one of {', '.join(known)}")
    rule = canonical(rule)
    if cure != NONE and system not in CURABLE:
        raise SettingsError(f"cure is {cure!r}, which is for {', '.join(CURABLE)}; system is {system!r}")
    if rule != NONE and cure != "ebr" and system not in WITH_BLOCK:
        raise SettingsError(f"rule is {rule!r}, but {system} has no block; {', '.join(WITH_BLOCK)} have, and all with cure ebr")
    if system == "smil" and data not in SMIL_DATA:
        raise SettingsError(
            f"system is 'smil', which imputes the one modality that may be missing, and data is {data!r}, where any may be; "
            f"expected {', '.join(SMIL_DATA)}"
        )
    found = Settings(
        data,
        system,
        cure,
        rule,
        seed,
        EPOCHS[data] if epochs is None else epochs,
        BATCH.get(data, 128) if batch is None else batch,
        float(noise),
        WEIGHT[cure] if weight is None else float(weight),
        full,
    )
    check_whole(found, seed=0, epochs=1, batch=2)
    for name in ("noise", "weight"):
        if not 0 <= getattr(found, name) < math.inf:
            raise SettingsError(f"{name} is {getattr(found, name):g}, expected a number, 0 at least")
    if noise and data not in NOISY:
        raise SettingsError(f"noise is {noise:g}, which is for {', '.join(NOISY)}; data is {data!r}")
    if cure == NONE and found.weight:
        raise SettingsError(f"weight is {found.weight:g}, which is of a cure; expected 0 without one")
    return found
