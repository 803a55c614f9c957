"""The compiled CPU kernels. Small plain calls go past the dispatcher, see direct.py."""

import ctypes

from mmfast.backends import compiled, library

gram, combine, lengths = compiled.gram, compiled.combine, compiled.lengths
weights, resolve = compiled.weights, compiled.resolve
graddrop, trimmed_mean, heads = compiled.graddrop, compiled.trimmed_mean, compiled.heads


def why_not() -> str | None:
    """Why the compiled CPU kernels can't run here, or None when they can."""
    return library.missing_reason


def isa() -> str | None:
    """The instruction set that they run here, or None without them."""
    if not library.available:
        return None
    name = ctypes.CDLL(str(library.PATH)).mmfast_cpu_isa
    name.restype = ctypes.c_char_p
    return name().decode()
