"""The compiled CUDA kernels: whether they can run on a device, which of them a call may take, and the plan by which it chooses."""

import contextlib
import ctypes
import functools
from collections.abc import Iterable, Iterator

import torch

from mmfast.backends import compiled, library

gram, combine, lengths = compiled.gram, compiled.combine, compiled.lengths
weights, resolve = compiled.weights, compiled.resolve
graddrop, trimmed_mean, heads = compiled.graddrop, compiled.trimmed_mean, compiled.heads

PATHS = ("two_pass", "persistent", "per_sample", "cluster")  # by their number in csrc/cuda/plan.h
CODES = ("none", "machine", "ptx")
_served: set[int] = set()  # devices that were found to run the kernels
_BITS = {name: 1 << number for number, name in enumerate(PATHS)} | {"overlap": 1 << 8}


@functools.cache
def _exports() -> ctypes.CDLL:
    """The functions of csrc/ops_cuda_exports.cpp."""
    exports = ctypes.CDLL(str(library.PATH))
    number, text = ctypes.c_int64, ctypes.c_char_p
    for name, result, arguments in (
        ("why_not", text, [number]),
        ("code", number, [number]),
        ("architectures", text, []),
        ("force", None, [number, number]),
        ("allow", None, [number, number]),
        ("paths", number, [number]),
        ("tune", None, [number, number, ctypes.c_double]),
        ("plan", None, [number] * 8 + [ctypes.POINTER(number)]),
    ):
        function = getattr(exports, f"mmfast_cuda_{name}")
        function.restype, function.argtypes = result, arguments
    return exports


def _current(device: int) -> contextlib.AbstractContextManager[object]:
    """The device as the current one, where there are any: it is the one that is asked."""
    return torch.cuda.device(device) if torch.cuda.is_available() else contextlib.nullcontext()


def why_not(device: int | None = None) -> str | None:
    """Why the compiled CUDA kernels can't run on a device, or None when they can; nothing is loaded or compiled to find out. None is the current one."""
    if not library.available:
        return library.missing_reason
    if not library.built_with_cuda:
        reason = library.read_facts(library.PATH).get("why_not_more") or "unknown"
        return f"{library.PATH} was built without CUDA ({reason}); build it again with: {library.BUILD_LINE.replace('=cpu', '=cuda')}"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no CUDA device"
    if device is None:  # one that is not yet made ready, which a forked process must not do to find out, is the first
        device = torch.cuda.current_device() if torch.cuda.is_initialized() else 0
    if device not in _served:
        if reason := _exports().mmfast_cuda_why_not(device):
            return f"{library.PATH}: {reason.decode()}"
        _served.add(device)
    return None


def code(device: int) -> str:
    """What the library holds for a device: "machine" code, only "ptx", which the driver has to compile first, or "none"."""
    return CODES[_exports().mmfast_cuda_code(device)]


def architectures() -> str:
    """What the library was compiled for, as 80;90+PTX."""
    return _exports().mmfast_cuda_architectures().decode()


@contextlib.contextmanager
def force(path: str | None = None, overlap: bool | None = None) -> Iterator[None]:
    """Calls of this thread take the path, and overlap their launches or don't, whatever `allow` and the environment say; None leaves either as it is."""
    _exports().mmfast_cuda_force(-1 if path is None else PATHS.index(path), -1 if overlap is None else overlap)
    try:
        yield
    finally:
        _exports().mmfast_cuda_force(-1, -1)


def allow(device: int, paths: Iterable[str]) -> None:
    """From now on `resolve` on the device takes these paths alone, beside two_pass; "overlap" allows launches to. It chooses among no others."""
    _exports().mmfast_cuda_allow(device, sum(_BITS[name] for name in _BITS.keys() & set(paths)))


def paths(device: int) -> set[str]:
    """The paths that the device has, allowed or not, and "overlap" where its launches can; loads the kernels."""
    with _current(device):
        bits = _exports().mmfast_cuda_paths(device)
    return {name for name, bit in _BITS.items() if bits & bit}


def tune(device: int, cluster_bytes: int, share_kept: float) -> None:
    """Up to how many bytes calls on the device take a cluster, and which share of its bytes a launch must keep: this changes their time, not their bits."""
    _exports().mmfast_cuda_tune(device, cluster_bytes, share_kept)


def plan(device: int, size: int, k: int, rows: int, batch: int, inner: int, state: int, per: int) -> tuple[str, int, int, int]:
    """(path, bytes read, bytes written, launches) by csrc/cuda/plan.h for k of `rows` gradients [batch, inner], of `size` bytes a number.

    The rules keep `state` numbers; `per` is 0 for one problem, 1 for one per sample, 2 for what no single launch serves.
    """
    found = (ctypes.c_int64 * 4)()
    with _current(device):
        _exports().mmfast_cuda_plan(device, size, k, rows, batch, inner, state, per, found)
    path, read, written, launches = found
    return PATHS[path], read, written, launches
