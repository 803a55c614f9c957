"""MNIST-SVHN-Text: triplets of a grey digit, a coloured one and its word, paired by label (Shi et al., 2019; Sutter et al., 2020)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mmfast.data import digits, words
from mmfast.data.files import find
from mmfast.data.table import DataError

REAL, STAND_IN = "MNIST-SVHN-Text", "MNIST-SVHN*-Text"
NAMES = (REAL, STAND_IN)
MODALITIES = ("mnist", "svhn", "text")


@dataclass
class Triplets:
    """Pairs of images of one digit, by their places; the text goes with the MNIST image."""

    mnist: Tensor  # uint8 [n, 28, 28]
    svhn: Tensor  # uint8 [m, 3, 32, 32]
    text: Tensor  # uint8 [n, 8], places in the alphabet
    first: Tensor  # int64 [pairs], into mnist and text
    second: Tensor  # int64 [pairs], into svhn
    labels: Tensor  # int64 [pairs]

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, index: Tensor | slice) -> dict[str, Tensor]:
        """Some triplets as a model takes them: float32 [b, 1, 28, 28] and [b, 3, 32, 32] in [0, 1], one-hot [b, 8, 71]."""
        first, second = self.first[index], self.second[index]
        return {
            "mnist": self.mnist[first].unsqueeze(1) / 255,
            "svhn": self.svhn[second] / 255,
            "text": words.one_hot(self.text[first]),
        }

    def part(self, index: Tensor) -> "Triplets":
        """Those triplets alone; the images are shared."""
        return Triplets(self.mnist, self.svhn, self.text, self.first[index], self.second[index], self.labels[index])


def pair(first: Tensor, second: Tensor, most: int, repeats: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pairs items of one label at random: of each label the first n of either kind, n = min(how many there are, most), in `repeats` random orders.

    Args:
        first, second: labels int64 [n] and [m].
        most: of a label.
        repeats: how often each item is paired.
        generator: of the orders.

    Returns:
        Places in `first` and in `second`, int64 [pairs] each.

    Example:
        >>> a, b = torch.tensor([1, 0, 1, 1]), torch.tensor([0, 0, 1, 1])
        >>> i, j = pair(a, b, most=2, repeats=3, generator=torch.Generator())
        >>> len(i), torch.equal(a[i], b[j]), sorted(set(i.tolist())), sorted(set(j.tolist()))
        (9, True, [0, 1, 2], [0, 2, 3])
    """
    left, right = [], []
    for label in first.unique():
        i, j = ((labels == label).nonzero().squeeze(1) for labels in (first, second))
        n = min(len(i), len(j), most)
        for _ in range(repeats):
            left.append(i[torch.randperm(n, generator=generator)])
            right.append(j[torch.randperm(n, generator=generator)])
    return torch.cat(left), torch.cat(right)


def here() -> str:
    """The name of the set to take where none was asked for: the real one if SVHN's files are in a data folder, else that with the stand-in."""
    return REAL if all(find(digits.svhn_file(part)) for part in digits.PARTS) else STAND_IN


def load(name: str, part: str, seed: int, most: int = 10_000, repeats: int = 20) -> Triplets:
    """The training or the test triplets.

    Args:
        name: "MNIST-SVHN-Text", or "MNIST-SVHN*-Text", where each second image of MNIST is made into one in the manner of SVHN, see `digits.svhn_star`,
            and the others are MNIST.
        part: "train" or "test".
        seed: of the pairs and of the places of the words; SVHN* is always the same.
        most, repeats: see `pair`; the paper's numbers by default (1,121,360 training and 200,000 test triplets of the real set).

    Returns:
        `Triplets` on the CPU.

    Raises:
        DataError: an unknown name, or a file that cannot be had or has another checksum.
    """
    if name not in NAMES:
        raise DataError(f"there is no set of triplets {name!r}; expected one of {', '.join(NAMES)}")
    images, labels = digits.mnist(part)
    generator = torch.Generator().manual_seed(seed)
    if name == REAL:
        others, other_labels = digits.svhn(part)
        first, second = pair(labels, other_labels, most, repeats, generator)
    else:
        sources, source_labels = images[1::2], labels[1::2]
        images, labels = images[::2], labels[::2]
        first, second = pair(labels, source_labels, most, repeats, generator)
        used, second = second.unique(return_inverse=True)  # only those that are shown are made
        others = digits.svhn_star(sources, used, digits.PARTS.index(part))
    return Triplets(images, others, words.words(labels, seed), first, second, labels[first])


def split(triplets: Triplets, seed: int, share: float = 0.9) -> tuple[Triplets, Triplets]:
    """Training and validation triplets, at random by the seed."""
    order = torch.randperm(len(triplets), generator=torch.Generator().manual_seed(seed))
    train = int(share * len(triplets))
    if not 0 < train < len(triplets):
        raise DataError(f"{len(triplets)} triplets are too few for a training and a validation part")
    return triplets.part(order[:train]), triplets.part(order[train:])
