"""What a run came to, as a line of the record collapse.jsonl."""

import json
import math
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mmfast.experiments import results
from mmfast.experiments.collapse import measures
from mmfast.experiments.collapse.measures import Look, Scores
from mmfast.experiments.collapse.settings import CURES, EPOCHS, SYSTEMS, Settings
from mmfast.experiments.settings import SettingsError

RECORD = "collapse.jsonl"


@dataclass
class Result:
    """What one run came to, at the epoch with the best validation score; None where no epoch had a finite one."""

    settings: Settings
    classes: int
    epochs_done: int  # of all stages; fewer than planned where the parameters became NaN
    best_epoch: int | None  # of the last stage, from 1 on
    loss: list[float | None]  # of each epoch of all stages, mean over its steps
    validation: list[float | None]  # score of each epoch of the last stage, with modalities missing as in the test
    ranks: list[float | None]  # effective rank of the fused features on validation rows, likewise
    adversarial: int | None  # epochs with L_md, of EBR
    order: list[str]  # of KD from the best teacher to the student; else empty
    test: dict[str, Scores | None]  # by missing rate
    only: dict[str, Scores | None]  # each modality alone, of the rows that have it
    contribution: dict[str, float | None]  # test score less that without this modality, of the rows that have another, too
    contribution_validation: dict[str, float | None]
    look: Look | None  # at test rows as they are
    step_us: float | None  # a training step of the last stage, median, of the thread's processor time; None where it was not reached
    evaluation_s: float  # of the thread's processor time: what came after the training
    rows: dict[str, int]
    parameters: int
    versions: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, values: dict[str, Any]) -> "Result":
        """From what a line holds."""
        made: dict[str, Any] = {name: {key: of and Scores(**of) for key, of in values[name].items()} for name in ("test", "only")}
        made |= {"settings": Settings(**values["settings"]), "look": values["look"] and Look(**values["look"])}
        result = cls(**{**values, **made})
        run = result.settings
        if run.data not in EPOCHS or run.system not in SYSTEMS or run.cure not in CURES:
            raise SettingsError(f"there is no system {run.system!r} with {run.cure!r} on {run.data!r}")
        return result

    def line(self) -> str:
        """Its JSON line."""
        return json.dumps(asdict(self), allow_nan=False) + "\n"

    def mean(self, what: str) -> float | None:
        """roc, prc or accuracy on test rows, mean over the missing rates; None where one of them has none."""
        found = [math.nan if s is None else float(getattr(s, what)) for s in self.test.values()]
        return measures.number(statistics.mean(found)) if found else None

    @property
    def best_validation(self) -> float | None:
        """The validation score of the best epoch."""
        return None if self.best_epoch is None else self.validation[self.best_epoch - 1]


def read(folder: Path) -> list[Result]:
    """All runs that a grid has recorded in its folder.

    Raises:
        SettingsError: see `mmfast.experiments.results.read`.
    """
    return results.read(folder / RECORD, Result.of)
