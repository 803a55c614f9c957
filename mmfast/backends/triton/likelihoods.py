"""Log-likelihoods of heterogeneous features and their derivatives in one launch: a program takes one feature of a block of rows. The formulas are those of
csrc/cpu/likelihoods.h; float32 is computed in float32, but for log Gamma and its derivative, which cancel."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfast.backends.triton.rows import current, kernel

BLOCK = 128  # rows of a program
TINY = tl.constexpr(1e-15)
HALF_LOG_2PI = tl.constexpr(0.9189385332046728)


@triton.jit
def _log1p(u):
    """log(1 + u) for u from 0 to 1."""
    w = 1 + u
    return tl.log(w) + (u - (w - 1)) / w


@triton.jit
def _softplus(x):
    """(log(1 + e^x), its derivative)"""
    e = tl.exp(-tl.abs(x))
    inverse = 1 / (1 + e)
    return tl.where(x < 0, 0.0, x) + _log1p(e), tl.where(x > 0, inverse, e * inverse)


@triton.jit
def _positive(raw):
    """torch's softplus, above 20 the number itself, and what keeps it off zero; its derivative."""
    value, slope = _softplus(raw)
    return tl.where(raw > 20, raw, value) + TINY, tl.where(raw > 20, 1.0, slope)


@triton.jit
def _shifted(x):
    """(product of x .. x + 9, sum of the reciprocals, x + 10), or (1, 0, x) from 10 on; float64."""
    small = x < 10
    y = tl.where(small, x, 1.0)
    product, slope = y, y * 0 + 1
    for i in tl.static_range(1, 10):
        slope = slope * (y + i) + product
        product = product * (y + i)
    return tl.where(small, product, 1.0), tl.where(small, slope / product, 0.0), tl.where(small, x + 10, x)


@triton.jit
def _lgamma(x):
    product, _, z = _shifted(x.to(tl.float64))
    r = 1 / z
    q = r * r
    series = r * (1 / 12 + q * (-1 / 360 + q * (1 / 1260 + q * (-1 / 1680 + q * (1 / 1188 + q * (-691 / 360360 + q * (1 / 156)))))))
    return ((z - 0.5) * tl.log(z) - z + HALF_LOG_2PI + series - tl.log(product)).to(x.dtype)


@triton.jit
def _digamma(x):
    _, reciprocals, z = _shifted(x.to(tl.float64))
    r = 1 / z
    q = r * r
    series = q * (1 / 12 + q * (-1 / 120 + q * (1 / 252 + q * (-1 / 240 + q * (1 / 132 + q * (-691 / 32760 + q * (1 / 12)))))))
    return (tl.log(z) - 0.5 * r - series - reciprocals).to(x.dtype)


@triton.jit
def _expm1_of_minus(s):
    """1 - e^-s for s > 0, by its series where the difference would cancel."""
    series = s * (
        1
        - s
        / 2
        * (
            1
            - s
            / 3
            * (1 - s / 4 * (1 - s / 5 * (1 - s / 6 * (1 - s / 7 * (1 - s / 8 * (1 - s / 9 * (1 - s / 10 * (1 - s / 11 * (1 - s / 12)))))))))
        )
    )
    return tl.where(s < 0.25, series, 1 - tl.exp(-s))


@triton.jit
def _is_class(x, j):
    return (x < j + 1) & tl.where(j == 0, x > -1, x >= j)


