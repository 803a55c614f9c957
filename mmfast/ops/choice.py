"""Which backend serves a call: what can be used here and why not, what "auto" takes, what a name asks for."""

from typing import Any

import torch

from mmfast.ops import direct, native

BACKENDS = ("auto", "cpu", "cuda", "triton", "reference")
TRITON_ROWS = 64  # most gradients that the Triton kernels take; more run in plain torch


def backends() -> dict[str, tuple[bool, str]]:
    """Each backend with whether it can be used here, and what it is or why it can't.

    >>> import mmfast as mf
    >>> mf.backends()["reference"]
    (True, 'plain torch, any device')
    """
    no_cuda, no_triton = native.why_no_cuda(), why_no_triton()
    slower = f"; small calls take longer than they could: {direct.missing_reason}" if direct.missing_reason else ""
    return {
        "cuda": (no_cuda is None, no_cuda or "compiled; only where backend='cuda' asks for it, for no GPU has run it yet"),
        "triton": (
            no_triton is None,
            no_triton or "portable kernels; only where backend='triton' asks for them, for no GPU has run them yet",
        ),
        "cpu": (native.available, f"compiled, {native.cpu_isa()}{slower}" if native.available else str(native.missing_reason)),
        "reference": (True, "plain torch, any device"),
    }


def why_no_triton() -> str | None:
    """Why the Triton kernels can't run here, or None when they can."""
    try:
        import triton
    except ImportError:
        return "triton is not installed; torch for Linux and a GPU brings it, else: pip install triton"
    except Exception as error:  # noqa: BLE001 what is broken must not break the others
        return f"triton does not load: {error}"
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 6):
        return f"triton is {triton.__version__}, expected 3.6 or later; pip install --upgrade triton"
    return triton_kernels().why_not()


def triton_kernels() -> Any:
    """The Triton kernels, imported when they are asked for."""
    from mmfast.triton import ops

    return ops


def serving(device: torch.device, backend: str, k: int) -> str:
    """Which backend serves k gradients on the device: "cpu", "cuda", "triton" or "reference"; raises where one asked for by name cannot."""
    if backend == "auto":
        return "cpu" if native.available and device.type == "cpu" else "reference"
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}, expected one of {', '.join(map(repr, BACKENDS))}")
    if backend == "reference":
        return backend
    reason = {"cpu": lambda: native.missing_reason, "cuda": native.why_no_cuda, "triton": why_no_triton}[backend]()
    if reason:
        raise RuntimeError(f"backend {backend!r} is not available: {reason}")
    wanted = triton_kernels().DEVICES if backend == "triton" else (backend,)
    if device.type not in wanted:
        interpreted = " while TRITON_INTERPRET is set" if backend == "triton" and wanted == ("cpu",) else ""
        raise ValueError(f"backend {backend!r} needs tensors on {' or '.join(wanted).upper()}{interpreted}, they are on {device}")
    # what torch.func wraps has no address for a kernel of Triton
    return "reference" if backend == "triton" and (k > TRITON_ROWS or torch._C._are_functorch_transforms_active()) else backend


def kernels_of(served: str) -> Any:
    """The module with the kernels' operators, or None for plain torch."""
    return None if served == "reference" else triton_kernels() if served == "triton" else native
