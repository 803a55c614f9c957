"""More gradients than a kernel takes, by the kernels of any backend: no gradient is copied.

The Gramian comes in blocks: that of the rows of two groups holds the products between them. Groups are of at most 128 rows, so that two of them fit a kernel.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mmfast import contract
from mmfast.backends import cpu, reference
from mmfast.resolvers.chain import Bound

_FEW = 16  # rows of 16-bit numbers that are widened at once


def _parts(k: int, most: int) -> list[slice]:
    """0..k-1 in parts of nearly one size, of at most `most`."""
    count = -(-k // most)
    return [slice(k * i // count, k * (i + 1) // count) for i in range(count)]


class Tiles:
    """The functions of a backend for more than contract.MAX_GRADS gradients."""

    def __init__(self, functions: Any) -> None:
        self.functions = functions

    def gram(self, grads: Sequence[Tensor], missing: Sequence[int], mask: Tensor | None, per: str) -> Tensor:
        k = len(grads) + len(missing)
        mask = reference.mask_of_present(mask, missing, k)
        parts = _parts(len(grads), contract.MAX_GRADS // 2)
        if len(parts) == 1:
            G = self.functions.gram(grads, [], mask, per)
        else:
            blocks: list[list[Any]] = [[None] * len(parts) for _ in parts]
            for i, first in enumerate(parts):
                for j in range(i + 1, len(parts)):
                    second = parts[j]
                    both = None if mask is None else torch.cat([mask[..., first], mask[..., second]], -1)
                    tile = self.functions.gram([*grads[first], *grads[second]], [], both, per)
                    n = first.stop - first.start
                    blocks[i][i], blocks[j][j] = tile[..., :n, :n], tile[..., n:, n:]
                    blocks[i][j], blocks[j][i] = tile[..., :n, n:], tile[..., n:, :n]
            G = torch.cat([torch.cat(row, -1) for row in blocks], -2)
        return reference.pad_missing(reference.pad_missing(G, missing, k), missing, k, -2)

    def combine(self, grads: Sequence[Tensor], missing: Sequence[int], mask: Tensor | None, w: Tensor, per: str) -> Tensor:
        wide, dtype = reference.wide(grads[0]), grads[0].dtype
        total: Tensor | None = None
        for rows, m, weights in self._groups(grads, missing, mask, w, contract.MAX_GRADS if dtype == wide else _FEW):
            part = self.functions.combine([g.to(wide) for g in rows], [], m, weights, per)
            total = part if total is None else total.add_(part)
        assert total is not None
        return total.to(dtype)

    def lengths(self, grads: Sequence[Tensor], missing: Sequence[int], mask: Tensor | None, w: Tensor, per: str) -> tuple[Tensor, Tensor]:
        plain: Any = 0.0
        ours: Any = 0.0
        for rows, m, weights in self._groups(grads, missing, mask, w, _FEW):
            parts = reference.sums(rows, m, weights, per)
            plain, ours = plain + parts[0], ours + parts[1]
        return reference.squared(plain, ours, per)

    def weights(self, G: Tensor, mask: Tensor | None, bound: Bound, preserve_norm: bool, precision: float) -> Tensor:
        """By the CPU's compiled solvers, which take as many rows; elsewhere in plain torch."""
        module = cpu if self.functions is cpu else reference
        return module.weights(G, mask, bound, preserve_norm, precision)

    def _groups(
        self, grads: Sequence[Tensor], missing: Sequence[int], mask: Tensor | None, w: Tensor, most: int
    ) -> Iterator[tuple[Sequence[Tensor], Tensor | None, Tensor]]:
        """(gradients, their mask, their weights) of each group."""
        k = len(grads) + len(missing)
        mask, w = reference.mask_of_present(mask, missing, k), reference.select_present(w, missing, k)
        for part in _parts(len(grads), most):
            yield grads[part], None if mask is None else mask[..., part].contiguous(), w[..., part].contiguous()
