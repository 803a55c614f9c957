"""Losses weighted by how they went so far. What is kept are buffers: it is in the state_dict, and nothing waits for a GPU; in eval mode nothing is added to it."""

import torch
from torch import Tensor

from mmfast.losses.fixed import check_k, check_losses
from mmfast.precision import Keeping, wide_dtype

EPS = 1e-8


class _Adam(Keeping):
    """One vector [K] under Adam, kept in buffers."""

    def __init__(self, k: int, start: float, lr: float, weight_decay: float = 0.0) -> None:
        super().__init__()
        self.start, self.lr, self.weight_decay = start, lr, weight_decay
        self.value: Tensor
        self.mean: Tensor
        self.square: Tensor
        self.steps: Tensor
        self.register_buffer("value", torch.full((k,), start, dtype=wide_dtype()))
        self.register_buffer("mean", torch.zeros_like(self.value))
        self.register_buffer("square", torch.zeros_like(self.value))
        self.register_buffer("steps", torch.zeros((), dtype=wide_dtype()))

    @torch.no_grad()
    def step(self, gradient: Tensor) -> None:
        gradient = gradient + self.weight_decay * self.value
        self.steps += 1
        self.mean.lerp_(gradient, 0.1)
        self.square.lerp_(gradient.square(), 1e-3)
        mean, square = self.mean / (1 - 0.9**self.steps), self.square / (1 - 0.999**self.steps)
        self.value -= self.lr * mean / (square.sqrt() + EPS)

    def reset_parameters(self) -> None:
        self.value.fill_(self.start)
        for buffer in (self.mean, self.square, self.steps):
            buffer.zero_()


class DWA(Keeping):
    """Dynamic weight average: losses that fall slowly weigh more (Liu et al., "End-to-end multi-task learning with attention", CVPR 2019).

    `forward(losses)` takes [K] and returns sum_i w_i l_i; `step()` ends an epoch. The weights are K softmax(r / temperature), r the ratios of the mean
    losses of the last two epochs, and 1 in the first two.

    Args:
        k: number of losses.
        temperature: towards 0 the slowest takes all.

        >>> dwa = mf.losses.DWA(2)
        >>> for epoch in ([4.0, 4.0], [2.0, 4.0]):
        ...     _ = dwa(torch.tensor(epoch))
        ...     dwa.step()
        >>> dwa.weights()
        tensor([0.8756, 1.1244])
    """

    def __init__(self, k: int, temperature: float = 2.0) -> None:
        super().__init__()
        check_k(k)
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}, expected a positive number")
        self.k, self.temperature = k, float(temperature)
        self.total: Tensor
        self.count: Tensor
        self.means: Tensor
        self.register_buffer("total", torch.zeros(k, dtype=wide_dtype()))
        self.register_buffer("count", torch.zeros((), dtype=wide_dtype()))
        # of the last epoch, and of the one before: their ratio is one as long as nothing is known
        self.register_buffer("means", torch.ones(2, k, dtype=wide_dtype()))
        self.register_buffer("epochs", torch.zeros((), dtype=torch.int64))
        self.epochs: Tensor

    def weights(self) -> Tensor:
        """The weights [K] of this epoch."""
        weights = self.k * torch.softmax(self.means[0] / self.means[1] / self.temperature, 0)
        return torch.where(self.epochs < 2, 1.0, weights)

    def forward(self, losses: Tensor) -> Tensor:
        check_losses(losses, self.k)
        if self.training:
            with torch.no_grad():
                self.total += losses
                self.count += 1
        return (self.weights() * losses).sum()

    @torch.no_grad()
    def step(self) -> None:
        """Ends an epoch; one without a call of `forward` does not count."""
        seen = self.count > 0
        self.means.copy_(torch.where(seen, torch.stack([self.total / self.count, self.means[0]]), self.means))
        self.epochs += seen
        self.total.zero_()
        self.count.zero_()

    def reset(self) -> None:
        """Forgets all epochs."""
        self.means.fill_(1)
        for buffer in (self.total, self.count, self.epochs):
            buffer.zero_()

    reset_parameters = reset

    def extra_repr(self) -> str:
        return f"{self.k}, temperature={self.temperature}"


