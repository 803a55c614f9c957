"""How alike the modalities' representations of the same samples are."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def similarity(
    features: Mapping[str, Tensor] | Sequence[Tensor], present: Mapping[str, Tensor] | Sequence[Tensor] | None = None, measure: str = "cka"
) -> Tensor:
    """Similarity of each two modalities' representations of the same samples.

    "cka" is linear centred kernel alignment (Kornblith et al., "Similarity of neural network representations revisited", ICML 2019) in the unbiased
    form of Song et al. (JMLR 2012): about 0 for representations that have nothing to do with each other, however few samples there are, 1 where one
    is a rotated and scaled copy of the other; their widths may differ. "cosine" is the mean cosine of the two representations of a sample, for
    modalities in one shared space: what explicit basis reallocation ranks substitutes by (Chaudhuri et al., ICML 2025). The paper does not say which
    it plots.

    Args:
        features: m tensors [N, d_i], by name or in a list, any floating-point dtype; for "cosine" all of one width.
        present: where modalities are missing, m bool tensors [N], likewise; names that are left out are there throughout. A pair is compared on the
            samples that have both; what stands in the others is never read.
        measure: "cka" or "cosine".

    Returns:
        float64 [m, m], symmetric, on the device of the features, with no gradient. NaN for a pair with fewer than four samples ("cosine": none) or,
        "cka", where a representation is the same for all, or for all but one. A representation that is zero has cosine 0 with any.

    Raises:
        TypeError, ValueError: an argument is not as described.

    Example:
        >>> x = torch.randn(500, 8)
        >>> found = mf.collapse.similarity({"image": x, "text": 3 * x.flip(1), "noise": torch.randn(500, 2)})
        >>> found[0, 1] > 0.999, found[0, 2].abs() < 0.1
        (tensor(True), tensor(True))
    """
    if measure not in ("cka", "cosine"):
        raise ValueError(f"measure is {measure!r}, expected 'cka' or 'cosine'")
    named = _named(features, "features")
    _check(named, measure)
    there = _present(present, named)
    xs = [x.detach().double() for x in named.values()]
    out = xs[0].new_empty(len(xs), len(xs))
    for i, (x, seen) in enumerate(zip(xs, there, strict=True)):
        for j in range(i + 1):
            both = seen & there[j]
            out[i, j] = out[j, i] = _cosine(x, xs[j], both) if measure == "cosine" else _cka(x, xs[j], both)
    return out


def _cosine(x: Tensor, y: Tensor, both: Tensor) -> Tensor:
    lengths = x.norm(dim=1) * y.norm(dim=1)
    cosines = (x * y).sum(1) / torch.where(lengths == 0, 1.0, lengths)
    return torch.where(both, cosines, 0.0).sum() / both.sum()


def _cka(x: Tensor, y: Tensor, both: Tensor) -> Tensor:
    n = both.sum().double()
    x, y = _centred(x, both, n), _centred(y, both, n)
    return torch.where(n > 3, _hsic(x, y, n) / (_own(x, n) * _own(y, n)).sqrt(), torch.nan)


def _own(x: Tensor, n: Tensor) -> Tensor:
    """`_hsic` of a representation with itself, which is not negative; NaN where only rounding is left of it."""
    found = _hsic(x, x, n)
    return torch.where(found > 1e-12 * (x.mT @ x).square().sum(), found, torch.nan)


def _centred(x: Tensor, rows: Tensor, n: Tensor) -> Tensor:
    """Less its mean, which the estimate does not see, but its rounding would; zeros for rows that do not count, and all of them where only rounding is left."""
    x = torch.where(rows.unsqueeze(-1), x, 0.0)
    centred = torch.where(rows.unsqueeze(-1), x - x.sum(0) / n, 0.0)
    return torch.where(centred.square().sum() > 1e-24 * x.square().sum(), centred, 0.0)


def _hsic(x: Tensor, y: Tensor, n: Tensor) -> Tensor:
    """Unbiased estimate of the Hilbert-Schmidt independence criterion with linear kernels, up to the factor n (n - 3); rows of zeros are no samples.

    With K = X X' and L = Y Y' without their diagonals: tr K L + (1'K 1)(1'L 1) / (n - 1)(n - 2) - 2 (1'K L 1) / (n - 2), none of which needs an n x n
    matrix.
    """
    a, b = x.square().sum(1), y.square().sum(1)
    trace = (x.mT @ y).square().sum() - (a * b).sum()
    r, s = x @ x.sum(0) - a, y @ y.sum(0) - b  # K 1, L 1
    return trace + r.sum() * s.sum() / ((n - 1) * (n - 2)) - 2 * (r * s).sum() / (n - 2)


def _named(tensors: Any, name: str) -> dict[str, Any]:
    if isinstance(tensors, Mapping):
        return dict(tensors)
    if isinstance(tensors, Tensor) or not isinstance(tensors, Sequence):
        raise TypeError(f"{name} is a {type(tensors).__name__}, expected a list or dict of tensors, one per modality")
    return {str(i): x for i, x in enumerate(tensors)}


def _check(features: dict[str, Any], measure: str) -> None:
    if not features:
        raise ValueError("features is empty, expected one tensor per modality")
    first = next(iter(features.values()))
    for name, x in features.items():
        if not isinstance(x, Tensor) or not x.is_floating_point():
            what = x.dtype if isinstance(x, Tensor) else f"a {type(x).__name__}"
            raise TypeError(f"features[{name}] is {what}, expected a floating-point tensor")
        if x.dim() != 2 or len(x) != len(first):
            raise ValueError(f"features[{name}] has shape {tuple(x.shape)}, expected [{len(first) if first.dim() == 2 else 'N'}, d]")
        if measure == "cosine" and x.shape != first.shape:
            raise ValueError(f"features[{name}] has shape {tuple(x.shape)}, expected {tuple(first.shape)}; measure='cka' takes any widths")


def _present(present: Any, features: dict[str, Tensor]) -> list[Tensor]:
    """Which samples have each modality, m of bool [N]."""
    given = {} if present is None else _named(present, "present")
    for name, t in given.items():
        if name not in features:
            raise ValueError(f"present has an entry {name!r}, expected those of features: {', '.join(map(repr, features))}")
        n = len(features[name])
        if not isinstance(t, Tensor) or t.dtype != torch.bool or t.shape != (n,):
            what = f"{t.dtype} of shape {tuple(t.shape)}" if isinstance(t, Tensor) else f"a {type(t).__name__}"
            raise ValueError(f"present[{name}] is {what}, expected a bool tensor of shape ({n},)")
    return [given[name] if name in given else x.new_ones(len(x), dtype=torch.bool) for name, x in features.items()]
