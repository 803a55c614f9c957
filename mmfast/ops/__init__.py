"""The operators: gram, weights, combine, resolve, heads, explain, verify. No autograd here; the blocks are what joins them to it."""

from mmfast.ops.combine import combine as combine
from mmfast.ops.explain import Explanation as Explanation
from mmfast.ops.explain import explain as explain
from mmfast.ops.gram import gram as gram
from mmfast.ops.resolve import resolve as resolve
from mmfast.ops.resolve import resolve_info as resolve_info
from mmfast.ops.weights import weights as weights
