"""What a module that resolves the gradients of K branches keeps: the rule, the local step, and what the last backward pass saw."""

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from mmfast import contract
from mmfast.blocks.fork import check_plan, without_state
from mmfast.blocks.local_step import Follows, check_local
from mmfast.blocks.modulation import GradientModulation
from mmfast.blocks.scaling import LocalScale
from mmfast.ops.across import Ranks
from mmfast.resolvers.base import Resolver, Rule
from mmfast.resolvers.elementwise import ElementwiseRule
from mmfast.resolvers.names import ResolverLike
from mmfast.stats import BlockStats

# what fills a record that holds nothing, and why; no squared norm is negative
_NO_BACKWARD_YET, _NO_GRADIENT, _OTHER_SHAPE = -1.0, -2.0, -3.0
_REASONS = {
    _NO_BACKWARD_YET: "no backward pass has reached this block yet; call loss.backward() before stats() (one compiled inside torch.func is not recorded)",
    _NO_GRADIENT: "the shared tensor of the last forward pass asked for no gradient (requires_grad is False: a frozen encoder, or data), so there "
    "was nothing to resolve; to see how the branches conflict there, give the block y.detach().requires_grad_()",
    _OTHER_SHAPE: "the last backward pass was compiled, with per='sample' and another batch size than the record has; compiled code keeps that of the last "
    "backward pass that was not compiled: run one of this batch size without torch.compile first",
}


def _capturing(info: Tensor) -> bool:
    return info.is_cuda and torch.cuda.is_current_stream_capturing()


_block_of: WeakKeyDictionary[Rule, "ref[Impartial]"] = WeakKeyDictionary()  # of rules that keep state


def _keepers(resolver: Resolver, k: int) -> list[Rule]:
    """Those of its rules that go on from their last call."""
    if isinstance(resolver, Rule) and resolver.keeps:
        return [resolver]
    return [rule for rule in resolver.chain() or () if rule.state_size(k)]


def _claim(block: "Impartial", resolver: Resolver, k: int) -> None:
    """Says so where a rule's state is another block's already."""
    for rule in _keepers(resolver, k):
        other = _block_of.get(rule)
        if other is not None and other() is not None:
            contract.tell(
                f"resolver is {rule!r}, which keeps state from call to call and is another block's already: each would go on with what the other "
                "left; give every block a rule of its own"
            )
        _block_of[rule] = ref(block)


def give_up(resolver: Resolver, k: int) -> None:
    """A block that is taken out of its model leaves the rule, with its state, to another."""
    for rule in _keepers(resolver, k):
        _block_of.pop(rule, None)


