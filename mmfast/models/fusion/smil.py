"""SMIL: Bayesian meta-learning for a modality that most samples lack."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from mmfast.models.fusion.base import Features, Fusion, FusionModel, Inputs, Present, mean_of, task_loss

STEPS = 1000  # after so many the inner learning rate falls to a tenth


class _Network(Fusion):
    """Imputes one modality, disturbs what it knows, and classifies."""

    centres: Tensor  # [prototypes, features of the missing modality]

    def __init__(self, sizes: Mapping[str, int], missing: str, outputs: int, hidden: int, prototypes: int, dropout: float) -> None:
        super().__init__()
        known = sum(d for name, d in sizes.items() if name != missing)
        joint = known + sizes[missing]
        self.missing, self.column = missing, list(sizes).index(missing)
        self.impute = nn.Linear(known, prototypes)
        self.disturb_joint, self.disturb_hidden = nn.Linear(known, joint), nn.Linear(joint, hidden)
        self.fuse, self.dropout, self.classify = nn.Linear(joint, hidden), nn.Dropout(dropout), nn.Linear(hidden, outputs)
        self.register_buffer("centres", torch.zeros(prototypes, sizes[missing]))
        self.meta = False  # whether there are centres, and the second stage has begun

    def forward(self, features: Features, present: Tensor) -> Tensor:
        return self.run(features, ~present[:, self.column])[0]

    def run(self, features: Features, hide: Tensor, noise: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, joint features [B, joint] and hidden ones [B, hidden], before they are disturbed; imputes the rows of `hide`."""
        known = torch.cat([f for name, f in features.items() if name != self.missing], 1)
        own = features[self.missing]
        made = self.imputed(known) if self.meta else torch.zeros_like(own)
        joint = torch.cat([known, torch.where(hide.unsqueeze(1), made, own)], 1)
        if not self.meta:
            h = self.fuse(joint).relu()
            return self.classify(self.dropout(h)), joint, h
        disturbed = joint + self._disturbance(self.disturb_joint(known), noise)
        h = self.fuse(disturbed).relu()
        return self.classify(self.dropout(h + self._disturbance(self.disturb_hidden(joint), noise))), joint, h

    def imputed(self, known: Tensor) -> Tensor:
        """A mean of the centres whose weights come from the other modalities."""
        weights = F.softplus(self.impute(known))
        return weights / weights.sum(1, keepdim=True) @ self.centres

    def _disturbance(self, mean: Tensor, noise: bool) -> Tensor:
        return F.softplus(mean + torch.randn_like(mean) if noise else mean)


class _Outer(nn.Module):
    """The outer loss as a module, so that it can be called with other parameters."""

    def __init__(self, model: "SMIL") -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any) -> Tensor:
        return self.model.outer_loss(*args)


