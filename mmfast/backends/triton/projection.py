"""PCGrad in Triton; mirrors mmfast/resolvers/projection.py. numbers: the precision, 1 for the mean in place of the sum, 1 for the fixed order."""

import triton.language as tl

from mmfast.backends.triton.problem import diagonal, entries, load, number, parameter, problem_of, store
from mmfast.backends.triton.random import bits
from mmfast.backends.triton.rows import kernel


@kernel
def pcgrad(
    G_ptr, mask_ptr, rng_ptr, numbers, w_ptr, mask_stride: tl.int64, problems: tl.int64, K: tl.constexpr, P: tl.constexpr, HAS_MASK: tl.constexpr,
    NORM: tl.constexpr, FIXED: tl.constexpr,
):  # fmt: skip
    idx = tl.arange(0, P)
    G, active, rows, half = load(G_ptr, mask_ptr, numbers, mask_stride, problems, K, P, HAS_MASK, NORM, False)
    never = 1 << 62
    # each row meets the others by ascending key: 256 * draw + j
    key = (idx[:, None] * 0 + idx[None, :]).to(tl.int64)
    if not FIXED:
        drawn, _ = bits(rng_ptr, problem_of(problems, NORM), 256 * idx[:, None] + idx[None, :])
        key += 256 * drawn.to(tl.int64)
    meets = active[:, None] & active[None, :] & (idx[:, None] != idx[None, :])
    key = tl.where(meets, key, never)
    squares = diagonal(G, idx)
    c = tl.where(idx[:, None] == idx[None, :], 1.0, 0.0).to(tl.float64)
    products = G  # of each projected row with all rows
    last = (idx * 0 - 1).to(tl.int64)
    for _ in range(K - 1):
        last = tl.min(tl.where(key > last[:, None], key, never), axis=1)
        met = key == last[:, None]
        taken = last < never
        met = met & taken[:, None]
        product = tl.sum(tl.where(met, products, 0.0), axis=1)
        square = tl.sum(tl.where(met, squares[None, :], 0.0), axis=1)
        t = tl.where(product < 0.0, -product / tl.where(taken, square, 1.0), 0.0)
        c += tl.where(met, t[:, None], 0.0)
        j = tl.where(taken, last & 255, 0)
        row = entries(G_ptr, j[:, None], idx[None, :], taken[:, None] & active[None, :], numbers, problems, K, NORM)
        products += t[:, None] * (half * row * half)
    w = tl.sum(tl.where(active[:, None], c, 0.0), axis=0)
    if parameter(numbers, 1) != 0.0:
        w = w / number(active)
    store(w_ptr, w, G, active, rows, numbers, K, P, NORM, False)
