"""mmfast: impartial multimodal training, in one fused pass over the shared representation."""

from mmfast import resolvers
from mmfast.ops import backends, combine, gram, resolve, weights
from mmfast.resolvers import *

__version__ = "0.1.0"
__all__ = ["backends", "combine", "gram", "resolve", "weights", *resolvers.__all__]  # noqa: PLE0604
