"""Loads the compiled extension, says why when it can't, and gives its operators their fakes."""

import ctypes
import json
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from mmfast.ops import contract

BUILD_LINE = "MMFAST_BUILD=cpu pip install -e . (in mmfast's source folder)"
PATH = Path(os.environ.get("MMFAST_LIBRARY") or Path(__file__).parent.parent / "_C.so")
OPERATORS = ["gram", "combine", "weights", "resolve", "graddrop", "trimmed_mean", "heads"]


def read_facts(path: Path) -> dict[str, Any]:
    """What the build of the library at `path` wrote down about itself: version, git, torch, compiler, flags, ..."""
    try:
        return json.loads(path.with_name("_build.json").read_text())
    except (OSError, ValueError):
        return {}


def load(path: Path) -> str | None:
    """Loads the library at `path`; returns None, or the reason why its operators are not there."""
    if not path.exists():
        return f"{path} does not exist, mmfast was installed without compiled code; build it with: {BUILD_LINE}"
    facts = ", ".join(f"{name}: {value}" for name, value in read_facts(path).items() if value) or "without _build.json"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path} ({facts}) does not load with torch {torch.__version__}: {error}; build it again with: {BUILD_LINE}"
    missing = [name for name in OPERATORS if not hasattr(torch.ops.mmfast, name)]
    if missing:
        return f"{path} ({facts}) has no operator {', '.join(missing)}; build it again with: {BUILD_LINE}"
    return None


def cpu_isa() -> str | None:
    """The instruction set that the compiled CPU kernels run here, or None without them."""
    if not available:
        return None
    name = ctypes.CDLL(str(PATH)).mmfast_cpu_isa
    name.restype = ctypes.c_char_p
    return name().decode()


def why_no_cuda() -> str | None:
    """Why the compiled CUDA kernels can't run here, or None when they can."""
    if not available:
        return missing_reason
    if not built_with_cuda:
        reason = read_facts(PATH).get("why_not_more") or "unknown"
        return f"{PATH} was built without CUDA ({reason}); build it again with: {BUILD_LINE.replace('=cpu', '=cuda')}"
    return None if torch.cuda.is_available() else f"torch {torch.__version__} sees no CUDA device"


def cuda_plan(device: int, size: int, k: int, places: int, batch: int, inner: int, state: int, per: int) -> tuple[str, int, int, int]:
    """(path, bytes read, bytes written, launches) by csrc/cuda/plan.h for k gradients [batch, inner] at `places` places, of `size` bytes a number.

    The rules keep `state` numbers; `per` is 0 for one problem, 1 for one per sample, 2 for what no single launch serves.
    """
    found = (ctypes.c_int64 * 4)()
    numbers = [ctypes.c_int64(x) for x in (device, size, k, places, batch, inner, state, per)]
    with torch.cuda.device(device) if torch.cuda.is_available() else nullcontext():  # the current one is asked
        ctypes.CDLL(str(PATH)).mmfast_cuda_plan(*numbers, found)
    path, read, written, launches = found
    return ("two_pass", "persistent", "per_sample", "cluster")[path], read, written, launches


missing_reason = load(PATH)
available = missing_reason is None
built_with_cuda = available and torch._C._dispatch_has_kernel_for_dispatch_key("mmfast::gram", "CUDA")

if available:
    gram = torch.ops.mmfast.gram.default
    combine = torch.ops.mmfast.combine.default
    weights = torch.ops.mmfast.weights.default
    resolve = torch.ops.mmfast.resolve.default
    graddrop = torch.ops.mmfast.graddrop.default
    trimmed_mean = torch.ops.mmfast.trimmed_mean.default
    heads = torch.ops.mmfast.heads.default

    def _problems(grads, per, mask=None):
        contract.check_grads(grads)
        if mask is not None and mask.device != grads[0].device:
            raise ValueError(f"mask is on {mask.device}, expected {grads[0].device} like the gradients")
        return (grads[0].shape[0],) if per == 1 else ()

    # new_empty, as the kernels do: a permuted input must not hand its strides on
    @torch.library.register_fake("mmfast::gram")
    def _(grads, missing, mask, per):
        k = len(grads) + len(missing)
        return grads[0].new_empty((*_problems(grads, per, mask), k, k), dtype=torch.float64)

    @torch.library.register_fake("mmfast::combine")
    def _(grads, missing, mask, w, per):
        contract.check_grads(grads)
        return grads[0].new_empty(grads[0].shape)

    @torch.library.register_fake("mmfast::weights")
    def _(gram, mask, steps, params, state, rng, preserve_norm, precision):
        return gram.new_empty(gram.shape[:-1])

    @torch.library.register_fake("mmfast::resolve")
    def _(grads, missing, mask, steps, params, state, rng, per, preserve_norm, with_gram):
        k = len(grads) + len(missing)
        info = grads[0].new_empty((*_problems(grads, per, mask), k + k * k), dtype=torch.float64)
        return grads[0].new_empty(grads[0].shape), info

    @torch.library.register_fake("mmfast::graddrop")
    def _(grads, missing, mask, leak, rng):
        contract.check_grads(grads)
        return grads[0].new_empty(grads[0].shape)

    @torch.library.register_fake("mmfast::trimmed_mean")
    def _(grads, missing, mask, trim):
        contract.check_grads(grads)
        return grads[0].new_empty(grads[0].shape)

    @torch.library.register_fake("mmfast::heads")
    def _(delta, weight, head_of, mask, steps, params, state, rng, k, per, preserve_norm):
        info = delta.new_empty((*((delta.shape[0],) if per == 1 else ()), k + k * k), dtype=torch.float64)
        return delta.new_empty((*delta.shape[:-1], weight.shape[1])), info