class SMIL(FusionModel):
    """Meta-learning with one modality that many samples lack: imputed from prototypes, learned disturbances, a step within a step.

    First stage: plain fusion, zeros in place of the missing modality. `fit_centres` then finds prototypes of its features and begins the
    second. There the missing features are a mean of the prototypes, its weights a softplus of a linear map of the other modalities'
    features, scaled to a sum of one; to the joint features softplus(linear map of the others') is added, to the hidden layer
    softplus(linear map of the joint ones). The inner step is one of gradient descent on the task's loss of the samples that lack the
    modality (of all where none does), with N(0, 1) added within the softplus; it moves the other modalities' encoders, the fusion layer and
    the classifier. From there, without noise, the outer loss is the task's of the samples that have the modality, plus `match` times the
    mean square by which their joint features change when the modality is imputed, and the same of the hidden layer. The loss is the sum of
    inner and outer one, and its gradient passes through the inner step (second order, so an impartiality block cannot be in the fusion).

    Ma et al., "SMIL: multimodal learning with severely missing modality", AAAI 2021. The release trains in eval mode after its first
    evaluation and selects on test data: not so here. Noise comes from torch's global generator.

    Args:
        encoders, sizes: as for `FusionModel`, two modalities at least.
        missing: the name of the modality that may be missing; the others are zeros where they are, without imputation.
        outputs: number of logits, C.
        hidden: width of the fusion layer.
        prototypes: number of centres, 10 for ten digits.
        dropout: before the classifier.
        inner_rate: learning rate of the inner step; a tenth after each 1,000 steps.
        match: weight of the two mean squares.

    Raises:
        TypeError, ValueError: an argument is not as described.

    Example:
        >>> model = SMIL({"image": nn.Linear(9, 4), "sound": nn.Linear(5, 3)}, "sound", 10, prototypes=4)
        >>> inputs, present = {"image": torch.randn(8, 9), "sound": torch.randn(8, 5)}, {"sound": torch.arange(8) > 2}
        >>> model.loss(inputs, torch.randint(10, (8,)), present).backward()
        >>> model.fit_centres([(inputs, present)]).shape  # doctest: +SKIP
        torch.Size([4, 3])
    """

    fusion: _Network

    def __init__(
        self,
        encoders: Mapping[str, nn.Module],
        missing: str,
        outputs: int,
        hidden: int = 64,
        prototypes: int = 10,
        dropout: float = 0.5,
        inner_rate: float = 1e-3,
        match: float = 0.01,
        *,
        sizes: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__(encoders, nn.Identity(), sizes)
        if missing not in self.names or len(self.names) < 2:
            raise ValueError(f"missing is {missing!r}, expected one of {', '.join(self.names)}, with another beside it")
        self.fusion = _Network(self.sizes, missing, outputs, hidden, prototypes, dropout)
        self.missing, self.inner_rate, self.match, self.steps = missing, inner_rate, match, 0

    @torch.no_grad()
    def fit_centres(self, batches: Iterable[tuple[Inputs, Present | None]], seed: int = 0) -> Tensor:
        """Begins the second stage: the prototypes are the k-means centres (scikit-learn) of the missing modality's features.

        Args:
            batches: of training data, (inputs, present) each; networks are put into eval mode for them.
            seed: of k-means.

        Raises:
            ModuleNotFoundError: scikit-learn is not installed.
            ValueError: fewer samples have the modality than there are prototypes.
        """
        from sklearn.cluster import KMeans  # takes a second to load

        was_training = self.training
        self.eval()
        found = []
        for inputs, present in batches:
            features, there = self.encode(inputs, present)
            found.append(features[self.missing][there[:, self.fusion.column]])
        self.train(was_training)
        points, k = torch.cat(found), len(self.fusion.centres)
        if len(points) < k:
            raise ValueError(f"batches has {len(points)} samples with {self.missing!r}, expected {k} at least, the number of prototypes")
        centres = KMeans(k, n_init=10, random_state=seed).fit(points.double().cpu().numpy()).cluster_centers_
        self.fusion.centres.copy_(torch.as_tensor(centres))
        self.fusion.meta = True
        return self.fusion.centres.clone()

    def loss(self, inputs: Inputs, target: Tensor, present: Present | None = None) -> Tensor:
        if not self.fusion.meta or not torch.is_grad_enabled():
            return super().loss(inputs, target, present)
        inner = self.inner_loss(inputs, target, present)
        moved = ("fusion.fuse.", "fusion.classify.", *(f"encoders.{name}." for name in self.names if name != self.missing))
        own = {name: p for name, p in self.named_parameters() if name.startswith(moved) and p.requires_grad}
        slopes = torch.autograd.grad(inner, list(own.values()), create_graph=True, allow_unused=True)
        rate = self.inner_rate * 0.1 ** (self.steps // STEPS)
        fast = {f"model.{name}": p - rate * g for (name, p), g in zip(own.items(), slopes, strict=True) if g is not None}
        if self.training:
            self.steps += 1
        return inner + functional_call(_Outer(self), fast, (inputs, target, present))

    def inner_loss(self, inputs: Inputs, target: Tensor, present: Present | None = None) -> Tensor:
        """The task's loss of the samples that lack the modality, or of all where none does, with noise."""
        features, there = self.encode(inputs, present)
        lacks = ~there[:, self.fusion.column]
        everywhere = torch.ones_like(lacks)
        return task_loss(self.fusion.run(features, everywhere, noise=True)[0], target, torch.where(lacks.any(), lacks, everywhere))

    def outer_loss(self, inputs: Inputs, target: Tensor, present: Present | None = None) -> Tensor:
        """That of the samples that have the modality: the task's, and how their features change when it is imputed."""
        features, there = self.encode(inputs, present)
        has = there[:, self.fusion.column]
        logits, joint, hidden = self.fusion.run(features, ~has)
        _, joint_made, hidden_made = self.fusion.run(features, torch.ones_like(has))
        changes = (joint - joint_made).square().mean(1) + (hidden - hidden_made).square().mean(1)
        return task_loss(logits, target, has) + self.match * mean_of(changes, has)

    def get_extra_state(self) -> dict[str, Any]:
        return {"meta": self.fusion.meta, "steps": self.steps}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.fusion.meta, self.steps = state["meta"], state["steps"]

    def extra_repr(self) -> str:
        return f"missing={self.missing!r}, inner_rate={self.inner_rate:g}, match={self.match:g}"
