"""How likely a neuron mixes modalities, and over how many each one of a layer does spread."""

from collections.abc import Sequence
from operator import index

import torch
from torch import Tensor


def collision_bound(dims: Sequence[int]) -> float:
    """Lower bound m (m - 1) (min_i d_i / sum_i d_i)^2 of the probability that two features meeting in a neuron are of different modalities.

    Lemma 1 of Chaudhuri et al., "A closer look at multimodal representation collapse", ICML 2025: with m modalities of like size it is 1 - 1/m.

    Args:
        dims: numbers of features of the m modalities, each at least 1.

    Returns:
        A number in [0, 1), at most `collision_probability(dims)`; equal to it where all modalities have as many features.

    Raises:
        TypeError, ValueError: dims is not as described.

    Example:
        >>> mf.collapse.collision_bound([64, 32])
        0.2222222222222222
    """
    dims = widths(dims, "dims")
    return len(dims) * (len(dims) - 1) * (min(dims) / sum(dims)) ** 2


def collision_probability(dims: Sequence[int]) -> float:
    """Probability sum_{i != j} d_i d_j / (sum_i d_i)^2 that two features, drawn alike and independently, are of different modalities.

    What `collision_bound` bounds, for this draw (Chaudhuri et al., ICML 2025, name no other).

    Args:
        dims: numbers of features of the m modalities, each at least 1.

    Returns:
        A number in [0, 1).

    Raises:
        TypeError, ValueError: dims is not as described.

    Example:
        >>> mf.collapse.collision_probability([64, 32])
        0.4444444444444444
    """
    dims = widths(dims, "dims")
    total = sum(dims)
    return sum(d * (total - d) for d in dims) / total**2


def participation(weight: Tensor, sizes: Sequence[int]) -> Tensor:
    """Over how many modalities the weights of each neuron spread: (sum_m e_m)^2 / sum_m e_m^2, e_m the energy (sum of squares) of its weights on modality m.

    1 for a neuron that reads one modality, m for one that reads all alike: its degree of polysemanticity across modalities (gamma in Theorem 2 of
    Chaudhuri et al., ICML 2025, who do not say how to measure it). `sizes=[1] * in` counts features in place of modalities.

    Args:
        weight: [out, in], or of a convolution [out, in, ...]; any floating-point dtype, not changed.
        sizes: widths of the m blocks of columns, in their order, which add up to `in`.

    Returns:
        float64 [out] in [1, m] on the device of weight, with no gradient; NaN for a neuron whose weights are all zero or not all finite.

    Raises:
        TypeError, ValueError: an argument is not as described.

    Example:
        >>> mf.collapse.participation(torch.tensor([[3.0, 4.0, 0.0], [3.0, 4.0, 5.0]]), [2, 1])
        tensor([1., 2.], dtype=torch.float64)
    """
    shares = energy_shares(weight, sizes)
    return 1 / shares.square().sum(1)


def energy_shares(weight: Tensor, sizes: Sequence[int]) -> Tensor:
    """The share of each modality's block of columns in the energy of each row, float64 [out, m]; NaN as in `participation`."""
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise TypeError(
            f"weight is {weight.dtype if isinstance(weight, Tensor) else f'a {type(weight).__name__}'}, expected a floating-point tensor"
        )
    if weight.dim() < 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, expected [out, in]")
    blocks = widths(sizes, "sizes")
    if sum(blocks) != weight.shape[1]:
        raise ValueError(f"sizes add up to {sum(blocks)}, expected {weight.shape[1]}, the columns of weight {tuple(weight.shape)}")
    w = weight.detach().double().reshape(*weight.shape[:2], -1)
    largest = w.abs().amax((1, 2), keepdim=True)
    energy = torch.stack([part.square().sum((1, 2)) for part in (w / largest).split(blocks, 1)], 1)  # scaled: none over- or underflows
    return energy / energy.sum(1, keepdim=True)


def widths(sizes: Sequence[int], name: str) -> list[int]:
    """A list of positive whole numbers; raises where it is none."""
    try:
        found = [index(size) for size in sizes]
    except TypeError:
        raise TypeError(f"{name} is {sizes!r}, expected whole numbers, one per modality") from None
    if not found or min(found) < 1:
        raise ValueError(f"{name} is {found}, expected one positive number per modality")
    return found
