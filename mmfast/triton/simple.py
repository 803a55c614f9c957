"""Sum, Mean, Constant, Random in Triton; mirrors mmfast/resolvers/simple.py. params: the precision, then the rule's own."""

import triton
import triton.language as tl

from mmfast.triton.problem import load, number, store
from mmfast.triton.random import uniform


@triton.jit(do_not_specialize=["mask_stride"])
def fixed(
    G_ptr, mask_ptr, rng_ptr, params_ptr, w_ptr, mask_stride, K: tl.constexpr, P: tl.constexpr, HAS_MASK: tl.constexpr, PRESERVE_NORM: tl.constexpr,
    MEAN: tl.constexpr, CONSTANT: tl.constexpr,
):  # fmt: skip
    """Weights that do not depend on the Gramian: 1, 1 / (number present), or K numbers given."""
    idx = tl.arange(0, P)
    G, active, rows, _ = load(G_ptr, mask_ptr, K, mask_stride, P, HAS_MASK)
    w = tl.where(active, 1.0, 0.0).to(tl.float64)
    if MEAN:
        w = w / number(active)
    if CONSTANT:
        w = tl.load(params_ptr + 1 + idx, mask=idx < K, other=0.0)
    store(w_ptr, w, G, active, rows, tl.load(params_ptr), K, P, PRESERVE_NORM)


@triton.jit(do_not_specialize=["mask_stride"])
def random(
    G_ptr, mask_ptr, rng_ptr, params_ptr, w_ptr, mask_stride, K: tl.constexpr, P: tl.constexpr, HAS_MASK: tl.constexpr, PRESERVE_NORM: tl.constexpr
):  # fmt: skip
    """The softmax of standard normal draws (Box and Muller, from the uniforms 2 i and 2 i + 1)."""
    idx = tl.arange(0, P)
    G, active, rows, _ = load(G_ptr, mask_ptr, K, mask_stride, P, HAS_MASK)
    u, v = uniform(rng_ptr, 2 * idx), uniform(rng_ptr, 2 * idx + 1)
    e = tl.where(active, tl.exp(tl.sqrt(-2.0 * tl.log(u)) * tl.cos(6.283185307179586 * v)), 0.0)
    total = tl.sum(e, axis=0)
    store(w_ptr, e / tl.where(total > 0.0, total, 1.0), G, active, rows, tl.load(params_ptr), K, P, PRESERVE_NORM)
