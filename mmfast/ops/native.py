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


def _read_facts() -> dict[str, Any]:
    try:
        return json.loads(PATH.with_name("_build.json").read_text())
    except (OSError, ValueError):
        return {}


def _load() -> str | None:
    """Loads the library; returns None, or the reason why its operators are not there."""
    if not PATH.exists():
        return f"{PATH} does not exist: mmfast was installed without compiled code; build it with: {BUILD_LINE}"
    try:
        torch.ops.load_library(str(PATH))
        missing = [name for name in OPERATORS if not hasattr(torch.ops.mmfast, name)]
    except OSError as error:
        return f"{PATH} does not load with torch {torch.__version__}: {error} ({_facts_line()}); build it again with: {BUILD_LINE}"
    if missing:
        return f"{PATH} lacks the operators {missing} ({_facts_line()}); build it again with: {BUILD_LINE}"
    return None


def _facts_line() -> str:
    return "built as " + ", ".join(f"{name}={value}" for name, value in facts.items() if value) if facts else "its _build.json is missing"


def cpu_isa() -> str | None:
    """The instruction set that the compiled CPU kernels use here, or None without them."""
    if not available:
        return None
    name = ctypes.CDLL(str(PATH)).mmfast_cpu_isa
    name.restype = ctypes.c_char_p
    return name().decode()


facts = _read_facts()  # what the build wrote down about itself: version, git, torch, compiler, flags, ...
missing_reason = _load()
available = missing_reason is None

if available:
    weights = torch.ops.mmfast.weights.default

    @torch.library.register_fake("mmfast::weights")
    def _(gram: Tensor, mask: Tensor | None, steps: Any, params: Any, state: Tensor | None, rng: Any, preserve_norm: bool) -> Any:
        return gram.new_empty(gram.shape[:-1]), gram.new_empty((0,) if state is None else state.shape)
