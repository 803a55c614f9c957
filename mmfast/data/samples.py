"""Rows of several modalities, any of which may be missing, and their split into training, validation and test rows."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Samples:
    """Rows of several modalities, as the models of `mmfast.models.fusion` take them, on the CPU.

    Attributes:
        inputs: float32 [n, *] of each modality, by name; zero where it is absent.
        present: bool [n] of each modality.
        target: classes, int64 [n].

    Raises:
        ValueError: modalities or numbers of rows that do not agree, or a mask that is not bool.

    Example:
        >>> present = {"image": torch.tensor([True, True, True]), "sound": torch.tensor([True, False, True])}
        >>> rows = Samples({"image": torch.zeros(3, 1, 28, 28), "sound": torch.zeros(3, 5)}, present, torch.tensor([7, 0, 4]))
        >>> len(rows), rows.part(torch.tensor([2, 1])).target, rows.part(torch.tensor([2, 1])).present["sound"]
        (3, tensor([4, 0]), tensor([ True, False]))
    """

    inputs: dict[str, Tensor]
    present: dict[str, Tensor]
    target: Tensor

    def __post_init__(self) -> None:
        if set(self.inputs) != set(self.present):
            raise ValueError(f"present has the modalities {', '.join(self.present)}, expected {', '.join(self.inputs)}, those of inputs")
        for kind, given in (("inputs", self.inputs), ("present", self.present)):
            for name, x in given.items():
                if len(x) != len(self.target):
                    raise ValueError(f"{kind}[{name!r}] has {len(x)} rows, expected {len(self.target)}, as target")
        for name, there in self.present.items():
            if there.dtype != torch.bool:
                raise ValueError(f"present[{name!r}] is {there.dtype}, expected bool")

    def __len__(self) -> int:
        return len(self.target)

    def part(self, index: Tensor) -> "Samples":
        """Some of the rows, copied.

        Args:
            index: their places, int64 [k]; or bool [n].
        """
        return Samples(
            {name: x[index] for name, x in self.inputs.items()},
            {name: x[index] for name, x in self.present.items()},
            self.target[index],
        )


@dataclass
class Split:
    """A data set of several modalities, ready to train on."""

    train: Samples
    valid: Samples
    test: Samples
    classes: int
    name: str


def stratified(groups: Tensor, cuts: Sequence[float], seed: int) -> list[Tensor]:
    """Places of rows, at random by the seed, in parts that hold the same share of each group, up to rounding.

    Args:
        groups: int64 [n], what is to be spread evenly, such as the label.
        cuts: increasing shares of the rows, in [0, 1], where one part ends and the next begins.
        seed: the same one gives the same parts; the caller's random stream is left alone.

    Returns:
        `len(cuts) + 1` tensors int64, each in random order; every row is in one of them.

    Raises:
        ValueError: cuts that do not increase, or are outside of [0, 1].

    Example:
        >>> parts = stratified(torch.tensor([0] * 30 + [1] * 10), (0.7, 0.8), seed=0)
        >>> [(int((part < 30).sum()), int((part >= 30).sum())) for part in parts]
        [(21, 7), (3, 1), (6, 2)]
    """
    if not all(a <= b for a, b in zip((0.0, *cuts), (*cuts, 1.0), strict=True)):
        raise ValueError(f"cuts is {tuple(cuts)}, expected increasing shares in [0, 1]")
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed))
    shuffled = groups[order]
    part = torch.empty_like(order)
    for group in groups.unique():
        places = (shuffled == group).nonzero().squeeze(1)
        ends = torch.tensor([round(cut * len(places)) for cut in cuts], dtype=torch.int64)
        part[places] = torch.bucketize(torch.arange(len(places)), ends, right=True)
    return [order[part == i] for i in range(len(cuts) + 1)]


def standardised(x: Tensor, train: Tensor) -> Tensor:
    """Columns less their mean, over their standard deviation, of the training rows alone.

    Args:
        x: [n, d].
        train: places of the training rows, int64.

    Returns:
        float32 [n, d]; a column that is constant in training is only centred.

    Example:
        >>> standardised(torch.tensor([[1.0, 5.0], [3.0, 5.0], [9.0, 6.0]]), torch.tensor([0, 1]))
        tensor([[-0.7071,  0.0000],
                [ 0.7071,  0.0000],
                [ 4.9497,  1.0000]])
    """
    seen = x[train].double()
    deviation = seen.std(0, correction=min(1, len(seen) - 1))
    deviation = torch.where(seen.amin(0) < seen.amax(0), deviation, 1.0)  # of equal numbers it is rounding, 1e-17 or so
    return ((x.double() - seen.mean(0)) / deviation).float()
