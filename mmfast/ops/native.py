"""Loads the compiled extension, says why when it can't, and gives its operators their fakes."""

from pathlib import Path

import torch
from torch import Tensor

BUILD_LINE = "MMFAST_BUILD=cpu pip install --no-build-isolation -e ."


def _load() -> str | None:
    """Loads mmfast/_C.so; returns None, or the reason why it is not there."""
    path = Path(__file__).parent.parent / "_C.so"
    if not path.exists():
        return f"mmfast/_C.so was not built; build it with: {BUILD_LINE}"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"mmfast/_C.so does not load with torch {torch.__version__}: {error}; build it again with: {BUILD_LINE}"
    return None


missing_reason = _load()
available = missing_reason is None

if available:
    weights = torch.ops.mmfast.weights.default

    @torch.library.register_fake("mmfast::weights")
    def _(gram: Tensor, mask, steps, params, state, rng, preserve_norm):
        return gram.new_empty(gram.shape[:-1]), gram.new_empty((0,) if state is None else state.shape)
