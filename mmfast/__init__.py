"""mmfast: impartial multimodal training, in one fused pass over the shared representation."""

import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = [
    "AGM",
    "CGGM",
    "OGM",
    "DimRatio",
    "ImpartialityBlock",
    "LinearHeads",
    "LipschitzScale",
    "Monitor",
    "StandardScale",
    "attach",
    "backends",
    "backward",
    "collapse",
    "collect",
    "combine",
    "explain",
    "find_blocks",
    "fork",
    "gram",
    "losses",
    "resolve",
    "stats",
    "verify",
    "warmup",
    "weights",
]


def _is_command() -> bool:
    """Whether `mmfast` or `python -m mmfast` started this process: then mmfast.cli decides what is loaded, and what is set before torch is."""
    if sys.argv[:1] == ["-m"]:  # as long as Python looks for the module; its name stands before the arguments
        return sys.orig_argv[-len(sys.argv)].split(".")[0] == "mmfast"
    script = Path(sys.argv[0] if sys.argv else "")
    return script.stem == "mmfast" and script.parent.name in ("bin", "Scripts") and sys.argv[0] in sys.orig_argv


if TYPE_CHECKING or not _is_command():
    try:
        with warnings.catch_warnings():  # torch says so where NumPy is not installed; nothing here needs it
            warnings.filterwarnings("ignore", "Failed to initialize NumPy")
            import torch as _torch  # noqa: F401
        from mmfast import collapse, losses, resolvers, stats
        from mmfast.backends.choice import backends
        from mmfast.blocks.attach import attach
        from mmfast.blocks.block import ImpartialityBlock
        from mmfast.blocks.collect import collect
        from mmfast.blocks.find import find_blocks
        from mmfast.blocks.fork import fork
        from mmfast.blocks.linear_heads import LinearHeads
        from mmfast.blocks.modulation import AGM, CGGM, OGM
        from mmfast.blocks.parameters import backward
        from mmfast.blocks.scaling import DimRatio, LipschitzScale, StandardScale
        from mmfast.monitor.monitor import Monitor
        from mmfast.ops.combine import combine
        from mmfast.ops.explain import explain
        from mmfast.ops.gram import gram
        from mmfast.ops.resolve import resolve
        from mmfast.ops.verify import verify, warmup
        from mmfast.ops.weights import weights
        from mmfast.resolvers import *

        __all__ += resolvers.__all__  # type: ignore[has-type]
    except ModuleNotFoundError as error:
        if error.name == "torch":
            raise ModuleNotFoundError(
                "mmfast needs torch: pip install 'torch>=2.10'; mmfast doctor says what else is missing", name="torch"
            ) from None
        raise
