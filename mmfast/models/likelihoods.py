"""Likelihoods of heterogeneous features: from the unconstrained outputs of a head to a log-density and a point prediction.

Every class follows one contract. `raw` is [..., n_outputs], what a linear head gives; `x` is [...], in original units. `w` is the scale of the
local step of Javaloy et al. (ICML 2022): the density is that of the rescaled feature (w x, or x^w for a positive one), predictions come back in
original units. Discrete features are not rescaled: they ignore `w`. `w` may be a number or a tensor that broadcasts against `x`, so one call serves
many features of one kind.

A value that a likelihood does not take (below zero for a log-normal feature, half a count) has the log-density NaN, and so have its derivatives.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mmfast.models import fused
from mmfast.precision import Keeping, wide

_TINY = 1e-15  # keeps precisions away from zero where softplus underflows
_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


@dataclass(frozen=True)
class Likelihood:
    """One feature's likelihood; `Joint` evaluates all of one kind together."""

    @property
    def n_outputs(self) -> int:
        """Number of outputs its head needs."""
        return 1

    def log_prob(self, raw: Tensor, x: Tensor, w: Tensor | float = 1.0) -> Tensor:
        """Log-density (or log-mass) of x, of its shape."""
        raise NotImplementedError

    def predict(self, raw: Tensor, w: Tensor | float = 1.0) -> Tensor:
        """The point prediction [...], in original units."""
        raise NotImplementedError


def _none_where(outside: Tensor, x: Tensor) -> Tensor:
    """x with NaN where the likelihood takes no such value: its formula would go on with it."""
    return torch.where(outside, torch.nan, x)


