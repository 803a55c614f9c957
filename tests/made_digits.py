"""Made-up MNIST: enough like digits to be told apart, and nothing to be downloaded."""

import torch

from mmfast.data import digits


def make(part):
    """240 training or 80 test images [n, 28, 28] with their labels: a bar at a place of each digit's own, under noise."""
    generator = torch.Generator().manual_seed(digits.PARTS.index(part))
    n = 240 if part == "train" else 80
    labels = torch.arange(n) // 2 % 10  # as many of each digit in every second place as in the others
    images = torch.randint(0, 60, (n, 28, 28), generator=generator)
    for image, label in zip(images, labels, strict=True):
        image[4:24, 3 + 2 * label : 6 + 2 * label] = 220
    return images.to(torch.uint8), labels


def use(monkeypatch):
    """Takes them for MNIST."""
    monkeypatch.setattr(digits, "mnist", make)
