"""What the operators accept, and the errors that people read: they name the argument, what it is and what it should be."""

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

MAX_GRADS = 256
PER = {"batch": 0, "sample": 1, "batch_sum": 2}
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_OURS = tuple(str(Path(module).parent) for module in (__file__, torch.__file__))


def tell(message: str) -> None:
    """Warns at the line of the caller's that led here; Python shows the same words at the same line once."""
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_code.co_filename.startswith(_OURS):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def per_code(per: str) -> int:
    """The number of a granularity in the operators' schema."""
    code = PER.get(per)
    if code is None:
        raise ValueError(f"per is {per!r}, expected one of {', '.join(map(repr, PER))}")
    return code


def check_count(k: int, name: str = "grads") -> None:
    if not 1 <= k <= MAX_GRADS:
        raise ValueError(f"{name} holds {k} gradients, expected 1 to {MAX_GRADS}")


def check_grads(grads: Sequence[Tensor]) -> None:
    """All are floating-point tensors of one shape, dtype and device."""
    for i, g in enumerate(grads):
        if not isinstance(g, Tensor):
            raise TypeError(f"grads[{i}] is a {type(g).__name__}, expected a tensor")
        if not torch.compiler.is_compiling() and g.layout != torch.strided:  # a traced backward pass may not ask for it
            raise TypeError(f"grads[{i}] has layout {g.layout}, expected torch.strided; use to_dense()")
        if g.dtype not in DTYPES:
            raise TypeError(f"grads[{i}] is {g.dtype}, expected one of {', '.join(str(d) for d in DTYPES)}")
        first = grads[0]
        if g.shape != first.shape:
            raise ValueError(f"grads[{i}] has shape {tuple(g.shape)}, expected {tuple(first.shape)} like grads[0]")
        if g.dtype != first.dtype:
            raise TypeError(f"grads[{i}] is {g.dtype}, expected {first.dtype} like grads[0]")
        if g.device != first.device:
            raise ValueError(f"grads[{i}] is on {g.device}, expected {first.device} like grads[0]")


def check(grads: Sequence[Tensor], per: str, mask: Tensor | None, k: int) -> None:
    """All of it; grads are those present of k."""
    check_count(k)
    if not grads:
        raise ValueError(f"all {k} gradients are missing")
    check_grads(grads)
    check_per(per, grads[0].shape)
    check_mask(mask, k, grads[0].shape, grads[0].device)


def check_per(per: str, shape: torch.Size) -> None:
    if per_code(per) and not shape:
        raise ValueError(f"per={per!r} needs gradients with a leading batch dimension, but they are scalars")


def check_mask(mask: Tensor | None, k: int, shape: torch.Size, device: torch.device) -> None:
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask is a {type(mask).__name__}, expected a bool tensor")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask is {mask.dtype}, expected torch.bool")
    allowed = [(k,)] + ([(shape[0], k)] if shape else [])
    if tuple(mask.shape) not in allowed:
        raise ValueError(f"mask has shape {tuple(mask.shape)}, expected {' or '.join(map(str, allowed))} for {k} gradients")
    if mask.device != device:
        raise ValueError(f"mask is on {mask.device}, expected {device} like the gradients")


def check_gramian(G: Tensor) -> None:
    if not isinstance(G, Tensor):
        raise TypeError(f"G is a {type(G).__name__}, expected a tensor [..., K, K]")
    if not G.dtype.is_floating_point:
        raise TypeError(f"G is {G.dtype}, expected a floating-point tensor")
    if G.dim() < 2 or G.shape[-1] != G.shape[-2]:
        raise ValueError(f"G has shape {tuple(G.shape)}, expected [..., K, K]")
    if not 1 <= G.shape[-1] <= MAX_GRADS:
        raise ValueError(f"G has shape {tuple(G.shape)}, expected K from 1 to {MAX_GRADS}")


def plain(x: Tensor) -> Tensor:
    """The tensor inside what the transformations of torch.func wrapped it in."""
    while not torch.compiler.is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x


def refuse_vmap(*kept: Tensor | None) -> None:
    """Called for a problem that vmap maps over, with what its rule keeps between calls."""
    if any(x is not None for x in kept):
        raise RuntimeError(
            "vmap can't map a rule that keeps state or draws random numbers: both belong to one problem, or with per='sample' to each of its samples; "
            "call it outside vmap with per='sample'"
        )


def check_unmapped(x: Tensor, *kept: Tensor | None) -> None:
    """refuse_vmap where x is mapped over, at any level."""
    while not torch.compiler.is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(x):
        if torch._C._functorch.is_batchedtensor(x):
            refuse_vmap(*kept)
        x = torch._C._functorch.get_unwrapped(x)
