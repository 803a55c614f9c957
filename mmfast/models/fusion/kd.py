"""Cross-modal distillation (KD): the implicit form of basis reallocation."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmfast.models.fusion.base import FusionModel, Inputs, Present, mean_of, task_loss

DISTANCES = ("mse", "cosine")


class KD(FusionModel):
    """Distillation of the modalities that survive into the one that would be eliminated, then fusion.

    In stages, each of which has its own loss; `next_stage` goes on:

    - "unimodal": each encoder with a linear classifier, the sum of their task losses, each over the samples that have the modality.
    - the name of a teacher, one stage for each, from the best to the worst: the student's own task loss plus `weight` times the distance of
      its features to the teacher's, over the samples that have both; the gradient stops at the teacher. Where they have other sizes, a
      linear map stands between.
    - "fusion": the fusion's own loss, of encoders that go on learning.

    The student is the modality with the worst validation score of its own, the last of the order. `forward` gives the fusion's logits in
    all stages.

    Chaudhuri et al., "A closer look at multimodal representation collapse", ICML 2025, who leave the procedure open: the stages, the
    distance and that teachers follow one another in the order of their scores are ours. Deterministic.

    Args:
        encoders, fusion, sizes: as for `FusionModel`.
        outputs: number of logits, C.
        weight: of the distance.
        distance: "mse", the mean square of the difference; or "cosine", one minus the cosine.

    Raises:
        TypeError, ValueError: an argument is not as described.

    Example:
        >>> from mmfast.models.fusion import Concat
        >>> model = KD({"image": nn.Linear(9, 4), "sound": nn.Linear(5, 3)}, Concat(nn.Linear(7, 10)), 10)
        >>> inputs, target = {"image": torch.randn(8, 9), "sound": torch.randn(8, 5)}, torch.randint(10, (8,))
        >>> model.stage, model.loss(inputs, target).shape
        ('unimodal', torch.Size([]))
        >>> model.next_stage({"image": 0.6, "sound": 0.9}), model.student
        ('sound', 'image')
        >>> model.next_stage()
        'fusion'
    """

    def __init__(
        self,
        encoders: Mapping[str, nn.Module],
        fusion: nn.Module,
        outputs: int,
        weight: float = 1.0,
        distance: str = "mse",
        *,
        sizes: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__(encoders, fusion, sizes)
        if distance not in DISTANCES:
            raise ValueError(f"distance is {distance!r}, expected one of {', '.join(DISTANCES)}")
        if not isinstance(weight, (int, float)) or not 0 <= weight < math.inf:
            raise ValueError(f"weight is {weight!r}, expected a number, 0 at least")
        if len(self.names) < 2:
            raise ValueError(f"encoders has {', '.join(self.names)}, expected two modalities at least: a teacher and a student")
        self.weight, self.distance = float(weight), distance
        self.classifiers = nn.ModuleDict({name: nn.Linear(d, outputs) for name, d in self.sizes.items()})
        self.maps = nn.ModuleDict(  # from any student to any teacher: who is who shows after the first stage
            {
                s: nn.ModuleDict({t: nn.Identity() if d == e else nn.Linear(d, e) for t, e in self.sizes.items() if t != s})
                for s, d in self.sizes.items()
            }
        )
        self._order, self._stage = list(self.names), 0

    @property
    def order(self) -> tuple[str, ...]:
        """The modalities from the best teacher to the student."""
        return tuple(self._order)

    @property
    def student(self) -> str:
        return self._order[-1]

    @property
    def stages(self) -> tuple[str, ...]:
        return ("unimodal", *self._order[:-1], "fusion")

    @property
    def stage(self) -> str:
        return self.stages[self._stage]

    def next_stage(self, scores: Mapping[str, float] | Sequence[str] | None = None) -> str:
        """Goes on to the next stage and says which it is.

        Args:
            scores: after "unimodal", the validation score of each modality (more is better; see `unimodal`), or their names from the best
                teacher to the student; None after the other stages.

        Raises:
            ValueError: scores of other modalities, missing or too late, or one that is NaN, or there is no further stage.
        """
        if (self._stage == 0) != (scores is not None):
            raise ValueError(f"scores is {scores!r} at the end of stage {self.stage!r}, expected them after 'unimodal' and there alone")
        if scores is not None:
            if sorted(scores) != sorted(self.names):
                raise ValueError(f"scores has {', '.join(scores) or 'nothing'}, expected each of {', '.join(self.names)}")
            if isinstance(scores, Mapping) and any(math.isnan(score) for score in scores.values()):
                raise ValueError(f"scores is {dict(scores)}, expected numbers: nan has no place in an order")
            self._order = sorted(scores, key=lambda name: -scores[name]) if isinstance(scores, Mapping) else list(scores)
        if self.stage == "fusion":
            raise ValueError("the stage is 'fusion', the last one")
        self._stage += 1
        return self.stage

    def unimodal(self, inputs: Inputs, present: Present | None = None) -> dict[str, Tensor]:
        """Logits [B, C] of each modality by itself, of no meaning where it is absent; for the scores."""
        features, _ = self.encode(inputs, present)
        return {name: self.classifiers[name](f) for name, f in features.items()}

    def loss(self, inputs: Inputs, target: Tensor, present: Present | None = None) -> Tensor:
        if self.stage == "fusion":
            return super().loss(inputs, target, present)
        student, teacher = self.student, self.stage
        features, there = self.encode(inputs, present)
        column = {name: there[:, i] for i, name in enumerate(self.names)}
        if teacher == "unimodal":
            return torch.stack([task_loss(self.classifiers[n](f), target, column[n]) for n, f in features.items()]).sum()
        mapped = cast(nn.ModuleDict, self.maps[student])[teacher](features[student])
        goal = features[teacher].detach()
        if self.distance == "mse":
            apart = (mapped - goal).square().mean(1)
        else:
            apart = 1 - F.cosine_similarity(mapped, goal, dim=1)
        task = task_loss(self.classifiers[student](features[student]), target, column[student])
        return task + self.weight * mean_of(apart, column[student] & column[teacher])

    def get_extra_state(self) -> dict[str, Any]:
        return {"order": list(self._order), "stage": self._stage}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self._order, self._stage = list(state["order"]), int(state["stage"])

    def extra_repr(self) -> str:
        return f"weight={self.weight:g}, distance={self.distance!r}, stage={self.stage!r}"
