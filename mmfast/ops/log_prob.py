"""The operator of likelihoods: those of all features, with their derivatives, in one pass over the outputs of the heads."""

from typing import Any

import torch
from torch import Tensor

from mmfast.backends import direct, library
from mmfast.backends.choice import triton_kernels, why_no_triton

FLOATS = (torch.float32, torch.float64)


def serves(raw: Tensor, x: Tensor, seen: Tensor | None, w: Tensor) -> bool:
    """Whether there is a kernel for them: on the CPU the compiled one, elsewhere Triton's where MMFAST_BACKEND asks for it."""
    dtype = raw.dtype
    if dtype not in FLOATS or x.dtype != dtype or w.dtype not in FLOATS or not (seen is None or seen.dtype in (dtype, torch.bool)):
        return False
    if not (raw.is_cpu and library.serves_cpu or _in_triton(raw)):
        return False
    device = raw.device
    return x.device == device and w.device == device and (seen is None or seen.device == device)


def _in_triton(raw: Tensor) -> bool:
    if library.ASKED != "triton" or why_no_triton() is not None or torch._C._are_functorch_transforms_active():
        return False
    return raw.device.type in triton_kernels().DEVICES


def _triton() -> Any:
    from mmfast.backends.triton import likelihoods

    return likelihoods


def log_prob(raw: Tensor, x: Tensor, seen: Tensor | None, features: Tensor, w: Tensor, slopes: bool) -> tuple[Tensor, Tensor | None]:
    """(log-likelihoods [..., K], of raw's dtype; their derivatives by raw [..., outputs], nothing where slopes is False)

    Args:
        raw: [..., outputs], the outputs of all heads side by side.
        x: [B, K], whose rows go with those of raw in turn.
        seen: [B, K], bool or of raw's dtype, or None; where it is 0 nothing is read, and 0 comes out.
        features: int64 [K, 2], the kind and the number of outputs of each feature.
        w: [K], scales of the local step.
    """
    if library.ASKED == "triton":
        return _triton().log_prob(raw, x, seen, features, w, slopes)
    found = direct.log_prob(raw, x, seen, features, w, slopes)
    return torch.ops.mmfast.log_prob(raw, x, seen, features, w, slopes) if found is None else found


def log_prob_backward(grad: Tensor, slopes: Tensor, features: Tensor) -> Tensor:
    """The gradient by raw, from that of the log-likelihoods [..., K] and their derivatives."""
    if library.ASKED == "triton":
        return _triton().log_prob_backward(grad, slopes, features)
    found = direct.log_prob_backward(grad, slopes, features)
    return torch.ops.mmfast.log_prob_backward(grad, slopes, features) if found is None else found
