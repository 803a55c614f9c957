"""What the operators accept, and the errors that people read: they name the argument, what it is and what it should be."""

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

MAX_GRADS = 256  # of one call of a kernel, and branches of a block
MAX_TILED = 4096  # of an operator, which goes by tiles beyond MAX_GRADS (backends/tiles.py)
PER = {"batch": 0, "sample": 1, "batch_sum": 2}
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
COMPLEX = (torch.complex32, torch.complex64, torch.complex128)  # taken as pairs of real numbers
T = TypeVar("T")

_OURS = tuple(str(Path(module).parent / "_")[:-1] for module in (__file__, torch.__file__))


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
    if not 1 <= k <= MAX_TILED:
        raise ValueError(f"{name} holds {k} gradients, expected 1 to {MAX_TILED}")


def shortened(values: Sequence[Any]) -> str:
    """The values of a list as an error shows them: the first few and how many there are."""
    shown = ", ".join(repr(value) for value in values[:4])
    return f"[{shown}]" if len(values) <= 4 else f"[{shown}, ... ({len(values)} in all)]"


def as_rows(grads: Any) -> Sequence[Any]:
    """K gradients as they come: a list or tuple as it is, a tensor [K, ...] as its K rows."""
    if isinstance(grads, (list, tuple)):
        return grads
    if isinstance(grads, Tensor):
        refuse_nested(grads, "grads")
        if not grads.dim():
            raise ValueError("grads is a tensor without dimensions, expected K gradients: a tensor [K, ...] or a list of K tensors")
        check_count(grads.shape[0])
        return grads.unbind(0) if torch.compiler.is_compiling() or grads.layout == torch.strided else grads.to_dense().unbind(0)
    if hasattr(grads, "__len__") and hasattr(grads, "__iter__") and not isinstance(grads, (str, Mapping)):
        return list(grads)
    raise TypeError(f"grads is a {type(grads).__name__}, expected K gradients: a list of K tensors or a tensor [K, ...]")


def check_dense(x: Tensor, name: str) -> None:
    refuse_nested(x, name)
    if x.layout != torch.strided:
        raise TypeError(f"{name} has layout {x.layout}, expected torch.strided; use {name}.to_dense()")


def refuse_nested(x: Tensor, name: str) -> None:
    if x.is_nested:
        raise TypeError(f"{name} is a nested tensor, whose rows differ in shape; expected a dense one; use {name}.to_padded_tensor(0.0)")


def ordinary(grads: Sequence[Tensor], per: str, mask: Tensor | None, k: int) -> list[Tensor] | None:
    """The gradients with sparse ones made dense and complex ones taken as pairs of real numbers [..., 2]; None where there is nothing to do."""
    ask_layout = not torch.compiler.is_compiling()  # a traced backward pass may not ask for it
    if not any(isinstance(g, Tensor) and (g.is_complex() or (ask_layout and g.layout != torch.strided)) for g in grads):
        return None
    dense = []
    for i, g in enumerate(grads):
        if not isinstance(g, Tensor):
            raise TypeError(f"grads[{i}] is a {type(g).__name__}, expected a tensor")
        refuse_nested(g, f"grads[{i}]")
        dense.append(g.to_dense() if ask_layout and g.layout != torch.strided else g)
    if not dense[0].is_complex():
        return dense
    check_count(k)
    check_grads(dense, COMPLEX)
    check_per(per, dense[0].shape)
    check_mask(mask, k, dense[0].shape, dense[0].device)
    return [torch.view_as_real(g.resolve_conj()) for g in dense]


def call_ordinary(
    call: Callable[..., T],
    grads: Sequence[Tensor],
    arguments: tuple[Any, ...],
    per: str,
    mask: Tensor | None,
    k: int,
    back: Callable[[T], T],
) -> T:
    """call(grads, *arguments) of an operator, of which autograd records nothing: neither its result nor a state remembers where it came from.

    For gradients that are sparse or complex it is called with ordinary ones, and its result is `back` of that where those stood for complex ones.
    Only what a call refuses is looked at, so that others lose no time.
    """
    if torch.compiler.is_compiling():
        found = ordinary(grads, per, mask, k)
        with torch.no_grad():
            result = call(grads if found is None else found, *arguments)
        return back(result) if grads[0].is_complex() else result
    recording = torch.is_grad_enabled()
    if recording:
        torch._C._set_grad_enabled(False)  # torch.no_grad() takes as long as a small operator
    try:
        return call(grads, *arguments)
    except (RuntimeError, TypeError):
        found = ordinary(grads, per, mask, k)
        if found is None:
            raise
        result = call(found, *arguments)
        return back(result) if grads[0].is_complex() else result
    finally:
        if recording:
            torch._C._set_grad_enabled(True)


def check_grads(grads: Sequence[Tensor], dtypes: Sequence[torch.dtype] = DTYPES) -> None:
    """All are tensors of one shape, dtype (of those named) and device."""
    ask_layout = not torch.compiler.is_compiling()  # a traced backward pass may not ask for it
    for i, g in enumerate(grads):
        if not isinstance(g, Tensor):
            raise TypeError(f"grads[{i}] is a {type(g).__name__}, expected a tensor")
        if ask_layout and (g.layout != torch.strided or g.is_nested):
            check_dense(g, f"grads[{i}]")
        if i == 0 and g.dtype not in dtypes:
            raise TypeError(f"grads[{i}] is {g.dtype}, expected one of {', '.join(str(d) for d in DTYPES + COMPLEX)}")
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
    if not 1 <= G.shape[-1] <= MAX_TILED:
        raise ValueError(f"G has shape {tuple(G.shape)}, expected K from 1 to {MAX_TILED}")


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
