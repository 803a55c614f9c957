"""What a Gramian says about its gradients: norms, cosines, conflict, spread. Functions of G [..., K, K] alone, float64, batched.

A row that is all zero belongs to a missing gradient: whatever depends on it is NaN, and it counts in no share and no extreme.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

_EPS = torch.finfo(torch.float64).eps


def _square(G: Tensor) -> Tensor:
    if not isinstance(G, Tensor) or G.dim() < 2 or G.shape[-1] != G.shape[-2]:
        what = f"has shape {tuple(G.shape)}" if isinstance(G, Tensor) else f"is a {type(G).__name__}"
        raise ValueError(f"G {what}, expected a Gramian of shape [..., K, K]")
    return G.double()


def _off_diagonal(present: Tensor) -> Tensor:
    """Pairs i < j of present rows, bool [..., K, K]."""
    return (present.unsqueeze(-1) & present.unsqueeze(-2)).triu(1)


def norms(G: Tensor) -> Tensor:
    """Length of each gradient.

    Args:
        G: Gramian [..., K, K].

    Returns:
        float64 [..., K].

    Example:
        >>> norms(torch.tensor([[9.0, -6.0], [-6.0, 4.0]]))
        tensor([3., 2.], dtype=torch.float64)
    """
    return _square(G).diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()


def cosines(G: Tensor) -> Tensor:
    """Cosine of each pair of gradients.

    Args:
        G: Gramian [..., K, K].

    Returns:
        float64 [..., K, K] in [-1, 1], with 1 on the diagonal; NaN in the rows and columns of missing gradients.

    Example:
        >>> cosines(torch.tensor([[9.0, -6.0], [-6.0, 4.0]]))
        tensor([[ 1., -1.],
                [-1.,  1.]], dtype=torch.float64)
    """
    d = norms(G)
    C = (_square(G) / d.unsqueeze(-1) / d.unsqueeze(-2)).clamp(-1, 1)
    eye = torch.eye(C.shape[-1], dtype=torch.bool, device=C.device)
    return torch.where(eye & ~C.isnan(), 1.0, C)


def conflict_rate(G: Tensor) -> Tensor:
    """Share of the pairs of gradients whose cosine is negative.

    Args:
        G: Gramian [..., K, K].

    Returns:
        float64 [...] in [0, 1], over the pairs of present gradients; NaN where there is no pair, or one that is no number.

    Example:
        >>> conflict_rate(torch.tensor([[1.0, -1.0, 2.0], [-1.0, 4.0, 0.0], [2.0, 0.0, 9.0]]))
        tensor(0.3333, dtype=torch.float64)
    """
    G = _square(G)
    pairs = _off_diagonal(norms(G) != 0)
    rate = ((G < 0) & pairs).sum((-1, -2)) / pairs.sum((-1, -2)).double()
    return torch.where((G.isnan() & pairs).any(-1).any(-1), torch.nan, rate)


def magnitude_similarity(G: Tensor) -> Tensor:
    """Gradient magnitude similarity 2 d_i d_j / (d_i^2 + d_j^2) of each pair (Yu et al., "Gradient surgery for multi-task learning", 2020).

    Args:
        G: Gramian [..., K, K].

    Returns:
        float64 [..., K, K] in (0, 1], 1 where both are of one length; NaN in the rows and columns of missing gradients.

    Example:
        >>> magnitude_similarity(torch.tensor([[9.0, 0.0], [0.0, 1.0]]))
        tensor([[1.0000, 0.6000],
                [0.6000, 1.0000]], dtype=torch.float64)
    """
    d = norms(G)
    ratio = torch.minimum(d.unsqueeze(-1), d.unsqueeze(-2)) / torch.maximum(d.unsqueeze(-1), d.unsqueeze(-2))
    return torch.where(ratio > 0, 2 * ratio / (1 + ratio.square()), torch.nan)


def singular_values(G: Tensor) -> Tensor:
    """Singular values of the matrix whose rows are the gradients.

    Args:
        G: Gramian [..., K, K], finite.

    Returns:
        float64 [..., K], descending; a missing gradient adds a zero. Those below 1e-8 of the largest are rounding noise of G.

    Example:
        >>> singular_values(torch.tensor([[9.0, 0.0], [0.0, 4.0]]))
        tensor([3., 2.], dtype=torch.float64)
    """
    return torch.linalg.eigvalsh(_square(G)).flip(-1).clamp(min=0).sqrt()


def condition_number(G: Tensor) -> Tensor:
    """Largest over smallest singular value of the matrix whose rows are the present gradients.

    Args:
        G: Gramian [..., K, K], finite.

    Returns:
        float64 [...], at least 1; infinite where the gradients are linearly dependent to within the precision of G, NaN where all are missing.

    Example:
        >>> condition_number(torch.tensor([[9.0, 0.0], [0.0, 4.0]]))
        tensor(1.5000, dtype=torch.float64)
    """
    values = singular_values(G)
    count = (norms(G) != 0).sum(-1, keepdim=True)
    first = values[..., :1]
    last = values.gather(-1, (count - 1).clamp(min=0))
    dependent = last.square() <= first.square() * values.shape[-1] * _EPS
    ratio = torch.where(dependent, torch.inf, first / last)
    return torch.where(count > 0, ratio, torch.nan).squeeze(-1)


def curvature_bound(G: Tensor) -> Tensor:
    """Curvature bounding measure (1 - cos^2) |g_i - g_j|^2 / |g_i + g_j|^2 of each pair (Yu et al., "Gradient surgery for multi-task learning", 2020).

    Args:
        G: Gramian [..., K, K].

    Returns:
        float64 [..., K, K], 0 on the diagonal; NaN in the rows and columns of missing gradients and where g_i = -g_j.

    Example:
        >>> curvature_bound(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        tensor([[0., 1.],
                [1., 0.]], dtype=torch.float64)
    """
    G = _square(G)
    d = G.diagonal(dim1=-2, dim2=-1)
    total = d.unsqueeze(-1) + d.unsqueeze(-2)
    apart, together = (total - 2 * G).clamp(min=0), (total + 2 * G).clamp(min=0)
    return (1 - cosines(G).square()) * apart / together


def cosine_to_direction(G: Tensor, w: Tensor) -> Tensor:
    """Cosine of each gradient to the direction d = sum_i w_i g_i.

    Args:
        G: Gramian [..., K, K].
        w: weights [..., K].

    Returns:
        float64 [..., K] in [-1, 1]: negative where a step along -d makes that loss worse. NaN for missing gradients, and for all of
        them where the summands of d cancel to within the precision of G.

    Example:
        >>> cosine_to_direction(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([1.0, 1.0]))
        tensor([0.7071, 0.7071], dtype=torch.float64)
    """
    G = _square(G)
    if not isinstance(w, Tensor) or w.shape[-1:] != G.shape[-1:]:
        what = f"has shape {tuple(w.shape)}" if isinstance(w, Tensor) else f"is a {type(w).__name__}"
        raise ValueError(f"w {what}, expected weights of shape [..., {G.shape[-1]}] like the Gramian {tuple(G.shape)}")
    d, w = norms(G), w.double()
    # with u_i = g_i / |g_i|: numbers of order one, whatever the scale of G
    C, reach = cosines(G).nan_to_num(0.0), w * d
    reach = reach / reach.abs().amax(-1, keepdim=True)
    along = (C @ reach.unsqueeze(-1)).squeeze(-1)
    length = (along * reach).sum(-1, keepdim=True).clamp(min=0)
    noise = G.shape[-1] * _EPS * reach.abs().sum(-1, keepdim=True).square()
    cosine = (along / length.sqrt()).clamp(-1, 1)
    return torch.where((d != 0) & (length > noise), cosine, torch.nan)


@dataclass(frozen=True)
class BlockStats:
    """What an ImpartialityBlock saw in its last backward pass: float64 tensors on the CPU, with a leading B for per="sample".

    A missing branch has weight 0, norm 0, and NaN wherever a cosine or a ratio is not defined.
    """

    names: tuple[str, ...]  # of the branches
    gram: Tensor  # [..., K, K]
    weights: Tensor  # [..., K], after norm preservation
    missing: Tensor  # [..., K] bool: no gradient, an all-zero gradient, or masked
    norms: Tensor  # [..., K]
    cosines: Tensor  # [..., K, K]
    conflict_rate: Tensor  # [...], share of negative cosines among the pairs of present branches
    magnitude_similarity: Tensor  # [..., K, K]
    cosine_to_direction: Tensor  # [..., K], of each branch's gradient to the resolved one

    @classmethod
    def of(cls, names: tuple[str, ...], info: Tensor) -> "BlockStats":
        """From K weights followed by the Gramian, float64 [..., K + K*K]."""
        k = len(names)
        info = info.cpu()
        w, G = info[..., :k].clone(), info[..., k:].unflatten(-1, (k, k)).clone()
        missing = G.diagonal(dim1=-2, dim2=-1) == 0
        return cls(
            names=names,
            gram=G,
            weights=w,
            missing=missing,
            norms=norms(G),
            cosines=cosines(G),
            conflict_rate=conflict_rate(G),
            magnitude_similarity=magnitude_similarity(G),
            cosine_to_direction=cosine_to_direction(G, w),
        )

    def plot(self, path: str | Path) -> None:
        """Draws the cosines, weights and norms into an image file, such as "block.png"; means over the samples for per="sample". Needs matplotlib."""
        from mmfast.plots.figure import draw_stats

        draw_stats(self, path)

    def __str__(self) -> str:
        """A table with one line a branch; means over the samples for per="sample"."""
        lead = tuple(range(self.conflict_rate.dim()))

        def mean(x: Tensor) -> Tensor:
            return x.nanmean(lead) if lead else x

        columns = (mean(self.weights), mean(self.norms), mean(self.cosine_to_direction), mean(self.missing.double()))
        width = max(8, *map(len, self.names))
        lines = [f"{'branch':<{width}}  {'weight':>10}  {'norm':>10}  {'cos to d':>8}  {'missing':>7}"]
        for name, w, d, c, m in zip(self.names, *columns, strict=True):
            lines.append(f"{name:<{width}}  {w:>10.4g}  {d:>10.4g}  {c:>8.3f}  {m:>7.0%}")
        rate = mean(self.conflict_rate)
        return "\n".join([*lines, f"conflicting pairs: {'none to compare' if rate.isnan() else f'{rate:.0%}'}"])
