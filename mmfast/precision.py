"""Where 16 bits are too few: densities, whose sums a bound takes the exponential of, and what is kept between calls (a count in bfloat16 ends at 256)."""

from typing import Any

import torch
from torch import Tensor, nn

LOW = (torch.float16, torch.bfloat16)


def wide(x: Tensor) -> Tensor:
    """x in float32 at least."""
    return x.float() if x.dtype in LOW else x


def wide_dtype() -> torch.dtype:
    """The default dtype, float32 at least."""
    return torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32


class Keeping(nn.Module):
    """Its buffers keep their dtype in a model that goes over to 16 bits; with `always` whatever it goes over to."""

    always = False

    def _apply(self, fn: Any, recurse: bool = True) -> "Keeping":
        kept = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, value in kept.items():
            new = self._buffers[name]
            if value is not None and new is not None and (self.always or new.dtype in LOW):
                self._buffers[name] = torch.empty_like(value, device=new.device) if value.is_meta else value.to(new.device)
        return self
