"""Rules that decide element by element and so need the gradients themselves: GradDrop, TrimmedMean. Mirrors csrc/cpu/elementwise.h."""

from collections.abc import Sequence
from typing import Any, NoReturn, cast

import torch
from torch import Tensor

from mmfast.resolvers.base import Resolver, kept_by_apply, new_stream, on_device
from mmfast.resolvers.philox import philox


class ElementwiseRule(Resolver):
    """A resolver of gradients, not of Gramians."""

    def combine(self, grads: list[Tensor], mask: Tensor | None) -> Tensor:
        """Plain torch: the result for gradients [..., N] of one shape; mask [K] or [B, K] bool or None. The compiled operator's reference."""
        raise NotImplementedError

    def through(self, functions: Any, grads: Sequence[Tensor], missing: Sequence[int], mask: Tensor | None) -> Tensor:
        """The same through the functions of a backend (mmfast.backends), with the random stream moved on."""
        raise NotImplementedError

    def forward(self, G: Tensor, mask: Tensor | None = None) -> NoReturn:
        raise TypeError(f"{type(self).__name__} works on gradients element by element, not on a Gramian; use mf.resolve or mf.fork")


def _stack(grads: list[Tensor], mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients [K, B, M] in accumulator precision and who takes part [K, B, 1]; masked entries are zero."""
    first = grads[0]
    batch = first.shape[0] if first.dim() else 1
    accumulator = torch.float64 if first.dtype == torch.float64 else torch.float32
    x = torch.stack([g.reshape(batch, first.numel() // max(batch, 1)) for g in grads]).to(accumulator)
    present = torch.ones(len(grads), batch, 1, dtype=torch.bool, device=first.device)
    if mask is not None:
        present = (mask.T if mask.dim() == 2 else mask.unsqueeze(-1)).unsqueeze(-1).expand(len(grads), batch, 1)
    return torch.where(present, x, 0), present


class GradDrop(ElementwiseRule):
    """Keeps, at each element, the gradients of one sign, drawn by the purity of the signs (Chen et al., "Just pick a sign", NeurIPS 2020).

    With P = (1 + sum g / sum |g|) / 2 and U uniform on (0, 1), positive entries pass where P > U and negative ones where P < U;
    entries that do not pass are multiplied by `leak`. The draws depend on the seed and counter in `rng` and on the element's place alone.

    Args:
        leak: share of a dropped entry that is let through, from 0 to 1: one number, or one for each of K gradients.
    """

    def __init__(self, leak: float | Sequence[float] = 0.0) -> None:
        super().__init__()
        self.leak = float(leak) if isinstance(leak, (int, float)) else tuple(float(share) for share in leak)
        if not self.leaks or not all(0.0 <= share <= 1.0 for share in self.leaks):
            raise ValueError(f"leak is {leak}, expected a number from 0 to 1, or one for each gradient")
        self.rng: Tensor
        self.register_buffer("rng", new_stream())

    @property
    def leaks(self) -> list[float]:
        """As the operators take it."""
        return [float(self.leak)] if isinstance(self.leak, (int, float)) else [float(share) for share in self.leak]

    def check(self, k: int) -> None:
        if isinstance(self.leak, tuple) and len(self.leak) != k:
            raise ValueError(f"leak has {len(self.leak)} numbers, expected {k}, one per gradient")

    def _uniforms(self, n: int, first: Tensor | int) -> Tensor:
        """23-bit uniforms of n elements from the first on: element e takes word (e % 64) / 16 of the Philox block at place (e / 64) * 16 + e % 16."""
        e = torch.arange(n, device=self.rng.device) + first
        place = (e // 64) * 16 + e % 16
        words = torch.stack(
            philox(self.rng[0], place & 0xFFFFFFFF, place >> 32, torch.zeros_like(place), (self.rng[1] & 0xFFFFFFFF).expand_as(place))
        )
        return ((words.gather(0, (e % 64 // 16).unsqueeze(0))[0] >> 9).float() + 0.5) * 2.0**-23

    def combine(self, grads: list[Tensor], mask: Tensor | None, missing: Sequence[int] = (), first: Tensor | int = 0) -> Tensor:
        """`first` is the place of the first element, where these are a part of the gradients."""
        x, _ = _stack(grads, mask)
        k = len(grads) + len(missing)
        leaks = self.leaks * k if len(self.leaks) == 1 else self.leaks
        leaks = [share for i, share in enumerate(leaks) if i not in missing]
        total, size = torch.zeros_like(x[0]), torch.zeros_like(x[0])
        for row in x:  # in order: the comparison with U must see the very bits of the compiled operator
            total, size = total + row, size + row.abs()
        purity = 0.5 * (1 + total / size)
        u = self._uniforms(total.numel(), first).view(total.shape).to(total.dtype)
        kept = torch.zeros_like(total)
        for row, share in zip(x, leaks, strict=True):
            leak = torch.full_like(total, share)  # a number beside a number would be one of float32
            kept = kept + torch.where(torch.where(row > 0, purity > u, purity < u), 1.0, leak) * row
        return (kept + 0 * size).to(grads[0].dtype).view(grads[0].shape)

    def stream(self, device: torch.device) -> Tensor:
        """Seed and counter, on the device."""
        rng = cast(Tensor, self._buffers["rng"])
        if rng.device != device:
            self.rng = rng = on_device(rng, device)
        return rng

    def through(self, functions: Any, grads: Sequence[Tensor], missing: Sequence[int], mask: Tensor | None) -> Tensor:
        return functions.graddrop(grads, missing, mask, self)

    def reset(self) -> None:
        self.rng[1] = 0

    def reset_parameters(self) -> None:
        """A seed drawn anew, as of every `Rule` that draws."""
        self.rng = on_device(self.rng.to("meta"), self.rng.device)

    def _apply(self, fn, recurse=True):
        rng = self.rng
        super()._apply(fn, recurse)
        self.rng = cast(Tensor, kept_by_apply(rng, self.rng))
        return self

    def extra_repr(self) -> str:
        return f"leak={self.leak}"


class TrimmedMean(ElementwiseRule):
    """Mean of each element after its `trim` smallest and `trim` largest values are left out (Yin et al., "Byzantine-robust distributed learning", ICML 2018).

    A missing row takes no part; where fewer than 2 trim + 1 rows remain, as many are left out as leave one or two.

    Args:
        trim: number of values left out on each side, at least 0; K must be larger than 2 trim.
    """

    def __init__(self, trim: int) -> None:
        super().__init__()
        if int(trim) != trim or trim < 0:
            raise ValueError(f"trim is {trim}, expected a whole number of at least 0")
        self.trim = int(trim)

    def check(self, k: int) -> None:
        if k <= 2 * self.trim:
            raise ValueError(f"trim is {self.trim}, which leaves none of {k} gradients; expected less than {k / 2:g}")

    def combine(self, grads: list[Tensor], mask: Tensor | None) -> Tensor:
        x, present = _stack(grads, mask)
        present = present & (x != 0).flatten(1).any(1).view(-1, 1, 1)
        count = present.sum(0)
        ordered = torch.where(present, x, torch.inf).sort(0).values
        trim = torch.minimum(torch.full_like(count, self.trim), (count - 1).div(2, rounding_mode="floor")).clamp(min=0)
        place = torch.arange(len(grads), device=x.device).view(-1, 1, 1)
        kept = (place >= trim) & (place < count - trim)
        mean = torch.where(kept, ordered, 0).sum(0) / (count - 2 * trim).clamp(min=1)
        return (mean + (0 * x).sum(0)).to(grads[0].dtype).view(grads[0].shape)

    def through(self, functions: Any, grads: Sequence[Tensor], missing: Sequence[int], mask: Tensor | None) -> Tensor:
        return functions.trimmed_mean(grads, missing, mask, self)

    def extra_repr(self) -> str:
        return f"trim={self.trim}"
