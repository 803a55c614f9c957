"""Loads the compiled extension, says why when it can't, and gives its operators their fakes."""

import ctypes
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BUILD_LINE = "MMFAST_BUILD=cpu pip install -e . (in mmfast's source folder)"
PATH = Path(os.environ.get("MMFAST_LIBRARY") or Path(__file__).parent.parent / "_C.so")
OPERATORS = ["weights"]


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


missing_reason = load(PATH)
available = missing_reason is None

if available:
    weights = torch.ops.mmfast.weights.default

    @torch.library.register_fake("mmfast::weights")
    def _(gram: Tensor, mask: Tensor | None, steps: Any, params: Any, state: Tensor | None, rng: Any, preserve_norm: bool) -> Any:
        return gram.new_empty(gram.shape[:-1]), gram.new_empty((0,) if state is None else state.shape)
