"""ImpartialityBlock: K branches on one tensor, with a fork in front of them."""

from collections.abc import Sequence
from typing import Any

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
        local: the local step beta: K positive numbers, or a `StandardScale`, `DimRatio` or `LipschitzScale`. Branch i receives the gradient
            of its output times beta_i, so its parameters' gradients carry beta_i too; the resolver acts on the shared tensor alone.
        per: "batch", "sample" or "batch_sum", see `fork`.
        preserve_norm: scales the resolved gradient to the length of the plain sum of the gradients, as the paper does.

    Raises:
        TypeError, ValueError: an argument is not as described.

    Example:
        >>> block = mf.ImpartialityBlock([nn.Linear(4, 1), nn.Linear(4, 2)], mf.Mean(), local=[1.0, 0.5])
        >>> one, two = block(torch.randn(8, 4, requires_grad=True))
        >>> (one.sum() + two.sum()).backward()
        >>> block.stats().weights.shape
        torch.Size([2])
    """

    def __init__(
        self,
        branches: Sequence[nn.Module] | nn.ModuleList | nn.ModuleDict,
        resolver: ResolverLike,
        *,
        local: LocalScale | Sequence[float] | Tensor | None = None,
        per: str = "batch",
        preserve_norm: bool = True,
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
        super().__init__(k, resolver, local, per, preserve_norm)
        self.branches = branches

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
        """
        branches = self.branches._modules
        aliases = fork_by(y, mask, Plan(len(branches), self.resolver, self.per, self.preserve_norm, self))
        outputs = {name: branch(alias, **kwargs) for alias, (name, branch) in zip(aliases, branches.items(), strict=True)}  # type: ignore[misc]
        if self._beta is not None and not transforms.exporting():
            outputs = {name: scale_outputs(out, beta, name) for beta, (name, out) in zip(self._beta, outputs.items(), strict=True)}
        return outputs if isinstance(self.branches, nn.ModuleDict) else tuple(outputs.values())
