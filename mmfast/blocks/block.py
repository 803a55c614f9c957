"""ImpartialityBlock: K branches on one tensor, with a fork in front of them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmfast import contract
from mmfast.blocks import transforms
from mmfast.blocks.fork import Plan, fork_by
from mmfast.blocks.impartial import Impartial
from mmfast.blocks.local_step import scale_outputs
from mmfast.blocks.scaling import LocalScale
from mmfast.resolvers.names import ResolverLike


class ImpartialityBlock(Impartial):
    """Runs K branches on one tensor and resolves their gradients there, so that no branch is trained at the others' expense.

    Javaloy, Meghdadi, Valera, "Mitigating modality collapse in multimodal VAEs via impartial optimization", ICML 2022, Algorithm 1.

    Args:
        branches: K modules, in a list, an `nn.ModuleList`, or an `nn.ModuleDict`.
        resolver: the rule of the global step, or its name or class; each block needs its own.
        local: the local step beta: K positive numbers, a `StandardScale`, `DimRatio` or `LipschitzScale`, or an `OGM`, `AGM` or `CGGM`, which finds them anew at
            every step. Branch i receives the gradient of its output times beta_i, so its parameters' gradients carry beta_i too; the resolver acts on the
            shared tensor alone. The numbers are copied; those of `beta`, a buffer of the block, hold, and may be changed in place at any time.
        per: "batch", "sample" or "batch_sum", see `fork`.
        preserve_norm: scales the resolved gradient to the length of the plain sum of the gradients, as the paper does.
        group: process group whose ranks hold parts of one batch, see `fork`.

    `load_state_dict` also takes the checkpoint of the plain ModuleList or ModuleDict of the branches, and where these are `nn.Linear` that of
    `LinearHeads`.

    Raises:
        TypeError, ValueError: an argument is not as described.

    Example:
        >>> block = mf.ImpartialityBlock([nn.Linear(4, 1), nn.Linear(4, 2)], mf.Mean(), local=[1.0, 0.5])
        >>> one, two = block(torch.randn(8, 4, requires_grad=True))
        >>> (one.sum() + two.sum()).backward()
        >>> block.stats().weights.shape
        torch.Size([2])
    """

    _branches_looked_at = False  # whether a call in inference mode has shown that none changes its input

    def __init__(
        self,
        branches: Sequence[nn.Module] | nn.ModuleList | nn.ModuleDict,
        resolver: ResolverLike,
        *,
        local: LocalScale | Sequence[float] | Tensor | None = None,
        per: str = "batch",
        preserve_norm: bool = True,
        group: Any = None,
    ) -> None:
        if not isinstance(branches, (nn.ModuleList, nn.ModuleDict)):
            if isinstance(branches, nn.Module) or not isinstance(branches, Sequence):
                raise TypeError(f"branches is a {type(branches).__name__}, expected a list of modules, a ModuleList or a ModuleDict")
            for i, branch in enumerate(branches):
                if not isinstance(branch, nn.Module):
                    raise TypeError(f"branches[{i}] is a {type(branch).__name__}, expected an nn.Module")
            branches = nn.ModuleList(branches)
        k = len(branches)
        if not 1 <= k <= contract.MAX_GRADS:
            raise ValueError(f"branches has {k} modules, expected 1 to {contract.MAX_GRADS}")
        super().__init__(k, resolver, local, per, preserve_norm, group)
        self.branches = branches
        self.tell_names()

    @property
    def names(self) -> tuple[str, ...]:
        """Of the branches: the keys of a ModuleDict, or "0", "1", ..."""
        return tuple(self.branches._modules)

    def forward(self, y: Tensor, mask: Tensor | None = None, **kwargs: Any) -> tuple[Any, ...] | dict[str, Any]:
        """Every branch's output for the shared tensor.

        Args:
            y: floating-point or complex tensor; what each branch takes as its first argument.
            mask: bool [K] or [B, K], False where a branch's gradient is to be left out, see `fork`.
            kwargs: handed to every branch.

        Returns:
            The branches' outputs in a tuple, or in a dict for a ModuleDict.

        Raises:
            RuntimeError: a branch changes its input in place, which the others share.
        """
        branches = self.branches._modules
        aliases = fork_by(y, mask, Plan(len(branches), self.resolver, self.per, self.preserve_norm, self, self.ranks))
        if torch.compiler.is_compiling():
            outputs = {name: branch(alias, **kwargs) for alias, (name, branch) in zip(aliases, branches.items(), strict=True)}  # type: ignore[misc]
        else:
            outputs = self._call_branches(branches, aliases, y, kwargs)
        local = self.local_step()
        if local is not None and not transforms.exporting():
            outputs = {name: scale_outputs(out, local, i, f"branch {name}") for i, (name, out) in enumerate(outputs.items())}
        return outputs if isinstance(self.branches, nn.ModuleDict) else tuple(outputs.values())

    def _call_branches(self, branches: dict[str, Any], aliases: Sequence[Tensor], y: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Each branch's output; raises where one changes what all of them see."""
        if len(branches) == 1 and not y.requires_grad:
            return {name: branch(aliases[0], **kwargs) for name, branch in branches.items()}
        counts = not y.is_inference()  # its changes; where it does not, the first call looks at its numbers
        before = None if counts or self._branches_looked_at else y.clone()
        outputs, version = {}, y._version if counts else 0
        for alias, (name, branch) in zip(aliases, branches.items(), strict=True):
            try:
                outputs[name] = branch(alias, **kwargs)
            except RuntimeError as error:
                if "modified inplace" in str(error):
                    raise _changed_in_place(name, f": {error}") from error
                raise
            if y._version != version if counts else before is not None and not torch.allclose(y, before, 0, 0, equal_nan=True):
                raise _changed_in_place(name, "")
        if not counts:
            self.__dict__["_branches_looked_at"] = True
        return outputs

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        branches = self.branches._modules
        own = any(key.startswith(f"{prefix}branches.{name}.") for key in state_dict for name in branches)
        if not own and prefix + "weight" in state_dict and all(type(branch) is nn.Linear for branch in branches.values()):
            _split_heads(state_dict, prefix, branches)
        elif not own and (found := self._of_plain_branches(state_dict, prefix)):
            for key in found:
                state_dict[f"{prefix}branches.{key[len(prefix) :]}"] = state_dict.pop(key)
            self._keep_own(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _of_plain_branches(self, state_dict: Any, prefix: str) -> list[str]:
        """The keys of a checkpoint of the branches without a block."""
        starts, mine = tuple(f"{prefix}{name}." for name in self.branches._modules), self.state_dict(prefix=prefix)
        return [key for key in state_dict if key.startswith(starts) and key not in mine]


def _split_heads(state_dict: Any, prefix: str, branches: dict[str, Any]) -> None:
    """Gives each linear branch its rows of the weight and bias of `LinearHeads`, where they are as many."""
    sizes = [branch.out_features for branch in branches.values()]
    for what in ("weight", "bias"):
        whole = state_dict.get(prefix + what)
        if whole is not None and len(whole) == sum(sizes):
            parts = [part.clone() for part in state_dict.pop(prefix + what).split(sizes)]
            state_dict.update({f"{prefix}branches.{name}.{what}": part for name, part in zip(branches, parts, strict=True)})


def _changed_in_place(name: str, why: str) -> RuntimeError:
    return RuntimeError(
        f"branch {name} of an mmfast.ImpartialityBlock changes its input, or a view of another tensor, in place, but all branches share one input; "
        f"set inplace=False in its first layer, or give that layer a clone() of the input{why}"
    )
