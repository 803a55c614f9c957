"""What the losses keep between calls: sums, counts and constants, for which 16 bits are too few (a count in bfloat16 ends at 256)."""

from typing import Any

import torch
from torch import nn


def wide_dtype() -> torch.dtype:
    """The default dtype, float32 at least."""
    return torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32


class Keeping(nn.Module):
    """Its floating-point buffers stay what they are in a model that goes over to 16 bits."""

    def _apply(self, fn: Any, recurse: bool = True) -> "Keeping":
        kept = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, value in kept.items():
            new = self._buffers[name]
            if value is not None and new is not None and new.is_floating_point() and new.element_size() < 4:
                self._buffers[name] = torch.empty_like(value, device=new.device) if value.is_meta else value.to(new.device)
        return self
