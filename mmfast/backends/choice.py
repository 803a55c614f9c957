"""Which backend serves a call: what can be used here and why not, what "auto" takes, what a name asks for."""

from typing import Any

import torch

from mmfast import contract
from mmfast.backends import cpu, cuda, direct, library, proof, reference
from mmfast.backends.tiles import Tiles

BACKENDS = ("auto", "cpu", "cuda", "triton", "reference")
TRITON_ROWS = 64  # most gradients that the Triton kernels take; more run in plain torch


def backends() -> dict[str, tuple[bool, str]]:
    """Each backend with whether it can be used here, and what it is or why it can't.

    >>> import mmfast as mf
    >>> mf.backends()["reference"]
    (True, 'plain torch, any device')
    """
    no_cuda, no_triton = cuda.why_not(), why_no_triton()
    slower = f"; small calls take longer than they could: {direct.missing_reason}" if direct.missing_reason else ""
    return {
        "cuda": (no_cuda is None, no_cuda or f"compiled; {_proved('cuda')}"),
        "triton": (no_triton is None, no_triton or f"portable kernels; {_proved('triton')}"),
        "cpu": (library.available, f"compiled, {cpu.isa()}{slower}" if library.available else str(library.missing_reason)),
        "reference": (True, "plain torch, any device"),
    }


def _proved(backend: str) -> str:
    """What is known of a backend on the current GPU; where there is none, Triton interprets its kernels on the CPU."""
    return proof.words(torch.cuda.current_device(), backend) if torch.cuda.is_available() else "only where backend='triton' asks for them"


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
    from mmfast.backends.triton import ops

    return ops


def choose(device: torch.device, backend: str, k: int, needs: str = "two_pass") -> str:
    """Which backend serves k gradients on the device: "cpu", "cuda", "triton" or "reference"; raises where one asked for by name cannot.

    On a GPU "auto" takes a backend that has proved itself there (proof.py) in what the call needs: "two_pass", which everything falls back on,
    "heads" or "elementwise".
    """
    name = "backend"
    if backend == "auto" and library.ASKED != "auto":
        backend, name = library.ASKED, "MMFAST_BACKEND"
    if backend == "auto":
        if device.type == "cuda":
            found = _proved_choice(device, needs, torch.compiler.is_compiling())
            return "reference" if found == "triton" and not _triton_serves(k) else found
        if device.type != "cpu":
            return "reference"
        if not library.available:
            _tell_slow()
            return "reference"
        return "cpu"
    if backend not in BACKENDS:
        raise ValueError(f"{name} is {backend!r}, expected one of {', '.join(map(repr, BACKENDS))}")
    if backend == "reference":
        return backend
    if backend == "cuda":
        reason = cuda.why_not(device.index if device.type == "cuda" else None)
    else:
        reason = cpu.why_not() if backend == "cpu" else why_no_triton()
    if reason:
        raise RuntimeError(f"{name} {backend!r} is not available: {reason}")
    wanted = triton_kernels().DEVICES if backend == "triton" else (backend,)
    if device.type not in wanted:
        interpreted = " while TRITON_INTERPRET is set" if backend == "triton" and wanted == ("cpu",) else ""
        raise ValueError(f"{name} {backend!r} needs tensors on {' or '.join(wanted).upper()}{interpreted}, they are on {device}")
    return "reference" if backend == "triton" and not _triton_serves(k) else backend


def _triton_serves(k: int) -> bool:
    """Whether its kernels take k gradients here; what torch.func wraps has no address for them."""
    return k <= TRITON_ROWS and not torch._C._are_functorch_transforms_active()


def _proved_choice(device: torch.device, needs: str, compiling: bool) -> str:
    """Asked while a graph is traced, not part of it: a verdict is read, and nothing is tested."""
    found = proof.serving(device, needs, compiling)
    return "reference" if found == "triton" and device.type not in triton_kernels().DEVICES else found  # they are interpreted, on the CPU


_proved_choice._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as in blocks/transforms.py


_told_slow = False


def _tell_slow() -> None:
    """Says once that a call on the CPU has no compiled code."""
    global _told_slow
    if library.missing_reason and not _told_slow and not torch.compiler.is_compiling():
        _told_slow = True
        contract.tell(f"mmfast runs in plain torch on this CPU, many times slower than compiled: {library.missing_reason}")


def functions_of(name: str, k: int = 1) -> Any:
    """The functions for k gradients of a backend that `choose` named: its module, or its tiles."""
    module = triton_kernels() if name == "triton" else {"cpu": cpu, "cuda": cuda, "reference": reference}[name]
    return module if k <= contract.MAX_GRADS else Tiles(module)
