"""Losses scaled by parameters that the model's optimizer trains."""

import torch
from torch import Tensor, nn

from mmfast.losses.fixed import check_k, check_losses


class _Scaled(nn.Module):
    """A parameter for each loss."""

    def __init__(self, k: int, start: float) -> None:
        super().__init__()
        check_k(k)
        self.k, self.start = k, start
        self.scale = nn.Parameter(torch.full((k,), start))

    def reset_parameters(self) -> None:
        """The scales as they were at first."""
        nn.init.constant_(self.scale, self.start)

    def extra_repr(self) -> str:
        return f"{self.k}"


class UW(_Scaled):
    """Uncertainty weighting: sum_i exp(-s_i) l_i / 2 + s_i / 2 with trained log-variances s (Kendall et al., "Multi-task learning using uncertainty", CVPR 2018).

    `forward(losses)` takes [K] and returns a scalar, with a gradient for the losses and for `scale` [K], which belongs into the model's optimizer.

    Args:
        k: number of losses.
        start: first value of every s_i (LibMTL's is -0.5).

        >>> mf.losses.UW(2)(torch.tensor([1.0, 3.0])).item()
        2.0
    """

    def __init__(self, k: int, start: float = 0.0) -> None:
        super().__init__(k, start)

    def forward(self, losses: Tensor) -> Tensor:
        check_losses(losses, self.k)
        return 0.5 * (torch.exp(-self.scale) * losses + self.scale).sum()


class IMTLL(_Scaled):
    """IMTL-L: sum_i exp(s_i) l_i - s_i with trained s, at whose optimum all scaled losses are 1 (Liu et al., "Towards impartial multi-task learning", ICLR 2021).

    `forward(losses)` takes [K] and returns a scalar, with a gradient for the losses and for `scale` [K], which belongs into the model's optimizer.

    Args:
        k: number of losses.

        >>> mf.losses.IMTLL(2)(torch.tensor([1.0, 3.0])).item()
        4.0
    """

    def __init__(self, k: int) -> None:
        super().__init__(k, 0.0)

    def forward(self, losses: Tensor) -> Tensor:
        check_losses(losses, self.k)
        return (torch.exp(self.scale) * losses - self.scale).sum()
