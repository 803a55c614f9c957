"""What a module that resolves the gradients of K branches keeps: the rule, the local step, and what the last backward pass saw."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmfast import contract
from mmfast.blocks.fork import check_plan, without_state
from mmfast.blocks.local_step import check_local
from mmfast.blocks.scaling import LocalScale
from mmfast.resolvers.elementwise import ElementwiseRule
from mmfast.resolvers.names import ResolverLike
from mmfast.stats import BlockStats

_NO_BACKWARD_YET = -1.0  # fills the record before the first backward pass; no squared norm is negative


class Impartial(nn.Module):
    """The base of ImpartialityBlock and LinearHeads."""

    beta: Tensor | None
    _info: Tensor | None  # K weights and the Gramian, [K + K*K] or [B, K + K*K]; None from a resolver without a Gramian

    def __init__(
        self, k: int, resolver: ResolverLike, local: LocalScale | Sequence[float] | Tensor | None, per: str, preserve_norm: bool
    ) -> None:
        super().__init__()
        self.resolver = check_plan(k, resolver, per)
        self.per = per
        self.preserve_norm = preserve_norm
        self._beta = None if local is None else check_local(local, k)
        self.register_buffer("beta", None if self._beta is None else torch.tensor(self._beta, dtype=torch.float64))
        # no buffer: DistributedDataParallel would send it around at every step
        self._info = torch.full((k + k * k,), _NO_BACKWARD_YET, dtype=torch.float64)
        for rule in without_state(self.resolver, k) if per != "sample" else ():
            rule.state = torch.zeros(rule.state_size(k), dtype=torch.float64)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the branches."""
        raise NotImplementedError

    def stats(self) -> BlockStats:
        """What the last backward pass through this block saw; the one method that waits for the device.

        Where the block was called more than once in a forward pass, it is the call whose gradient was computed last. Under
        torch.compile with per="sample", they are kept for the batch size of the last backward pass that was not compiled.

        Returns:
            A `BlockStats` of float64 tensors on the CPU, with a leading B for per="sample".

        Raises:
            RuntimeError: no backward pass yet, or the resolver works elementwise and has neither weights nor Gramian.
        """
        info = self._info
        if info is None or isinstance(self.resolver, ElementwiseRule):
            raise RuntimeError(
                f"{type(self.resolver).__name__} works on each element by itself and has neither weights nor Gramian; "
                "call mmfast.gram on the gradients to see how they conflict"
            )
        if (info == _NO_BACKWARD_YET).all():
            raise RuntimeError("no backward pass has reached this block yet; call loss.backward() before stats()")
        return BlockStats.of(self.names, info)

    def record(self, info: Tensor | None) -> None:
        """Keeps weights and Gramian of a backward pass."""
        if not torch.compiler.is_compiling():
            self.__dict__["_info"] = info if info is None else contract.plain(info)
        elif torch._C._are_functorch_transforms_active():
            pass  # which may not write into a tensor that is not their own
        elif info is not None and self._info is not None and self._info.shape == info.shape:
            self._info.copy_(info)  # a graph can write into a tensor of ours, not bind a name

    def _apply(self, fn: Any, recurse: bool = True) -> "Impartial":
        super()._apply(fn, recurse)
        if self.beta is not None:  # stays float64 in a model that changes its dtype
            self.beta = torch.tensor(self._beta, dtype=torch.float64, device=self.beta.device)
        if self._info is not None:
            device = fn(self._info).device
            self._info = torch.full_like(self._info, _NO_BACKWARD_YET, device=device) if self._info.is_meta else self._info.to(device)
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if self.beta is not None and prefix + "beta" in state_dict:
            self._beta = tuple(self.beta.tolist())

    def _keep_own(self, state_dict: Any, prefix: str) -> None:
        """Adds to the checkpoint of branches without a block what the block keeps besides them, as it is."""
        for name, value in self.state_dict(prefix=prefix).items():
            if name.startswith((prefix + "resolver.", prefix + "beta")):
                state_dict.setdefault(name, value)

    def extra_repr(self) -> str:
        local = "" if self._beta is None else f", local=[{', '.join(f'{b:.4g}' for b in self._beta)}]"
        return f"per={self.per!r}, preserve_norm={self.preserve_norm}{local}"