def _mean_precision(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and precision from the natural parameters (precision * mean, -precision / 2 < 0)."""
    precision = 2 * (_TINY + F.softplus(raw[..., 1]))
    return raw[..., 0] / precision, precision


def _normal_log_prob(raw: Tensor, x: Tensor) -> Tensor:
    mean, precision = _mean_precision(raw)
    return 0.5 * (precision.log() - precision * (x - mean).square()) - _HALF_LOG_2PI


class Normal(Likelihood):
    """A real feature; natural parameters, predicts the mean."""

    n_outputs = 2

    def log_prob(self, raw: Tensor, x: Tensor, w: Tensor | float = 1.0) -> Tensor:
        return _normal_log_prob(raw, w * x)

    def predict(self, raw: Tensor, w: Tensor | float = 1.0) -> Tensor:
        return _mean_precision(raw)[0] / w


class LogNormal(Likelihood):
    """A positive feature (zero counts as 1e-20); natural parameters of its logarithm, predicts the mode."""

    n_outputs = 2

    def log_prob(self, raw: Tensor, x: Tensor, w: Tensor | float = 1.0) -> Tensor:
        log_x = w * _none_where(x < 0, x).clamp_min(1e-20).log()
        return _normal_log_prob(raw, log_x) - log_x

    def predict(self, raw: Tensor, w: Tensor | float = 1.0) -> Tensor:
        mean, precision = _mean_precision(raw)
        return (mean / w - 1 / (precision * w * w)).clamp(math.log(1e-20), math.log(1e20)).exp()


class Gamma(Likelihood):
    """A positive feature (zero counts as 1e-20); outputs of shape and rate (natural parameters shape - 1 and -rate), predicts the mode."""

    n_outputs = 2

    def _shape_rate(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        positive = _TINY + F.softplus(raw)
        return positive[..., 0], positive[..., 1]

    def log_prob(self, raw: Tensor, x: Tensor, w: Tensor | float = 1.0) -> Tensor:
        shape, rate = self._shape_rate(raw)
        x = (w * _none_where(x < 0, x)).clamp_min(1e-20)
        return shape * rate.log() + (shape - 1) * x.log() - rate * x - torch.lgamma(shape)

    def predict(self, raw: Tensor, w: Tensor | float = 1.0) -> Tensor:
        shape, rate = self._shape_rate(raw)
        return (shape - 1).clamp_min(0) / rate / w


class Exponential(Likelihood):
    """A feature from zero on; the output is of the rate, predicts the mean (the mode would be zero whatever the rate)."""

    def _rate(self, raw: Tensor) -> Tensor:
        return _TINY + F.softplus(raw[..., 0])

    def log_prob(self, raw: Tensor, x: Tensor, w: Tensor | float = 1.0) -> Tensor:
        rate = self._rate(raw)
        return rate.log() - rate * (w * _none_where(x < 0, x))

    def predict(self, raw: Tensor, w: Tensor | float = 1.0) -> Tensor:
        return 1 / (self._rate(raw) * w)


class Bernoulli(Likelihood):
    """A binary feature, 0 or 1, or a share between them; the output is the logit, predicts the likelier value."""

    def log_prob(self, raw: Tensor, x: Tensor, w: Tensor | float = 1.0) -> Tensor:
        return _none_where((x < 0) | (x > 1), x) * raw[..., 0] - F.softplus(raw[..., 0])

    def predict(self, raw: Tensor, w: Tensor | float = 1.0) -> Tensor:
        return (raw[..., 0] >= 0).to(raw.dtype)


@dataclass(frozen=True)
class Categorical(Likelihood):
    """A feature with the values 0 .. classes - 1; the outputs are logits, predicts the likeliest value."""

    classes: int

    def __post_init__(self) -> None:
        if not isinstance(self.classes, int) or self.classes < 1:
            raise ValueError(f"classes is {self.classes!r}, expected a whole number, 1 at least")

    @property
    def n_outputs(self) -> int:
        return self.classes

    def log_prob(self, raw: Tensor, x: Tensor, w: Tensor | float = 1.0) -> Tensor:
        return raw.log_softmax(-1).gather(-1, x.long().unsqueeze(-1)).squeeze(-1)

    def predict(self, raw: Tensor, w: Tensor | float = 1.0) -> Tensor:
        return raw.argmax(-1).to(raw.dtype)


@dataclass(frozen=True)
class Ordinal(Likelihood):
    """A feature with the ordered values 0 .. classes - 1: P(x <= r) = sigmoid(threshold_r - location), predicts the likeliest value.

    The outputs are the location, the first threshold, and the steps from each threshold to the next, made positive by softplus.
    """

    classes: int

    def __post_init__(self) -> None:
        if self.classes < 2:
            raise ValueError(f"classes is {self.classes}, expected at least 2")

    @property
    def n_outputs(self) -> int:
        return self.classes

    def _log_probs(self, raw: Tensor) -> Tensor:
        step = _TINY + F.softplus(raw[..., 2:])
        cut = torch.cat([raw[..., 1:2], step], -1).cumsum(-1) - raw[..., :1]
        below, above = F.logsigmoid(cut), F.logsigmoid(-cut)
        # sigmoid(b) - sigmoid(a) = sigmoid(b) sigmoid(-a) (1 - exp(a - b)): no difference of nearly equal numbers
        between = below[..., 1:] + above[..., :-1] + torch.log(-torch.expm1(-step))
        return torch.cat([below[..., :1], between, above[..., -1:]], -1)

    def log_prob(self, raw: Tensor, x: Tensor, w: Tensor | float = 1.0) -> Tensor:
        return self._log_probs(raw).gather(-1, x.long().unsqueeze(-1)).squeeze(-1)

    def predict(self, raw: Tensor, w: Tensor | float = 1.0) -> Tensor:
        return self._log_probs(raw).argmax(-1).to(raw.dtype)


class Poisson(Likelihood):
    """A count; the output is the logarithm of the rate, predicts the rate rounded down (a mode)."""

    def _log_rate(self, raw: Tensor) -> Tensor:
        return raw[..., 0].clamp(math.log(1e-6), math.log(1e20))

    def log_prob(self, raw: Tensor, x: Tensor, w: Tensor | float = 1.0) -> Tensor:
        log_rate, x = self._log_rate(raw), _none_where((x < 0) | (x != x.floor()), x)
        return x * log_rate - log_rate.exp() - torch.lgamma(x + 1)

    def predict(self, raw: Tensor, w: Tensor | float = 1.0) -> Tensor:
        return self._log_rate(raw).exp().floor()


KINDS = (Normal, LogNormal, Gamma, Exponential, Bernoulli, Categorical, Ordinal, Poisson)  # in the order of csrc/args.h


class Joint(Keeping):
    """K independent features; all of one kind are evaluated in one call, categorical ones of any number of classes too.

    Args:
        likelihoods: one per feature.
        w: [K] scales of the local step, positive; ones if left out.

    Raises:
        TypeError, ValueError: an argument is not as described.
    """

    w: Tensor
    _features: Tensor
    _outputs: Tensor
    _order: Tensor
    _kinds: Tensor

    def __init__(self, likelihoods: Sequence[Likelihood], w: Tensor | None = None) -> None:
        super().__init__()
        self.likelihoods = list(likelihoods)
        for i, part in enumerate(self.likelihoods):
            if not isinstance(part, Likelihood):
                raise TypeError(f"likelihoods[{i}] is {part!r}, expected a likelihood, such as Normal()")
        if not self.likelihoods:
            raise ValueError("likelihoods is empty, expected one for each feature")
        if w is not None and w.shape != (len(self.likelihoods),):
            raise ValueError(f"w has shape {tuple(w.shape)}, expected ({len(self.likelihoods)},), one scale for each likelihood")
        if w is not None and not w.is_meta and not bool(((w > 0) & w.isfinite()).all()):
            raise ValueError(f"w is {w.tolist()}, expected positive finite scales")
        self.sizes = [likelihood.n_outputs for likelihood in likelihoods]  # outputs of each head, in order
        most = max((part.classes for part in likelihoods if isinstance(part, Categorical)), default=0)
        groups: dict[Likelihood, list[int]] = {}
        for i, part in enumerate(likelihoods):
            groups.setdefault(Categorical(most) if isinstance(part, Categorical) else part, []).append(i)
        self._groups = [(part, len(members)) for part, members in groups.items()]
        features = torch.tensor([i for members in groups.values() for i in members])  # kind by kind
        total = sum(self.sizes)
        heads = list(torch.arange(total).split(self.sizes))
        self._padded = False
        for i, part in enumerate(likelihoods):
            if (
                isinstance(part, Categorical) and part.classes < most
            ):  # classes that do not exist have the logit -inf, put behind all outputs
                heads[i] = F.pad(heads[i], (0, most - part.classes), value=total)
                self._padded = True
        self.register_buffer("w", torch.ones(len(self.sizes)) if w is None else w.float())
        self.register_buffer("_features", features, persistent=False)
        self.register_buffer("_outputs", torch.cat([heads[i] for i in features]), persistent=False)
        self.register_buffer("_order", features.argsort(), persistent=False)  # and back
        kinds = [KINDS.index(type(part)) if type(part) in KINDS else -1 for part in likelihoods]
        self._known = -1 not in kinds  # to the compiled operator
        self.register_buffer("_kinds", torch.tensor(list(zip(kinds, self.sizes, strict=True))), persistent=False)

    def _by_kind(self, raw: Tensor) -> Iterator[tuple[Likelihood, Tensor, Tensor]]:
        """Each kind's likelihood, its raw outputs [..., features of that kind, n_outputs], and their w."""
        if self._padded:
            raw = F.pad(raw, (0, 1), value=-torch.inf)
        widths, counts = [n * part.n_outputs for part, n in self._groups], [n for _, n in self._groups]
        raws, ws = raw.index_select(-1, self._outputs).split(widths, -1), self.w[self._features].split(counts)
        for (part, n), r, w in zip(self._groups, raws, ws, strict=True):
            yield part, r.unflatten(-1, (n, part.n_outputs)), w

    def log_prob(self, raw: Tensor, x: Tensor, seen: Tensor | None = None) -> Tensor:
        """Log-likelihood of each feature, [..., K], of the dtype of raw and x together, float32 at least.

        On a CPU one compiled pass gives values and derivatives, of float32 and float64, computed in double precision; elsewhere, for other dtypes and for
        derivatives of torch.func it is plain torch.

        Args:
            raw: [..., sum(sizes)], all heads' outputs side by side.
            x: [..., K], or [B, K] for raw [..., B, sum(sizes)]; a class by its number from 0 on, which is cut to a whole one.
            seen: [B, K] like x, or None; where it is 0 the likelihood is 0, whatever x is there.

        Raises:
            RuntimeError: x has a value that its likelihood does not take, such as one below zero for a log-normal feature. Where plain torch or a GPU computes,
                such a value gives NaN instead, but for a class that does not exist (IndexError, or a RuntimeError of torch).
        """
        raw, x = wide(raw), wide(x)
        seen = self._like(x, seen)
        if self._known and x.dim() > 1 and x.shape[:-1] == raw.shape[-x.dim() : -1]:
            found = self._fused(raw, x, seen)
            if found is not None:
                return found
        return self.in_torch(raw, x, seen)

    def _fused(self, raw: Tensor, x: Tensor, seen: Tensor | None) -> Tensor | None:
        if torch.compiler.is_compiling():
            return fused.log_prob(raw, x, seen, self._kinds, self.w, self.in_torch)
        try:
            return fused.log_prob(raw, x, seen, self._kinds, self.w, self.in_torch)
        except RuntimeError as error:
            _, _, said = str(error).partition("mmfast::log_prob: ")  # before it stands where in the compiled code
            raise (RuntimeError(said) if said else error) from None

    def check_rows(self, x: Tensor, seen: Tensor) -> None:
        """Raises where x and seen are not what a model of these features takes: float tensors [rows, K], seen bool or of any kind of number."""
        k = len(self.sizes)
        for name, given in (("x", x), ("seen", seen)):
            if not isinstance(given, Tensor):
                raise TypeError(f"{name} is a {type(given).__name__}, expected a tensor [rows, {k}]")
        if x.dim() != 2 or x.shape[1] != k:
            raise ValueError(f"x has shape {tuple(x.shape)}, expected (rows, {k}): a column for each likelihood")
        if seen.shape != x.shape:
            raise ValueError(f"seen has shape {tuple(seen.shape)}, expected {tuple(x.shape)} as x")
        if not x.is_floating_point():
            raise TypeError(f"x is {x.dtype}, expected floating-point numbers")

    def _like(self, x: Tensor, seen: Tensor | None) -> Tensor | None:
        """seen, for each cell of x."""
        if seen is None or seen.shape == x.shape:
            return seen
        try:
            return seen.expand_as(x)
        except RuntimeError:
            raise ValueError(f"seen has shape {tuple(seen.shape)}, expected {tuple(x.shape)} as x, or what broadcasts to it") from None

    def in_torch(self, raw: Tensor, x: Tensor, seen: Tensor | None = None) -> Tensor:
        """`log_prob` in plain torch."""
        raw, x = wide(raw), wide(x)
        if seen is not None:
            x = torch.where(seen != 0, x, 0)  # a value of every kind
        xs = x.expand(*raw.shape[:-1], -1).index_select(-1, self._features).split([n for _, n in self._groups], -1)
        parts = [part.log_prob(r, x_part, w) for (part, r, w), x_part in zip(self._by_kind(raw), xs, strict=True)]
        out = torch.cat(parts, -1).index_select(-1, self._order)
        return out if seen is None else torch.where(seen != 0, out, 0)

    def predict(self, raw: Tensor) -> Tensor:
        """Point predictions [..., K], in original units, in float32 at least."""
        return torch.cat([part.predict(r, w) for part, r, w in self._by_kind(wide(raw))], -1).index_select(-1, self._order)
