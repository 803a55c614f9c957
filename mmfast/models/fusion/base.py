"""The interface of all systems that fuse modalities, any of which may be missing: (inputs, present) to logits."""

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmfast.models.multimodal.inputs import batch_of, check_part
from mmfast.precision import wide

Features = dict[str, Tensor]  # [B, d_i] of each modality, in the model's order; zero where it is absent
Inputs = Mapping[str, Tensor]
Present = Mapping[str, Tensor]

_NO_CLASS = -(2**63)  # torch's own, -100, would count as a row without a loss, in a mean over all


def network(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Linear, ReLU, Linear."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


def mean_of(values: Tensor, where: Tensor) -> Tensor:
    """The mean of the values where a mask of their shape is true; zero where it is nowhere."""
    return torch.where(where, values, torch.zeros_like(values)).sum() / where.sum().clamp(min=1)


def task_loss(logits: Tensor, target: Tensor, rows: Tensor | None = None) -> Tensor:
    """Cross-entropy, averaged over the batch or over some of its rows.

    Args:
        logits: [B, C].
        target: classes, int64 [B]; or floating-point probabilities [B, C] of C labels that are each yes or no; the loss of one that is
            not between 0 and 1 (labels of -1 and 1) is NaN.
        rows: bool [B], the rows that count; None for all. Where there is none the loss is 0.

    Returns:
        A scalar.

    Raises:
        ValueError, IndexError: a target of another shape, or that is no class (-100 neither: leave rows out by `rows`).

    Example:
        >>> task_loss(torch.zeros(3, 4), torch.tensor([0, 1, 2])), task_loss(torch.zeros(3, 1), torch.ones(3, 1))
        (tensor(1.3863), tensor(0.6931))
    """
    shape = logits.shape if target.is_floating_point() else logits.shape[:1]
    if target.shape != shape:
        raise ValueError(
            f"target is {target.dtype} {tuple(target.shape)}, "
            f"expected int64 {tuple(logits.shape[:1])} or floating-point {tuple(logits.shape)}"
        )
    if target.is_floating_point():
        logits = wide(logits)
        target = torch.where((target < 0) | (target > 1), torch.nan, target)
        each = F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(1)
    else:
        each = F.cross_entropy(logits, target, reduction="none", ignore_index=_NO_CLASS)
    return each.mean() if rows is None else mean_of(each, rows)


def random_subset(present: Tensor, size: Tensor) -> Tensor:
    """Of each row's present modalities so many, uniformly at random; noise from torch's global generator.

    Args:
        present: bool [B, m].
        size: int64 [B], how many to keep; all where it is more than there are.

    Returns:
        Bool [B, m].
    """
    keys = torch.rand(present.shape, device=present.device).masked_fill(~present, -1)
    rank = keys.argsort(1, descending=True).argsort(1)
    return (rank < size.unsqueeze(1)) & present


class Fusion(nn.Module):
    """What makes logits of features; the base of the systems that are compared.

    It is called as `fusion(features, present)`: features a dict of [B, d_i] in the model's order, zero where absent; present bool [B, m].
    What an absent row of the features holds must not change the result.
    """

    def loss(self, features: Features, present: Tensor, target: Tensor) -> Tensor:
        """What training minimises: the task's loss, here alone; see `task_loss`."""
        return task_loss(self(features, present), target)


def feature_sizes(encoders: Mapping[str, nn.Module]) -> dict[str, int]:
    """The number of features of each encoder: its `out_features`, or that of the last layer in it that has one.

    Raises:
        TypeError: no layer of an encoder has one.

    Example:
        >>> feature_sizes({"image": nn.Sequential(nn.Linear(4, 3), nn.ReLU()), "text": nn.Linear(2, 5)})
        {'image': 3, 'text': 5}
    """
    found = {}
    for name, encoder in encoders.items():
        sizes = [m.out_features for m in (*encoder.modules(), encoder) if isinstance(getattr(m, "out_features", None), int)]
        if not sizes:
            raise TypeError(
                f"encoders[{name!r}] is a {type(encoder).__name__} without out_features; expected sizes={{{name!r}: ...}} beside it"
            )
        found[name] = cast(int, sizes[-1])
    return found


class FusionModel(nn.Module):
    """Encoders and what fuses their features, with modalities that may be missing for any sample.

    The encoder of a modality sees a present row of the batch in place of an absent one (zeros where there is none): what an absent cell
    holds is never read, and its features are zero. Noise comes from torch's global generator; with its seed every number is repeated.

    Args:
        encoders: m modules by name, each from x [B, *] to features [B, d_i].
        fusion: a `Fusion`, such as `Grape`, or any module called as `fusion(features, present)`; `Concat` for one that takes a tensor.
        sizes: d_i by name; None takes those of `feature_sizes`.

    Raises:
        TypeError, ValueError: an argument is not as described.

    Example:
        >>> encoders = {"image": nn.Linear(9, 4), "sound": nn.Linear(5, 3)}
        >>> model = FusionModel(encoders, Concat(nn.Linear(7, 10)))
        >>> inputs, present = {"image": torch.randn(8, 9), "sound": torch.randn(8, 5)}, {"sound": torch.rand(8) > 0.5}
        >>> model.loss(inputs, torch.randint(10, (8,)), present).backward()
        >>> model(inputs, present).shape, model({"image": inputs["image"]}).shape
        (torch.Size([8, 10]), torch.Size([8, 10]))
    """

    def __init__(self, encoders: Mapping[str, nn.Module], fusion: nn.Module, sizes: Mapping[str, int] | None = None) -> None:
        super().__init__()
        if not isinstance(encoders, (Mapping, nn.ModuleDict)) or not encoders:
            raise TypeError("encoders is not as expected: a dict from names to modules, one at least")
        for name, encoder in encoders.items():
            check_part("encoders", name)
            if not isinstance(encoder, nn.Module):
                raise TypeError(f"encoders[{name!r}] is a {type(encoder).__name__}, expected an nn.Module")
        if not isinstance(fusion, nn.Module):
            raise TypeError(f"fusion is a {type(fusion).__name__}, expected an nn.Module")
        self.names = tuple(encoders)
        self.sizes = feature_sizes(encoders) if sizes is None else dict(sizes)
        if set(self.sizes) != set(self.names) or not all(isinstance(d, int) and d > 0 for d in self.sizes.values()):
            raise ValueError(f"sizes is {self.sizes}, expected the number of features of each of {', '.join(self.names)}")
        self.encoders, self.fusion = nn.ModuleDict(encoders), fusion

    def encode(self, inputs: Inputs, present: Present | None = None) -> tuple[Features, Tensor]:
        """Features of every modality, zero where it is absent or not given, and bool [B, m], where it is present.

        Raises:
            TypeError, ValueError: an argument is not as described in `forward`, or an encoder gives another shape than it should.
        """
        batch = batch_of(inputs, present, self.names)
        given = {name: self.encoders[name](x) for name, x in batch.x.items()}
        for name, f in given.items():
            if f.shape != (batch.rows, self.sizes[name]):
                raise ValueError(f"the encoder of {name!r} gives shape {tuple(f.shape)}, expected {(batch.rows, self.sizes[name])}")
        one = next(iter(given.values()))
        features, columns = {}, []
        for name in self.names:
            f = given.get(name)
            if f is None:
                f, there = one.new_zeros(batch.rows, self.sizes[name]), one.new_zeros(batch.rows, dtype=torch.bool)
            elif batch.present is None:
                there = one.new_ones(batch.rows, dtype=torch.bool)
            else:
                there = batch.present[name]
                f = torch.where(there.unsqueeze(1), f, torch.zeros_like(f))
            features[name] = f
            columns.append(there)
        return features, torch.stack(columns, 1)

    def forward(self, inputs: Inputs, present: Present | None = None) -> Tensor:
        """Logits [B, C].

        Args:
            inputs: x [B, *] of each modality; one that is left out is missing for all.
            present: bool [B] of each modality that is missing for some; what an absent cell holds is never read.

        Raises:
            TypeError, ValueError: an argument is not as described.
        """
        return self.fusion(*self.encode(inputs, present))

    def loss(self, inputs: Inputs, target: Tensor, present: Present | None = None) -> Tensor:
        """What training minimises, averaged over the batch: a scalar.

        Args:
            inputs, present: as for `forward`.
            target: as for `task_loss`.
        """
        return self.fusion_loss(*self.encode(inputs, present), target)

    def fusion_loss(self, features: Features, present: Tensor, target: Tensor) -> Tensor:
        """That of features: the fusion's own, or the task's."""
        if isinstance(self.fusion, Fusion):
            return self.fusion.loss(features, present, target)
        return task_loss(self.fusion(features, present), target)


class Concat(Fusion):
    """Early fusion: a network of the features side by side, zeros where one is missing.

    Args:
        network: from [B, sum of d_i] to logits [B, C].

    Example:
        >>> Concat(nn.Linear(5, 2))({"a": torch.zeros(4, 3), "b": torch.zeros(4, 2)}, torch.ones(4, 2, dtype=torch.bool)).shape
        torch.Size([4, 2])
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, features: Features, present: Tensor) -> Tensor:
        return self.network(torch.cat(list(features.values()), 1))


class Late(Fusion):
    """Late fusion: logits of each modality by itself, averaged over those that are present; zeros where none is.

    Args:
        sizes: d_i by name.
        outputs: number of logits, C.

    Example:
        >>> Late({"a": 3, "b": 2}, 4)({"a": torch.zeros(5, 3), "b": torch.zeros(5, 2)}, torch.ones(5, 2, dtype=torch.bool)).shape
        torch.Size([5, 4])
    """

    def __init__(self, sizes: Mapping[str, int], outputs: int) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({name: nn.Linear(d, outputs) for name, d in sizes.items()})

    def forward(self, features: Features, present: Tensor) -> Tensor:
        each = torch.stack([self.heads[name](f) for name, f in features.items()], 1)  # [B, m, C]
        there = present.unsqueeze(2)
        return torch.where(there, each, torch.zeros_like(each)).sum(1) / there.sum(1).clamp(min=1)
