"""The compiled extension: loads it, says why when it can't, and gives its operators their fakes."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from mmfast import __version__, contract

IN_SOURCE = (Path(__file__).parents[2] / "setup.py").exists()  # else it was installed, and from where is not known
BUILD_LINE = "MMFAST_BUILD=cpu pip install " + (
    "-e . (in mmfast's source folder)" if IN_SOURCE else "--force-reinstall --no-deps --no-binary mmfast mmfast (with a C++ compiler)"
)
PATH = Path(
    os.environ.get("MMFAST_LIBRARY") or Path(__file__).parent.parent / "_C.so"
).absolute()  # it is opened again later, from wherever
ASKED = os.environ.get("MMFAST_BACKEND") or "auto"  # the backend of calls that name none
OPERATORS = ["gram", "combine", "lengths", "weights", "resolve", "graddrop", "trimmed_mean", "heads"]
CPU_OPERATORS = ["gram_lists", "combine_lists", "log_prob", "log_prob_backward"]  # that no other device has


def read_facts(path: Path) -> dict[str, Any]:
    """What the build of the library at `path` wrote down about itself: version, git, torch, compiler, flags, ..."""
    try:
        facts = json.loads(path.with_name("_build.json").read_text())
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def _why_absent(path: Path) -> str:
    """Why there is no library at `path`, and the line that cures it."""
    if sys.platform != "linux":
        return f"{path} does not exist: the compiled code is for Linux, this is {sys.platform}"
    other = next((place for place in map(Path, sys.path) if (found := place / "mmfast" / "_C.so").exists() and found != path), None)
    if other and not os.environ.get("MMFAST_LIBRARY"):
        return (
            f"{path} does not exist: Python found this folder before the installed mmfast in {other}, which has compiled code; "
            f"run Python from another folder, or compile here too: {BUILD_LINE}"
        )
    reason = read_facts(path).get("why_not_more")
    return (
        f"{path} does not exist, mmfast was installed without compiled code{f' ({reason})' if reason else ''}; build it with: {BUILD_LINE}"
    )


def load(path: Path) -> str | None:
    """Loads the library at `path`; returns None, or the reason why its operators are not there."""
    if not path.exists():
        return _why_absent(path)
    facts = ", ".join(f"{name}: {value}" for name, value in read_facts(path).items() if value) or "without _build.json"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path} ({facts}) does not load with torch {torch.__version__}: {error}; build it again with: {BUILD_LINE}"
    missing = [name for name in OPERATORS + CPU_OPERATORS if not hasattr(torch.ops.mmfast, name)]
    if missing:
        return f"{path} ({facts}) has no operator {', '.join(missing)}; build it again with: {BUILD_LINE}"
    if read_facts(path).get("version", __version__) != __version__:  # whose operators may take other arguments
        return f"{path} ({facts}) is not of this mmfast, {__version__}; build it again with: {BUILD_LINE}"
    return None


missing_reason = load(PATH)
available = missing_reason is None
serves_cpu = available and ASKED in ("auto", "cpu")  # calls on the CPU that name no backend
built_with_cuda = available and torch._C._dispatch_has_kernel_for_dispatch_key("mmfast::gram", "CUDA")

if available:

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

    @torch.library.register_fake("mmfast::lengths")
    def _(grads, missing, mask, w, per):
        return grads[0].new_empty((*_problems(grads, per, mask), 3), dtype=torch.float64)

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

    @torch.library.register_fake("mmfast::gram_lists")
    def _(grads, counts, rows, k):
        return grads[0].new_empty((k, k), dtype=torch.float64)

    @torch.library.register_fake("mmfast::combine_lists")
    def _(grads, counts, rows, w, out):
        return None

    @torch.library.register_fake("mmfast::log_prob")
    def _(raw, x, seen, features, w, slopes):
        return raw.new_empty((*raw.shape[:-1], features.shape[0])), raw.new_empty(raw.shape if slopes else (0,))

    @torch.library.register_fake("mmfast::log_prob_backward")
    def _(grad, slopes, features):
        return slopes.new_empty(slopes.shape)
