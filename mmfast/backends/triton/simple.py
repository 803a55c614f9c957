"""Sum, Mean, Constant, Random in Triton; mirrors mmfast/resolvers/simple.py. numbers: the precision, then the rule's own."""

import triton.language as tl

from mmfast.backends.triton.problem import load, number, parameters, problem_of, store
from mmfast.backends.triton.random import uniform
from mmfast.backends.triton.rows import kernel


@kernel
def fixed(
    G_ptr, mask_ptr, rng_ptr, numbers, w_ptr, mask_stride: tl.int64, problems: tl.int64, K: tl.constexpr, P: tl.constexpr, HAS_MASK: tl.constexpr,
    NORM: tl.constexpr, MEAN: tl.constexpr, CONSTANT: tl.constexpr,
):  # fmt: skip
    """Weights that do not depend on the Gramian: 1, 1 / (number present), or K numbers given."""
    idx = tl.arange(0, P)
    G, active, rows, _ = load(G_ptr, mask_ptr, numbers, mask_stride, problems, K, P, HAS_MASK, NORM, False)
    w = tl.where(active, 1.0, 0.0).to(tl.float64)
    if MEAN:
        w = w / number(active)
    if CONSTANT:
        w = parameters(numbers, 1, idx, K)
    store(w_ptr, w, G, active, rows, numbers, K, P, NORM, False)


@kernel
def random(
    G_ptr, mask_ptr, rng_ptr, numbers, w_ptr, mask_stride: tl.int64, problems: tl.int64, K: tl.constexpr, P: tl.constexpr, HAS_MASK: tl.constexpr,
    NORM: tl.constexpr
):  # fmt: skip
    """The softmax of standard normal draws (Box and Muller, from the uniforms 2 i and 2 i + 1)."""
    idx = tl.arange(0, P)
    G, active, rows, _ = load(G_ptr, mask_ptr, numbers, mask_stride, problems, K, P, HAS_MASK, NORM, False)
    problem = problem_of(problems, NORM)
    u, v = uniform(rng_ptr, problem, 2 * idx), uniform(rng_ptr, problem, 2 * idx + 1)
    e = tl.where(active, tl.exp(tl.sqrt(-2.0 * tl.log(u)) * tl.cos(6.283185307179586 * v)), 0.0)
    total = tl.sum(e, axis=0)
    store(w_ptr, e / tl.where(total > 0.0, total, 1.0), G, active, rows, numbers, K, P, NORM, False)
