"""mmfast: impartial multimodal training, in one fused pass over the shared representation."""

from mmfast.ops import backends, combine, gram, resolve, weights
from mmfast.resolvers import *  # noqa: F403  (the rules: names in mmfast.resolvers.__all__)
from mmfast.resolvers import __all__ as _rules

__version__ = "0.1.0"
__all__ = ["backends", "combine", "gram", "resolve", "weights", *_rules]
