"""mmfast: impartial multimodal training, in one fused pass over the shared representation."""

from mmfast.ops import backends, combine, gram, resolve, weights
from mmfast.resolvers.base import Resolver

__version__ = "0.1.0"