@kernel
def log_prob_kernel(
    raw, x, seen, features, w, out, slopes, rows: tl.int64, x_rows: tl.int64, outputs: tl.int64, count: tl.int64, SEEN: tl.constexpr,
    SLOPES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[row, k], and slopes[row, its outputs], of feature k = program_id(1); a value that its likelihood does not take gives NaN."""
    k = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = row < rows
    first = k * 0
    for j in range(k):
        first += tl.load(features + 2 * j + 1)
    kind, n = tl.load(features + 2 * k), tl.load(features + 2 * k + 1)
    second = row * 0 + n > 1  # whether there is a second output; the interpreter wants a mask of its own
    cell = row % x_rows * count + k
    visible = there
    if SEEN:
        visible = there & (tl.load(seen + cell, mask=there, other=0) != 0)
    v = tl.load(x + cell, mask=visible, other=0)
    scale = tl.load(w + k).to(v.dtype)
    at, to = raw + row * outputs + first, slopes + row * outputs + first
    a = tl.load(at, mask=visible, other=0)
    b = tl.load(at + 1, mask=visible & second, other=0)
    y, da, db = v * 0, v * 0, v * 0
    if (kind == 5) | (kind == 6):
        outside = ((v > -1) & (v < n)) == 0
    else:
        outside = ((kind > 0) & (v < 0)) | ((kind == 4) & (v > 1)) | ((kind == 7) & (tl.floor(v) != v))
    refused = tl.where(outside, float("nan"), 0.0)  # added to whatever is made of such a value
    if kind <= 1:  # normal, log-normal
        if kind == 1:
            v = scale * tl.log(tl.where(v < 1e-20, 1e-20, v))
        else:
            v = scale * v
        half, slope = _positive(b)
        precision = 2 * half
        mean = a / precision
        away = v - mean
        y = 0.5 * (tl.log(precision) - precision * away * away) - HALF_LOG_2PI
        if kind == 1:
            y -= v
        da, db = away, (1 / precision - away * (v + mean)) * slope
    elif kind == 2:  # gamma
        v = scale * v
        v = tl.where(v < 1e-20, 1e-20, v)
        shape, slope_of_shape = _positive(a)
        rate, slope_of_rate = _positive(b)
        log_rate, log_x = tl.log(rate), tl.log(v)
        y = shape * log_rate + (shape - 1) * log_x - rate * v - _lgamma(shape)
        da, db = (log_rate + log_x - _digamma(shape)) * slope_of_shape, (shape / rate - v) * slope_of_rate
    elif kind == 3:  # exponential
        v = scale * v
        rate, slope = _positive(a)
        y = tl.log(rate) - rate * v
        da = (1 / rate - v) * slope
    elif kind == 4:  # Bernoulli
        value, slope = _positive(a)
        y = v * a - (value - TINY)
        da = v - slope
    elif kind == 7:  # Poisson
        log_rate = tl.where(a < -13.815510557964274, -13.815510557964274, tl.where(a > 46.051701859880914, 46.051701859880914, a))
        rate = tl.exp(log_rate)
        y = v * log_rate - rate - _lgamma(v + 1)
        da = tl.where((a >= -13.815510557964274) & (a <= 46.051701859880914), v - rate, log_rate * 0)
    elif kind == 5:  # categorical
        largest, chosen = a, a
        for j in range(1, n):
            logit = tl.load(at + j, mask=visible, other=0)
            largest = tl.where(largest < logit, logit, largest)
            chosen = tl.where(_is_class(v, j), logit, chosen)
        total = v * 0
        for j in range(n):
            total += tl.exp(tl.load(at + j, mask=visible, other=0) - largest)
        y = (chosen - largest) - tl.log(total)
        if SLOPES:
            for j in range(n):
                share = tl.exp(tl.load(at + j, mask=visible, other=0) - largest) / total
                tl.store(to + j, tl.where(visible, tl.where(_is_class(v, j), 1.0, 0.0) - share + refused, 0.0), mask=there)
    else:  # ordinal
        cut, above, below, step = b - a, v * 0, v * 0, v * 0 + 1
        for j in range(n - 1):
            if j > 0:
                length, _ = _positive(tl.load(at + j + 1, mask=visible, other=0))
                cut += length
                step = tl.where(_is_class(v, j), length, step)
            above = tl.where(_is_class(v, j), cut, above)
            below = tl.where(_is_class(v, j + 1), cut, below)
        lowest, highest = _is_class(v, 0), _is_class(v, n - 1)
        over, d_above = _softplus(-above)
        under, d_below = _softplus(below)
        between = _expm1_of_minus(step)
        inside = (lowest | highest) == 0
        y = tl.where(highest, 0.0, -over) + tl.where(lowest, 0.0, -under) + tl.where(inside, tl.log(between), 0.0)
        d_above, d_below = tl.where(highest, 0.0, d_above), tl.where(lowest, 0.0, -d_below)
        d_step = tl.where(inside, tl.exp(-step) / between, 0.0)
        da, db = -(d_above + d_below), d_above + d_below
        if SLOPES:
            for j in range(1, n - 1):
                _, slope = _positive(tl.load(at + j + 1, mask=visible, other=0))
                change = tl.where(_is_class(v, j), d_above + d_step, 0.0)
                change = tl.where(v >= j + 1, d_above + d_below, change)
                tl.store(to + j + 1, tl.where(visible, change * slope + refused, 0.0), mask=there)
    tl.store(out + row * count + k, tl.where(visible, y + refused, 0.0), mask=there)
    if SLOPES & (kind != 5):
        tl.store(to, tl.where(visible, da + refused, 0.0), mask=there)
        tl.store(to + 1, tl.where(visible, db + refused, 0.0), mask=there & second)


@kernel
def log_prob_backward_kernel(grad, slopes, features, out, rows: tl.int64, outputs: tl.int64, count: tl.int64, BLOCK: tl.constexpr):
    """out = slopes times what comes back to their feature, k = program_id(1)."""
    k = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = row < rows
    first = k * 0
    for j in range(k):
        first += tl.load(features + 2 * j + 1)
    back = tl.load(grad + row * count + k, mask=there, other=0)
    at = row * outputs + first
    for j in range(tl.load(features + 2 * k + 1)):
        tl.store(out + at + j, back * tl.load(slopes + at + j, mask=there, other=0), mask=there)


def _log_prob(raw: Tensor, x: Tensor, seen: Tensor | None, features: Tensor, w: Tensor, slopes: bool) -> tuple[Tensor, Tensor]:
    """As the operator `mmfast::log_prob`; a value that its likelihood does not take gives NaN, for a kernel can't raise."""
    raw, x, w = raw.contiguous(), x.contiguous(), w.contiguous()
    seen = None if seen is None else seen.contiguous()
    count, outputs = len(features), raw.shape[-1]
    out, beside = raw.new_empty((*raw.shape[:-1], count)), raw.new_empty(raw.shape if slopes else (0,))
    rows = raw.numel() // outputs
    if rows:
        with current(raw.device):
            log_prob_kernel[(triton.cdiv(rows, BLOCK), count)](
                raw, x, x if seen is None else seen, features, w, out, beside, rows, len(x), outputs, count, SEEN=seen is not None,
                SLOPES=slopes, BLOCK=BLOCK, enable_fp_fusion=False,
            )  # fmt: skip
    return out, beside


def _log_prob_backward(grad: Tensor, slopes: Tensor, features: Tensor) -> Tensor:
    """As the operator `mmfast::log_prob_backward`."""
    grad, slopes = grad.contiguous(), slopes.contiguous()
    out = torch.empty_like(slopes)
    rows = slopes.numel() // slopes.shape[-1]
    if rows:
        with current(slopes.device):
            log_prob_backward_kernel[(triton.cdiv(rows, BLOCK), len(features))](
                grad, slopes, features, out, rows, slopes.shape[-1], len(features), BLOCK=BLOCK, enable_fp_fusion=False
            )
    return out


def _empty(raw: Tensor, x: Tensor, seen: Tensor | None, features: Tensor, w: Tensor, slopes: bool) -> tuple[Tensor, Tensor]:
    return raw.new_empty((*raw.shape[:-1], len(features))), raw.new_empty(raw.shape if slopes else (0,))


# what torch.compile sees; plain calls go past the dispatcher
_operator = torch.library.custom_op("mmfast::triton_log_prob", _log_prob, mutates_args=())
_operator.register_fake(_empty)
_backward_operator = torch.library.custom_op("mmfast::triton_log_prob_backward", _log_prob_backward, mutates_args=())
_backward_operator.register_fake(lambda grad, slopes, features: torch.empty_like(slopes))


def log_prob(raw: Tensor, x: Tensor, seen: Tensor | None, features: Tensor, w: Tensor, slopes: bool) -> tuple[Tensor, Tensor]:
    """As the operator `mmfast::log_prob`; a value that its likelihood does not take gives NaN, for a kernel can't raise."""
    return (_operator if torch.compiler.is_compiling() else _log_prob)(raw, x, seen, features, w, slopes)


def log_prob_backward(grad: Tensor, slopes: Tensor, features: Tensor) -> Tensor:
    """As the operator `mmfast::log_prob_backward`."""
    return (_backward_operator if torch.compiler.is_compiling() else _log_prob_backward)(grad, slopes, features)
