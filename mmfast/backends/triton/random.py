"""The draws of mmfast/resolvers/philox.py in Triton: of a chain of one rule."""

import triton
import triton.language as tl


@triton.jit
def bits(rng_ptr, problem, place):
    """The first two 32-bit words of the draw at each place, as uint32."""
    # the seed and the counter are broadcast first: the interpreter takes a wrap-around of scalars for an error
    zero = place * 0
    seed = (tl.load(rng_ptr) + zero).to(tl.uint64)
    call = ((tl.load(rng_ptr + 1) & 0xFFFFFFFF) + zero).to(tl.uint32)
    v0, v1, _, _ = tl.philox_impl(
        place.to(tl.uint32),
        (problem + zero).to(tl.uint32),
        zero.to(tl.uint32),
        call,
        (seed & 0xFFFFFFFF).to(tl.uint32),
        (seed >> 32).to(tl.uint32),
    )
    return v0, v1


@triton.jit
def uniform(rng_ptr, problem, place):
    """A float64 in the open interval (0, 1) for each place."""
    v0, v1 = bits(rng_ptr, problem, place)
    return (((v0.to(tl.int64) << 20) ^ (v1 >> 12).to(tl.int64)).to(tl.float64) + 0.5) * 2.220446049250313e-16
