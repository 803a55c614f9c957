"""Rules that keep something of every gradient, element by element, from call to call: EMA, MoCo, ExcessMTL, MConFIG. In plain torch.

They are for gradients of parameters, where an element is the same one at every call, and hold K gradients or more. Inner products and weighted sums of what they
keep are the backend's.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmfast import contract
from mmfast.resolvers.alignment import ConFIG
from mmfast.resolvers.base import Resolver, call_resolver, check_not_capturing, kept_by_apply, on_device, was_saved
from mmfast.resolvers.chain import bind
from mmfast.resolvers.elementwise import ElementwiseRule
from mmfast.resolvers.names import ResolverLike, made_of
from mmfast.resolvers.solve import precision_of, present_rows


def _check(rule: str, name: str, value: float, least: float, below: float = math.inf) -> float:
    if not (isinstance(value, (int, float)) and least <= value < below):
        raise ValueError(
            f"{rule}: {name} is {value!r}, expected a number of at least {least:g}{'' if below == math.inf else f', below {below:g}'}"
        )
    return float(value)


class TrackingRule(ElementwiseRule):
    """A resolver with state for every element.

    What is kept are gradients: `loss_scale` (a number, or a tensor on the device) says what the losses were multiplied by, `GradScaler.get_scale()`, and is
    divided out of them. A call with a gradient that is not finite changes nothing that is kept.
    """

    keeps = True
    of_parameters = True
    of_elements: tuple[str, ...]  # names of what is kept of elements, in the dtype that gradients are summed in; zeros at first
    of_rows: tuple[str, ...]  # and of what is kept of rows, in float64

    def __init__(self) -> None:
        super().__init__()
        self.loss_scale: float | Tensor = 1.0
        for name in self.names:
            self.register_buffer(name, None)

    @property
    def names(self) -> tuple[str, ...]:
        """Of all that is kept."""
        return self.of_elements + self.of_rows

    def shape(self, name: str, k: int, n: int) -> tuple[int, ...]:
        """Of what is kept under a name for k gradients of n elements."""
        return (k, n) if name in self.of_elements else (k,)

    def step(self, functions: Any, x: Tensor, there: Tensor, kept: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
        """(the result [N], what is kept next) for gradients x [K, N], those not there [K] being zero."""
        raise NotImplementedError

    def through(self, functions: Any, grads: Sequence[Tensor], missing: Sequence[int], mask: Tensor | None) -> Tensor:
        first, k = grads[0], len(grads) + len(missing)
        if mask is not None and mask.dim() > 1:
            raise ValueError(
                f"mask has shape {tuple(mask.shape)}, expected {(k,)}: {type(self).__name__} resolves gradients of parameters, which have no samples"
            )
        present = iter(grads)
        zero = torch.zeros(first.numel(), dtype=torch.float64 if first.dtype == torch.float64 else torch.float32, device=first.device)
        x = torch.stack([zero if i in missing else next(present).flatten().to(zero.dtype) for i in range(k)])
        x = x if mask is None else torch.where(mask.unsqueeze(-1), x, 0)
        kept = self._kept(k, x)
        contract.check_unmapped(x, *kept)
        out, after = self.step(functions, x / self.loss_scale, (x != 0).any(-1), kept)
        sound = x.isfinite().all()
        for old, new in zip(kept, after, strict=True):
            old.copy_(torch.where(sound, new, old))
        return torch.where(sound, out * self.loss_scale, torch.nan).to(first.dtype).view(first.shape)

    def _kept(self, k: int, x: Tensor) -> list[Tensor]:
        """What is kept, made on first use."""
        found = []
        for name in self.names:
            shape, dtype = self.shape(name, k, x.shape[-1]), x.dtype if name in self.of_elements else torch.float64
            old = self._buffers[name]
            if old is None:
                check_not_capturing(x.device, f"what {type(self).__name__} keeps")
                old = contract.plain(torch.zeros(shape, dtype=dtype, device=x.device))
            elif old.device != x.device:
                old = on_device(old, x.device)
            if old.shape != shape or old.dtype != dtype:
                raise ValueError(
                    f"{type(self).__name__} keeps {name} of shape {tuple(old.shape)}, {old.dtype}, from earlier calls, but these gradients need {shape}, {dtype}; "
                    "use one for each set of parameters, or call its reset()"
                )
            setattr(self, name, old)
            found.append(old)
        return found

    def reset(self) -> None:
        for name in self.names:
            setattr(self, name, None)

    def reset_parameters(self) -> None:
        """As at first, after `to_empty`."""
        for name in self.names:
            old = self._buffers[name]
            setattr(self, name, None if old is None else torch.zeros_like(old))

    def _apply(self, fn: Any, recurse: bool = True) -> "TrackingRule":
        before = {name: self._buffers[name] for name in self.names}
        super()._apply(fn, recurse)
        for name in self.names:
            setattr(self, name, kept_by_apply(before[name], self._buffers[name]))
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *args: Any) -> None:
        for name in self.names:  # shapes are those of the first gradients
            saved, own = state_dict.get(prefix + name), self._buffers[name]
            if saved is not None:
                setattr(self, name, torch.empty_like(saved, device=saved.device if own is None else own.device))
            elif was_saved(local_metadata):
                setattr(self, name, None)  # before the first gradients
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


def _gramian(functions: Any, rows: Tensor, there: Tensor) -> Tensor:
    return functions.gram(list(rows.unbind(0)), (), there, "batch")


def _sum(functions: Any, rows: Tensor, there: Tensor, w: Tensor) -> Tensor:
    """sum_i w_i rows_i over the rows that are there."""
    return functions.combine(list(rows.unbind(0)), (), there, w.contiguous(), "batch")


def _resolved(functions: Any, inner: Resolver, rows: Tensor, there: Tensor) -> Tensor:
    """What a resolver makes of the rows [K, N] that are there."""
    G, precision = _gramian(functions, rows, there), precision_of(rows.dtype)
    inner.check(len(rows))
    chain = inner.chain()
    if chain is None:
        return _sum(functions, rows, there, call_resolver(inner, G, present_rows(G, there), precision))
    return _sum(functions, rows, there, functions.weights(G, there, bind(chain, (), len(rows), rows.device), False, precision))


class EMA(TrackingRule):
    """Another rule on running means of the gradients: y <- g + beta / t^sigma (y - g), t the calls that had the gradient (DB-MTL: Lin et al., "Dual-balancing
    for multi-task learning", 2023).

    `EMA(DBMTL())` is DB-MTL whole, for gradients of log(loss). A gradient that is missing keeps its mean and takes no part. K gradients are kept.

    Args:
        inner: the rule, or its name or class.
        beta: weight of the running mean, at least 0, below 1.
        sigma: how fast that weight falls; 0 keeps it.

    Example:
        >>> rule = mf.EMA(mf.DBMTL(), beta=0.5)
        >>> for _ in range(2):
        ...     out = mf.resolve([torch.tensor([4.0, 0.0]), torch.tensor([0.0, 1.0])], rule)
        >>> out
        tensor([3., 3.])
    """

    of_elements, of_rows = ("mean",), ("calls",)

    def __init__(self, inner: ResolverLike, beta: float = 0.9, sigma: float = 0.0) -> None:
        super().__init__()
        self.inner = made_of(inner)
        if isinstance(self.inner, ElementwiseRule):
            raise TypeError(f"EMA: inner is {self.inner!r}, expected a Resolver of Gramians")
        self.beta, self.sigma = _check("EMA", "beta", beta, 0, 1), _check("EMA", "sigma", sigma, 0)

    def check(self, k: int) -> None:
        self.inner.check(k)

    def step(self, functions: Any, x: Tensor, there: Tensor, kept: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
        mean, calls = kept
        calls = calls + there
        rate = self.beta * calls.clamp(min=1) ** -self.sigma
        mean = torch.where(there.unsqueeze(-1), x + rate.unsqueeze(-1).to(x.dtype) * (mean - x), mean)
        return _resolved(functions, self.inner, mean, there), (mean, calls)

    def reset(self) -> None:
        super().reset()
        self.inner.reset()

    def extra_repr(self) -> str:
        return f"beta={self.beta}, sigma={self.sigma}"


class MoCo(TrackingRule):
    """Multi-objective gradient correction: running means of unit gradients, and weights that move along their Gramian (Fernando et al., "Mitigating gradient bias
    in multi-objective learning", ICLR 2023, in the form of the authors' code).

    y <- y - beta t^-beta_sigma (y - l g / |g|), w <- softmax(w - gamma t^-gamma_sigma (y y' + rho) w); the result is sum_i w_i y_i. K gradients are kept.

    Args:
        beta, beta_sigma: step of the means, and how fast it falls.
        gamma, gamma_sigma: step of the weights, and how fast it falls.
        rho: strength of the pull towards equal weights, at least 0.

    Example:
        >>> moco = mf.MoCo()
        >>> moco.see(torch.tensor([2.0, 1.0]))  # the losses l, before each call; without them all are 1
        >>> mf.resolve([torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])], moco)
        tensor([0.4906, 0.2547])
    """

    of_elements, of_rows = ("mean",), ("calls", "weights")

    def __init__(self, beta: float = 0.5, beta_sigma: float = 0.5, gamma: float = 0.1, gamma_sigma: float = 0.5, rho: float = 0.0) -> None:
        super().__init__()
        self.beta, self.beta_sigma = _check("MoCo", "beta", beta, 0), _check("MoCo", "beta_sigma", beta_sigma, 0)
        self.gamma, self.gamma_sigma = _check("MoCo", "gamma", gamma, 0), _check("MoCo", "gamma_sigma", gamma_sigma, 0)
        self.rho = _check("MoCo", "rho", rho, 0)
        self.losses: Tensor | None = None

    def see(self, losses: Tensor) -> None:
        """Takes the losses [K] of the next call, not scaled."""
        self.losses = losses.detach().double()

    def step(self, functions: Any, x: Tensor, there: Tensor, kept: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
        mean, calls, weights = kept
        losses = torch.ones_like(calls) if self.losses is None else self.losses.to(calls.device)
        if losses.shape != calls.shape:
            raise ValueError(f"MoCo: losses has shape {tuple(losses.shape)}, expected {tuple(calls.shape)}, one per gradient")
        norm = _gramian(functions, x, there).diagonal().sqrt()
        there = there & (norm != 0)  # of a row whose squares vanish there is no unit gradient
        unit = (losses / torch.where(there, norm, 1)).unsqueeze(-1).to(x.dtype) * x
        calls = calls + there
        rate = self.beta * calls.clamp(min=1) ** -self.beta_sigma
        mean = torch.where(there.unsqueeze(-1), mean - rate.unsqueeze(-1).to(x.dtype) * (mean - unit), mean)
        w = torch.where(weights.sum() == 0, there / there.sum().clamp(min=1).double(), torch.where(there, weights, 0))
        slope = _gramian(functions, mean, there) @ w + self.rho * w
        moved = w - self.gamma * calls.amax().clamp(min=1) ** -self.gamma_sigma * slope
        w = torch.where(there, torch.where(there, moved, -torch.inf).softmax(0), 0)
        return _sum(functions, mean, there, w), (mean, calls, torch.where(there, w, weights))

    def extra_repr(self) -> str:
        return f"beta={self.beta}, beta_sigma={self.beta_sigma}, gamma={self.gamma}, gamma_sigma={self.gamma_sigma}, rho={self.rho}"


class ExcessMTL(TrackingRule):
    """Weights that grow with each task's excess risk, estimated as g' diag(sum of g^2)^(-1/2) g relative to what it was at first (He et al., "Robust multi-task
    learning with excess risks", ICML 2024).

    w_i <- w_i exp(step e_i / e_i(0)), brought to the sum 1. The sums of squares of K gradients are kept.

    Args:
        robust_step_size: step of the weights' logarithms, positive.
        n_warmup_steps: calls, at least 1, whose mean excess risk is e(0); the weights are equal until then.

    Example:
        >>> rule = mf.ExcessMTL()
        >>> mf.resolve([torch.tensor([3.0, 0.0]), torch.tensor([0.0, 1.0])], rule)
        tensor([1.5000, 0.5000])
    """

    of_elements, of_rows = ("squares",), ("calls", "first", "logits")

    def __init__(self, robust_step_size: float = 1.0, n_warmup_steps: int = 1) -> None:
        super().__init__()
        if not (math.isfinite(robust_step_size) and robust_step_size > 0):
            raise ValueError(f"ExcessMTL: robust_step_size is {robust_step_size!r}, expected a positive number")
        if not isinstance(n_warmup_steps, int) or n_warmup_steps < 1:
            raise ValueError(f"ExcessMTL: n_warmup_steps is {n_warmup_steps!r}, expected a number of calls, 1 or more")
        self.robust_step_size, self.n_warmup_steps = float(robust_step_size), n_warmup_steps

    def step(self, functions: Any, x: Tensor, there: Tensor, kept: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
        squares, calls, first, logits = kept
        square = x.square()
        squares = squares + square
        excess = torch.where(squares > 0, square / squares.sqrt(), 0).double().sum(-1)
        there = there & (excess != 0)  # a row whose squares vanish is missing, as to rules of Gramians: nothing is in proportion to it
        calls = calls + there
        begins = there & (calls <= self.n_warmup_steps)
        first = torch.where(begins, first + excess / self.n_warmup_steps, first)
        moves = there & ~begins
        logits = torch.where(moves, logits + self.robust_step_size * excess / torch.where(moves, first, 1), logits)
        w = torch.where(there, torch.where(there, logits, -torch.inf).softmax(0), 0)
        return _sum(functions, x, there, w), (squares, calls, first, logits)

    def extra_repr(self) -> str:
        return f"robust_step_size={self.robust_step_size}, n_warmup_steps={self.n_warmup_steps}"


class MConFIG(TrackingRule):
    """ConFIG on the gradients' momenta, with Adam's second moment of the direction that it takes (Liu et al., "Towards conflict-free training of physics informed
    neural networks", ICLR 2025).

    A gradient that is missing has its momentum take part all the same, as the method wants: one new gradient is enough for a step, and each may be computed
    in turn. One that has never come takes no part (the authors' code makes no step until all have). The result is a step of about unit size in each element, for
    plain SGD. K + 2 gradients are kept.

    Args:
        beta1, beta2: decay of the first and second moment.
        pref, length: as of `ConFIG`.
    """

    of_elements, of_rows = ("moments", "square", "pseudo"), ("calls", "steps")

    def __init__(
        self, beta1: float = 0.9, beta2: float = 0.999, pref: Sequence[float] | None = None, length: str | int = "projection"
    ) -> None:
        super().__init__()
        self.beta1, self.beta2 = _check("MConFIG", "beta1", beta1, 0, 1), _check("MConFIG", "beta2", beta2, 0, 1)
        self.inner = ConFIG(pref, length)

    def check(self, k: int) -> None:
        self.inner.check(k)

    def shape(self, name: str, k: int, n: int) -> tuple[int, ...]:
        return {"moments": (k, n), "square": (n,), "pseudo": (n,), "calls": (k,), "steps": ()}[name]

    def step(self, functions: Any, x: Tensor, there: Tensor, kept: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
        moments, square, pseudo, calls, steps = kept
        moments = torch.where(there.unsqueeze(-1), self.beta1 * moments + (1 - self.beta1) * x, moments)
        calls = calls + there
        weight = torch.where(calls > 0, 1 - self.beta1**calls, 1).unsqueeze(-1).to(x.dtype)
        direction = _resolved(functions, self.inner, moments / weight, calls > 0)
        steps = steps + 1
        moment = direction * (1 - self.beta1**steps).to(x.dtype)
        square = self.beta2 * square + (1 - self.beta2) * ((moment - self.beta1 * pseudo) / (1 - self.beta1)).square()
        spread = (square / (1 - self.beta2**steps).to(x.dtype)).sqrt()
        return torch.where(spread > 0, direction / torch.where(spread > 0, spread, 1), 0), (moments, square, moment, calls, steps)

    def extra_repr(self) -> str:
        return f"beta1={self.beta1}, beta2={self.beta2}, {self.inner.extra_repr()}"