class FAMO(Keeping):
    """Fast adaptive multitask optimization: equal relative decrease from the losses alone (Liu et al., "FAMO", NeurIPS 2023).

    `forward(losses)` takes [K], all above `min_losses`, and returns sum_i z_i log(l_i - b_i) / c with z = softmax of the logits and c = sum_i z_i / (l_i - b_i); after the model's step
    `update(losses)` with the losses of the same batch, computed anew, moves the logits by Adam.

    Args:
        k: number of losses.
        lr, weight_decay: of the logits.
        min_losses: b, a lower bound of all losses.

        >>> famo = mf.losses.FAMO(2)
        >>> famo(torch.tensor([1.0, 1.0])).item()
        0.0
        >>> famo.update(torch.tensor([0.5, 1.0]))
        >>> famo.weights()
        tensor([0.4875, 0.5125])
    """

    def __init__(self, k: int, lr: float = 0.025, weight_decay: float = 1e-3, min_losses: float = 0.0) -> None:
        super().__init__()
        check_k(k)
        self.k, self.min_losses = k, min_losses
        self.logits = _Adam(k, 0.0, lr, weight_decay)
        self.before: Tensor
        self.register_buffer("before", torch.full((k,), torch.nan, dtype=wide_dtype()))

    def weights(self) -> Tensor:
        """z, [K]."""
        return torch.softmax(self.logits.value, 0)

    def forward(self, losses: Tensor) -> Tensor:
        check_losses(losses, self.k)
        if self.training:
            self.before.copy_(losses.detach())
        weights, shifted = self.weights(), losses - self.min_losses + EPS
        return (weights * shifted.log()).sum() / (weights / shifted.detach()).sum()

    @torch.no_grad()
    def update(self, losses: Tensor) -> None:
        """Moves the logits by what the model's step did to the losses of the batch that `forward` saw last; without one before, to NaN."""
        check_losses(losses, self.k)
        fall = (self.before - self.min_losses + EPS).log() - (losses.detach() - self.min_losses + EPS).log()
        weights = self.weights()
        self.logits.step(weights * (fall - (weights * fall).sum()))

    def reset(self) -> None:
        """As at first."""
        self.logits.reset_parameters()
        self.before.fill_(torch.nan)

    reset_parameters = reset

    def extra_repr(self) -> str:
        return f"{self.k}"


class GradNorm(Keeping):
    """The original GradNorm: weights by which all gradients fall into a common length, the longer the slower a loss falls (Chen et al., ICML 2018).

    `forward(losses)` takes [K] and returns sum_i w_i l_i, the first call's losses being those that others are compared with; `update(norms)` takes the lengths [K] of the gradients of
    the *unweighted* losses at the shared representation, or of its last layer, and moves w, of sum K, along the gradient of sum_i |w_i n_i - mean_j(w_j n_j) r_i^alpha|, r_i the relative
    inverse training rate. (`mf.GradNorm` is the impartial-optimisation code's rule, which sees gradients alone.)

    Args:
        k: number of losses.
        alpha: strength of the pull to a common rate, at least 0.
        lr: of Adam on the weights.

        >>> gradnorm = mf.losses.GradNorm(2)
        >>> gradnorm(torch.tensor([1.0, 1.0])).item()
        2.0
        >>> gradnorm.update(torch.tensor([1.0, 3.0]))
        >>> gradnorm.weights()
        tensor([1.0250, 0.9750])
    """

    def __init__(self, k: int, alpha: float = 1.5, lr: float = 0.025) -> None:
        super().__init__()
        check_k(k)
        if not alpha >= 0:
            raise ValueError(f"alpha is {alpha}, expected a number of at least 0")
        self.k, self.alpha = k, float(alpha)
        self.scale = _Adam(k, 1.0, lr)
        self.first: Tensor
        self.last: Tensor
        self.register_buffer("first", torch.full((k,), torch.nan, dtype=wide_dtype()))
        self.register_buffer("last", torch.full((k,), torch.nan, dtype=wide_dtype()))

    def weights(self) -> Tensor:
        """w, [K], of sum K."""
        return self.scale.value.clone()

    def forward(self, losses: Tensor) -> Tensor:
        check_losses(losses, self.k)
        if self.training:
            self.last.copy_(losses.detach())
            self.first.copy_(torch.where(self.first.isnan(), self.last, self.first))
        return (self.weights() * losses).sum()

    @torch.no_grad()
    def update(self, norms: Tensor) -> None:
        """One step of the weights; after a call of `forward`."""
        check_losses(norms, self.k)
        rate = self.last / self.first
        weighted = self.scale.value * norms
        target = weighted.mean() * (rate / rate.mean()) ** self.alpha
        self.scale.step((weighted - target).sign() * norms)
        positive = self.scale.value.clamp_(min=1e-5)
        positive.mul_(self.k / positive.sum())

    def reset(self) -> None:
        """As at first."""
        self.scale.reset_parameters()
        self.first.fill_(torch.nan)
        self.last.fill_(torch.nan)

    reset_parameters = reset

    def extra_repr(self) -> str:
        return f"{self.k}, alpha={self.alpha}"
