"""A stand-in for a CUDA device: the library's own launch code over the kernels' real PTX, on CPU tensors (docs/gpu.md says what that shows).

    from ptx import build, device

    if build.why_not() is None:
        device.load()                                   # builds at first
        with device.serving():                          # backend="cpu" means the stand-in
            mf.resolve(grads, mf.PCGrad(), backend="cpu")
        cuda = device.functions()                       # or the backend's functions themselves: cuda.gram, cuda.resolve, ...
        device.problems()                               # races and the like: []

Numbers of the device: `with device.chip("A100"): ...`, `device.chip("H100", processors=4, cluster=0)`. Each set of numbers is a CUDA device of its own
to the library, which asks a device once.

Faults: `with device.fault(kind, kernel, mode): ...` plays one for every launch of a kernel whose name contains `kernel` ("" is all), in launches of
`mode`: "plain", "dependent" (overlap), "cooperative" (the persistent path), "cluster" or None for all. The per-sample path is `persistent_kernel` with
"plain". When the block ends the device is as new. Kinds:

    "wrong"   what the first thread of the first block writes to memory is lost: results are wrong in a few places
    "sticky"  this call and every later one of the runtime return cudaErrorIllegalAddress, as after an error that kills the context
    "refuse"  the launch returns cudaErrorCooperativeLaunchTooLarge (cooperative) or cudaErrorLaunchOutOfResources, and nothing runs
    "hang"    the launch returns success, and neither it nor anything after it in the stream runs; `device.busy()` is true

`with device.versions(driver=12010, runtime=13000, image=False): ...` sets what cudaDriverGetVersion and cudaRuntimeGetVersion answer, and whether there
is code for the device (else cudaErrorNoKernelImageForDevice).

Mutations: `sites(kind, function)` lists instructions by which threads wait or exchange, `with without(site, ...)` takes them out.
"""

import ctypes
import types
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest import mock

import torch

from mmfast import contract
from mmfast.backends import choice, compiled, cuda, library
from ptx import build

NAMESPACE = "mmfast_ptx"
# processors, shared memory of a block and of a processor in bytes, compute capability, blocks of the largest cluster (0: none), blocks of a processor
CHIPS = {
    "H100": {"processors": 132, "shared_block": 232448, "shared_processor": 233472, "capability": 90, "cluster": 16, "blocks": 32},
    "A100": {"processors": 108, "shared_block": 166912, "shared_processor": 167936, "capability": 80, "cluster": 0, "blocks": 32},
    "L4": {"processors": 58, "shared_block": 101376, "shared_processor": 102400, "capability": 89, "cluster": 0, "blocks": 24},
}
_open_exports = cuda._exports.__wrapped__  # whose answer is kept for the library that is installed
_chips: dict[tuple[int, ...], int] = {}
_definitions: list[torch.library.Library] = []


@cache
def load() -> ctypes.CDLL:
    """The library, built and with its operators registered; raises RuntimeError where it can't be built (`build.why_not`)."""
    path = build.build()
    definitions = torch.library.Library(NAMESPACE, "DEF")
    for name in library.OPERATORS:
        definitions.define(str(getattr(torch.ops.mmfast, name).default._schema).partition("::")[2])
    _definitions.append(definitions)  # they go when it does
    torch.ops.load_library(str(path))
    loaded = ctypes.CDLL(str(path))
    for name in ("ptx_launched", "ptx_reports", "ptx_site"):
        getattr(loaded, name).restype = ctypes.c_char_p
    loaded.ptx_launches.restype = loaded.ptx_races.restype = ctypes.c_long
    loaded.ptx_use_chip(_chip_number(loaded, CHIPS["H100"]))
    return loaded


def _operator(name: str) -> Any:
    """One of them, its results in ordinary memory."""
    found = getattr(getattr(torch.ops, NAMESPACE), name).default

    def call(*arguments: Any) -> Any:
        try:
            results = found(*arguments)
            return results.clone() if isinstance(results, torch.Tensor) else tuple(r.clone() for r in results)
        finally:
            load().ptx_release()

    return call


@cache
def functions() -> types.ModuleType:
    """A backend: the functions of mmfast/backends/compiled.py over the stand-in's operators, for CPU tensors."""
    load()
    module = types.ModuleType("mmfast.backends.ptx", "The stand-in for a CUDA device.")
    scope = vars(module)
    scope.update({name: value for name, value in vars(compiled).items() if not name.startswith("__")})
    for name, value in vars(compiled).items():
        if isinstance(value, types.FunctionType) and value.__module__ == compiled.__name__:
            scope[name] = types.FunctionType(value.__code__, scope, name, value.__defaults__)
    scope.update({f"_{name}": _operator(name) for name in library.OPERATORS})
    scope.update(why_not=lambda: None, isa=lambda: None)
    return module