class Impartial(nn.Module):
    """The base of ImpartialityBlock and LinearHeads."""

    beta: Tensor | None  # read in every backward pass
    modulation: GradientModulation | None  # in beta's place, where it changes from step to step
    _captured = False  # whether a CUDA graph writes into the record
    _info: Tensor | None  # K weights and the Gramian, [K + K*K] or [B, K + K*K]; None from a resolver without a Gramian

    def __init__(
        self,
        k: int,
        resolver: ResolverLike,
        local: LocalScale | Sequence[float] | Tensor | None,
        per: str,
        preserve_norm: bool,
        group: Any = None,
    ) -> None:
        super().__init__()
        self.resolver = check_plan(k, resolver, per)
        _claim(self, self.resolver, k)
        self.per = per
        self.preserve_norm = preserve_norm
        self.ranks = Ranks.of(group)
        self.modulation = local if isinstance(local, GradientModulation) else None
        if self.modulation is not None and self.modulation.k != k:
            raise ValueError(
                f"local is {self.modulation!r}, for {self.modulation.k} modalities, expected one for {k}, the number of branches"
            )
        self._k = k
        # what beta is where a meta tensor was
        self._given = None if local is None or self.modulation is not None else check_local(local, k)
        self.register_buffer("beta", None if self._given is None else torch.tensor(self._given, dtype=torch.float64))
        # no buffer: DistributedDataParallel would send it around at every step
        self._info = torch.full((k + k * k,), _NO_BACKWARD_YET, dtype=torch.float64)
        for rule in without_state(self.resolver, k) if per != "sample" else ():
            rule.state = torch.zeros(rule.state_size(k), dtype=torch.float64)

    def reset_parameters(self) -> None:
        """Makes anew what is the block's own, after `to_empty`: an empty record. Rule and branches have a method of their own."""
        for own in (self.beta, self._info):
            if own is not None:
                self._settle(own.device)

    def _settle(self, device: torch.device) -> None:
        if self.beta is not None:
            self.beta = self._with_values(self.beta, device)
        if self._info is not None:
            self._info = self._info.new_full((self._k + self._k**2,), _NO_BACKWARD_YET, device=device)

    def _with_values(self, beta: Tensor, device: torch.device) -> Tensor:
        """A local step on another device; from the meta device, where there are no values, it comes as it was given."""
        return torch.tensor(self._given, dtype=torch.float64, device=device) if beta.is_meta else beta.to(device)

    def local_step(self) -> Follows | None:
        """What scales the branches' gradients, of a forward pass that begins."""
        if self.modulation is not None:
            self.modulation.entered()
            return self.modulation
        beta = self.beta
        if beta is None:
            return None
        if len(beta) != self._k:
            raise ValueError(f"beta has {len(beta)} numbers, expected {self._k}, one per branch")
        return self

    def current(self, grad: Tensor) -> Tensor:
        """Called in a backward pass: the local step as it is now; one on the CPU stays there, a copy of which would wait for the device."""
        assert self.beta is not None
        return self.beta if self.beta.is_cpu else self.beta.to(grad.device)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the branches."""
        raise NotImplementedError

    def tell_names(self) -> None:
        """Lets a modulation find by name what it is given by name."""
        if self.modulation is not None and self.names != tuple(map(str, range(self._k))):
            self.modulation.names = self.names

    def stats(self) -> BlockStats:
        """What the last backward pass through this block saw; the one method that waits for the device.

        Where the block was called more than once in a forward pass, it is the call whose gradient was computed last. Under
        torch.compile with per="sample", they are kept for the batch size of the last backward pass that was not compiled.

        Returns:
            A `BlockStats` of float64 tensors on the CPU, with a leading B for per="sample".

        Raises:
            RuntimeError: no backward pass yet, or none that was recorded (the shared tensor of the last forward pass asked for no gradient; a compiled
                pass of another batch size), or the resolver works elementwise and has neither weights nor Gramian.
        """
        info = self._info
        if info is None or isinstance(self.resolver, ElementwiseRule):
            raise RuntimeError(
                f"{type(self.resolver).__name__} works on each element by itself and has neither weights nor Gramian; "
                "call mmfast.gram on the gradients to see how they conflict"
            )
        reason = _NO_BACKWARD_YET if info.is_meta else info.flatten()[0].item() if info.numel() else 0.0
        if reason in _REASONS and (info.is_meta or (info == reason).all()):
            raise RuntimeError(_REASONS[reason])
        return BlockStats.of(self.names, info)

    def record(self, info: Tensor | None) -> None:
        """Keeps weights and Gramian of a backward pass."""
        if not torch.compiler.is_compiling():
            info = info if info is None else contract.plain(info)
            if self._captured or info is not None and info.is_cuda:
                self._keep(info)
            else:
                self.__dict__["_info"] = info
        elif torch._C._are_functorch_transforms_active():
            pass  # which may not write into a tensor that is not their own
        elif info is not None and self._info is not None:  # a graph can write into a tensor of ours, not bind a name
            if self._info.shape == info.shape:
                self._info.copy_(info)
            else:
                self._info.fill_(_OTHER_SHAPE)

    def _keep(self, info: Tensor | None) -> None:
        """Binds the name, but where a CUDA graph writes into what it is bound to: of a replay after an eager pass nothing would be seen."""
        before = self._info
        if self._captured and info is not None and before is not None and (info.shape, info.device) == (before.shape, before.device):
            before.copy_(info)
        else:
            self.__dict__.update(_info=info, _captured=info is not None and _capturing(info))

    def no_gradient_wanted(self) -> None:
        """Called in a forward pass whose tensor asks for no gradient: what was recorded before is not what a backward pass now sees."""
        if not self.training or not torch.is_grad_enabled():
            return  # an evaluation between backward pass and stats()
        info = self._info
        if info is None:
            return
        if not torch.compiler.is_compiling():  # a tensor that says so: compiled code, which can't unset a name, writes over it
            shape = info.shape if info.numel() else (self._k + self._k**2,)
            self._keep(torch.full(shape, _NO_GRADIENT, dtype=info.dtype, device=info.device))
        elif not torch._C._are_functorch_transforms_active():
            info.fill_(_NO_GRADIENT)

    def _apply(self, fn: Any, recurse: bool = True) -> "Impartial":
        before = self.beta
        super()._apply(fn, recurse)
        if before is not None and self.beta is not None:  # stays float64 in a model that changes its dtype
            self.beta = self._with_values(before, self.beta.device)
        if self._info is not None:
            device = fn(self._info).device
            self._info = torch.full_like(self._info, _NO_BACKWARD_YET, device=device) if self._info.is_meta else self._info.to(device)
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args, **kwargs)
        if local_metadata.get("assign_to_params_buffers") and self._info is not None and self._info.is_meta:
            self._settle(next((x.device for name, x in state_dict.items() if name.startswith(prefix)), self._info.device))

    def _keep_own(self, state_dict: Any, prefix: str) -> None:
        """Adds to the checkpoint of branches without a block what the block keeps besides them, as it is."""
        for name, value in self.state_dict(prefix=prefix).items():
            if name.startswith((prefix + "resolver.", prefix + "beta", prefix + "modulation.")):
                state_dict.setdefault(name, value)

    def extra_repr(self) -> str:
        beta = None if self.beta is None else self._given if self.beta.is_meta else self.beta.tolist()
        local = "" if beta is None else f", local=[{', '.join(f'{b:.4g}' for b in beta)}]"
        group = "" if self.ranks is None else f", group of {self.ranks.size} ranks"
        return f"per={self.per!r}, preserve_norm={self.preserve_norm}{local}{group}"
