"""Digits as text: the word of each, somewhere in eight characters."""

import torch
from torch import Tensor

LENGTH = 8
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# the published alphabet of 71 has the hyphen twice: its second place is never used
ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789-,;.!?:'\"/\\|_@#$%^&*~`+-=<>()[]{} \n"


def words(labels: Tensor, seed: int) -> Tensor:
    """The words of digits, each at a place of its own among blanks, as in MNIST-SVHN-Text (Sutter et al., 2020).

    A word of n letters starts at the whole part of u * (7 - n), u uniform: the last character is always blank.

    Args:
        labels: int64 [n], 0 to 9.
        seed: of the places.

    Returns:
        uint8 [n, 8], places in ALPHABET.

    Example:
        >>> [read(line) for line in words(torch.tensor([3, 7]), seed=0)]
        [' three  ', ' seven  ']
    """
    lengths = torch.tensor([len(word) for word in WORDS])[labels]
    u = torch.rand(len(labels), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    starts = (u * (LENGTH - 1 - lengths)).long()
    lines = [f"{' ' * start}{WORDS[label]}".ljust(LENGTH) for label, start in zip(labels.tolist(), starts.tolist(), strict=True)]
    codes = torch.zeros(128, dtype=torch.uint8)
    codes[list(ALPHABET.encode())] = torch.arange(len(ALPHABET), dtype=torch.uint8)
    return codes[torch.frombuffer(bytearray("".join(lines).encode()), dtype=torch.uint8).long()].view(-1, LENGTH)


def one_hot(codes: Tensor) -> Tensor:
    """float32 [..., 8, 71] of uint8 [..., 8]."""
    return torch.nn.functional.one_hot(codes.long(), len(ALPHABET)).float()


def read(codes: Tensor) -> str:
    """The text of one line [8] of codes."""
    return "".join(ALPHABET[code] for code in codes.tolist())
