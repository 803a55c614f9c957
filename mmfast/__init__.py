"""mmfast: impartial multimodal training, in one fused pass over the shared representation."""

import warnings

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # torch says so where NumPy is not installed; nothing here needs it
    import torch as _torch  # noqa: F401

from mmfast import resolvers, stats
from mmfast.backends.choice import backends
from mmfast.blocks.block import ImpartialityBlock
from mmfast.blocks.fork import fork
from mmfast.blocks.linear_heads import LinearHeads
from mmfast.blocks.scaling import DimRatio, LipschitzScale, StandardScale
from mmfast.ops import combine, explain, gram, resolve, weights
from mmfast.resolvers import *

__version__ = "0.1.0"
__all__ = [
    "DimRatio",
    "ImpartialityBlock",
    "LinearHeads",
    "LipschitzScale",
    "StandardScale",
    "backends",
    "combine",
    "explain",
    "fork",
    "gram",
    "resolve",
    "stats",
    "weights",
]
__all__ += resolvers.__all__