@contextmanager
def serving() -> Iterator[None]:
    """backend="cpu" is the stand-in's."""
    with mock.patch.object(choice, "cpu", functions()):
        yield


def _chip_number(loaded: ctypes.CDLL, numbers: dict[str, int]) -> int:
    key = tuple(numbers.values())
    if key not in _chips:
        _chips[key] = loaded.ptx_add_chip(*key)
    return _chips[key]


@contextmanager
def chip(name: str, **changes: int) -> Iterator[None]:
    """The device that calls are made on: a name of CHIPS, some of its numbers changed."""
    number = _chip_number(load(), CHIPS[name] | changes)
    before = load().ptx_use_chip(number)
    try:
        yield
    finally:
        load().ptx_use_chip(before)


@cache
def exports() -> ctypes.CDLL:
    """csrc/ops_cuda_exports.cpp over the stand-in, as mmfast/backends/cuda.py calls it: `mock.patch.object(cuda, "_exports", device.exports)`."""
    load()
    with mock.patch.object(library, "PATH", build.LIBRARY):
        return _open_exports()


def number() -> int:
    """Of the device that calls are made on."""
    return load().ptx_chip()


def plan(k: int, shape: tuple[int, int], size: int, state: int = 0, per: str = "batch") -> tuple[str, int]:
    """(path, bytes read) that this device takes for k gradients [B, N] of numbers of `size` bytes, with rules that keep `state` numbers."""
    with mock.patch.object(cuda, "_exports", exports):
        return cuda.plan(number(), size, k, k, *shape, state, contract.PER[per])[:2]


def seed(number: int) -> None:
    """Draws the orders anew in which threads run from here on."""
    load().ptx_seed(ctypes.c_uint64(number))


def reset() -> None:
    """As new: no fault, no error, no problem noted."""
    load().ptx_reset()


@contextmanager
def fault(kind: str, kernel: str = "", mode: str | None = None) -> Iterator[None]:
    """A fault (see above) until the block ends."""
    if kind not in ("wrong", "sticky", "refuse", "hang"):
        raise ValueError(f"kind is {kind!r}, expected wrong, sticky, refuse or hang")
    load().ptx_add_fault(kind.encode(), kernel.encode(), (mode or "").encode())
    try:
        yield
    finally:
        reset()


@contextmanager
def versions(driver: int = 13000, runtime: int = 13000, image: bool = True) -> Iterator[None]:
    """What the runtime says of the driver, of itself, and whether there is code for the device."""
    load().ptx_versions(driver, runtime, image)
    try:
        yield
    finally:
        load().ptx_versions(13000, 13000, True)
        reset()


def busy() -> bool:
    """Whether a launch hangs: what cudaStreamQuery says."""
    return bool(load().ptx_busy())


def races() -> int:
    """How many accesses to shared memory were races since the last reset()."""
    return load().ptx_races()


def problems() -> list[str]:
    """A sentence about each of the first of them."""
    return load().ptx_reports().decode().splitlines()


def launches() -> int:
    """How many kernels were launched in all."""
    return load().ptx_launches()


def launched() -> Counter[str]:
    """ "kernel mode" of the launches since it was asked last, and how many; the kernel's name as the compiler writes it."""
    return Counter(load().ptx_launched().decode().splitlines())


def sites(kind: str, function: str = "") -> list[int]:
    """Numbers of the instructions of that kind in functions whose name contains `function`.

    Kinds: bar.sync, bar.warp.sync, shfl.sync, cp.async.wait_group, barrier.cluster.arrive, barrier.cluster.wait.
    """
    found = (load().ptx_site(i).decode().split(" ") for i in range(load().ptx_sites()))
    return [i for i, (name, inside, _, _) in enumerate(found) if name == kind and function in inside]


def site_name(number: int) -> str:
    """Its kind, function, file and line."""
    return load().ptx_site(number).decode()


@contextmanager
def without(*numbers: int) -> Iterator[None]:
    """Those instructions are not there, or wait for less: a barrier for nobody, wait_group for one group less, a shuffle with a part of its mask."""
    for number in numbers:
        load().ptx_without(number, 1)
    try:
        yield
    finally:
        for number in numbers:
            load().ptx_without(number, 0)
