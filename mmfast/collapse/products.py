"""The sum of x x' over rows x, however many come: matrix products in their own precision, totals in float64."""

import torch
from torch import Tensor

ROWS = 2048  # of one product: its rounding is that of so many float32 terms, and the addition to the total costs a tenth of it
_COLUMNS = 256  # of a panel: what lies below the panels on the diagonal is their mirror image, and not computed


class Products:
    """Streams rows [n, features] into their sum of outer products, float64 [features, features].

    Rows are kept until there are ROWS of them, so the result does not depend on how they came in batches, and neither does what a small batch costs.
    A block is brought to the size of one by a power of two, so that nothing over- or underflows. For float32 rows (and float16 and bfloat16, which
    become so) the error of an element is at most ROWS 2^-24 sqrt(S_ii S_jj), in practice 1e-7 to 1e-6 of that root, the more for rows of one sign; float64 rows are multiplied in float64.
    """

    def __init__(self) -> None:
        self.total: Tensor | None = None  # of whole blocks; right in the panels from the diagonal to the right
        self.buffer: Tensor | None = None
        self.filled = 0

    def add(self, rows: Tensor) -> None:
        """Takes [n, features] in; a copy."""
        rows = rows if rows.dtype == torch.float64 else rows.float()
        if self.buffer is None:
            self.buffer = rows.new_empty(ROWS, rows.shape[1])
        while len(rows):
            if not self.filled and len(rows) >= ROWS:
                self._multiply(rows[:ROWS])
                rows = rows[ROWS:]
                continue
            part = rows[: ROWS - self.filled]
            self.buffer[self.filled : self.filled + len(part)] = part
            self.filled += len(part)
            rows = rows[len(part) :]
            if self.filled == ROWS:
                self.flush()

    def waiting(self) -> Tensor:
        """The rows that are in no product yet."""
        assert self.buffer is not None
        return self.buffer[: self.filled]

    def flush(self) -> None:
        """Takes the waiting rows into the total."""
        if self.filled:
            self._multiply(self.waiting())
            self.filled = 0

    def add_product(self, W: Tensor, S: Tensor) -> None:
        """Takes W' S W in, of a sum S of outer products and a matrix of as many rows, both float64."""
        self._accumulate(W, S @ W, W.new_ones(()))

    def matrix(self) -> Tensor:
        """The sum so far, float64 [features, features], exactly symmetric; what this object keeps, not a copy."""
        self.flush()
        assert self.total is not None
        for i in range(0, len(self.total), _COLUMNS):
            end = i + _COLUMNS
            square = self.total[i:end, i:end]
            square.copy_(square.triu() + square.triu(1).mT)
            self.total[end:, i:end] = self.total[i:end, end:].mT
        return self.total

    def _multiply(self, block: Tensor) -> None:
        assert self.buffer is not None
        low, high = block.aminmax()
        exponent = torch.frexp(torch.maximum(-low, high)).exponent.clamp(-120, 120)  # powers of two that float32 has
        scaled = torch.mul(block, torch.ldexp(block.new_ones(()), -exponent), out=self.buffer[: len(block)])  # maybe in place
        self._accumulate(scaled, scaled, torch.ldexp(block.new_ones((), dtype=torch.float64), 2 * exponent))

    def _accumulate(self, x: Tensor, y: Tensor, scale: Tensor) -> None:
        """Adds scale x'y, which is symmetric."""
        if self.total is None:
            self.total = x.new_zeros(x.shape[1], y.shape[1], dtype=torch.float64)
        for i in range(0, x.shape[1], _COLUMNS):
            self.total[i : i + _COLUMNS, i:].addcmul_(x[:, i : i + _COLUMNS].mT @ y[:, i:], scale)
