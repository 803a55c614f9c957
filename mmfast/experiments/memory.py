"""keep_memory: what a training step frees stays with the process for the next one."""

import ctypes
import os
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's names of what mallopt sets
_KEPT = 1 << 30  # bytes that may lie free
_MAPPED = 1 << 25  # bytes from which on a tensor is memory of its own; glibc takes no more


def keep_memory() -> bool:
    """Makes glibc keep what is freed, for the process that trains; returns whether it does.

    By default much of a step's memory goes back to the system after it, and every page comes anew, zeroed, in the next: a fifth to a third of a step on a CPU. What
    the user's environment says of malloc is left as it is; other allocators and systems have nothing to set.
    """
    chosen = any(name in os.environ for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"))
    if chosen or sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_TRIM_THRESHOLD, _KEPT)) and bool(mallopt(_MMAP_THRESHOLD, _MAPPED))
