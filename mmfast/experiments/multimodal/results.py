"""What a run came to, as a line of the record multimodal.jsonl."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mmfast.data import triplets
from mmfast.experiments import results
from mmfast.experiments.multimodal.settings import MIXTURES, OBJECTIVES, SIZES, Settings
from mmfast.experiments.settings import SettingsError

RECORD = "multimodal.jsonl"


@dataclass
class Scores:
    """Measured on one set of triplets; shares in [0, 1]. A subset is named by its letters, such as "MT"."""

    latent: list[list[float]]  # [i][j]: the classifier that learned from z of subset j, on z of subset i; in the order of `metrics.SUBSETS`
    self_accuracy: float  # mean of the diagonal
    cross_accuracy: float  # and of all others
    coherence: dict[str, dict[str, float]] = field(default_factory=dict)  # [d][A]: modality d generated from subset A shows the right digit
    joint_coherence: float | None = None  # all modalities generated from one z of the prior show the same digit
    log_likelihood: float | None = None  # mean log p(x), in nats


@dataclass
class Result:
    """What one run came to, at the epoch with the least validation nll; None where no epoch had a finite one."""

    settings: Settings
    epochs_done: int  # fewer than asked for where the parameters became NaN
    best_epoch: int | None
    nll: list[float | None]  # of each epoch on the validation triplets, see `metrics.nll`; None where it was not finite
    validation: Scores | None
    test: Scores | None
    judges: dict[str, float]  # test accuracy of the classifiers that judge what is generated
    conflict: list[
        list[float]
    ]  # [step, share of conflicting pairs, largest norm over smallest], see `conflict.Probe`; looks with all numbers finite
    step_us: float  # a training step, median, of the thread's processor time
    evaluation_s: float  # of the thread's processor time: what came after the training
    size: dict[str, Any]  # the numbers of settings.size
    versions: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, values: dict[str, Any]) -> "Result":
        """From what a line holds."""
        made = {name: values[name] and Scores(**values[name]) for name in ("validation", "test")}
        result = cls(**{**values, **made, "settings": Settings(**values["settings"])})
        run = result.settings
        if run.model not in MIXTURES or run.objective not in OBJECTIVES or run.data not in triplets.NAMES:
            raise SettingsError(f"there is no model {run.model!r} with {run.objective!r} on {run.data!r}")
        if result.size != asdict(SIZES[run.size]):
            raise SettingsError(
                f"this run of size {run.size!r} was made with other numbers than that size has now; take another folder for new runs"
            )
        return result

    def line(self) -> str:
        """Its JSON line."""
        return json.dumps(asdict(self), allow_nan=False) + "\n"


def read(folder: Path) -> list[Result]:
    """All runs that a grid has recorded in its folder.

    Raises:
        SettingsError: see `mmfast.experiments.results.read`.
    """
    return results.read(folder / RECORD, Result.of)
