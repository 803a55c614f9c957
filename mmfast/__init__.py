"""mmfast: impartial multimodal training, in one fused pass over the shared representation."""

from mmfast import resolvers, stats
from mmfast.block import ImpartialityBlock, fork
from mmfast.explain import explain
from mmfast.heads import LinearHeads
from mmfast.ops import backends, combine, gram, resolve, weights
from mmfast.resolvers import *
from mmfast.scaling import DimRatio, LipschitzScale, StandardScale

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
