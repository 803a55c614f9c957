"""watch: what becomes of a fusion layer's modalities while a model trains."""

from collections.abc import Mapping
from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmfast.blocks import transforms
from mmfast.collapse.alignment import similarity
from mmfast.collapse.collisions import collision_bound, energy_shares, participation, widths
from mmfast.collapse.figure import draw
from mmfast.collapse.layers import checked, multiplies, rows_of
from mmfast.collapse.rank import TOL, effective, numerical, singular_values


@dataclass(frozen=True)
class Record:
    """One look at a fusion layer, in one training step.

    Attributes:
        step: how many steps came before it.
        participation: [out] float64 on the CPU, over how many modalities each neuron's weights spread, see `mf.collapse.participation`.
        effective_rank, numerical_rank: of the features of each modality, of "fused", the layer's output, and of "gradient", that of its weight in
            this step. Features are those of the step's batch, so no rank is above the number of its rows. NaN for what is not finite.
        similarity: [m, m] float64 on the CPU, of the modalities' features, see `mf.collapse.similarity`.
    """

    step: int
    participation: Tensor
    effective_rank: dict[str, float]
    numerical_rank: dict[str, float]
    similarity: Tensor


class Watch:
    """What `watch` gives back: the records so far, the figure, and the hooks in the model. Also a context manager."""

    def __init__(self, layer: nn.Module, modalities: Mapping[str, int], every: int) -> None:
        self.layer, self.modalities, self.every = layer, dict(modalities), every
        self.records: list[Record] = []
        self._steps = 0
        self._features: tuple[Tensor, Tensor] | None = None
        weight: Any = layer.weight
        seen, stepped = (torch.compiler.disable(hook) for hook in (_seen, _stepped))  # here, for it imports torch._dynamo
        self._hooks = [
            layer.register_forward_hook(lambda module, args, output: seen(self, module, args, output), prepend=True),
            weight.register_hook(lambda grad: stepped(self, grad)),
        ]

    def shares(self) -> Tensor:
        """The share of each modality in the energy of each neuron's weights as they are now, float64 [out, m]; rows add up to one."""
        weight: Any = self.layer.weight
        return energy_shares(weight, list(self.modalities.values()))

    def plot(self, path: str | Path) -> None:
        """Draws the heat map of neurons by modality, and the effective ranks over training, into an image file; needs matplotlib."""
        draw(self, path)

    def remove(self) -> None:
        """Takes the hooks out of the model; the records stay."""
        for hook in self._hooks:
            hook.remove()
        self._features = None

    def __enter__(self) -> "Watch":  # noqa: PYI034 typing has Self from Python 3.11 on
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __str__(self) -> str:
        """The last record as a table."""
        sizes = list(self.modalities.values())
        if not self.records:
            return "nothing recorded yet"
        last = self.records[-1]
        width = max(8, *map(len, last.effective_rank))
        lines = [f"{'step ' + str(last.step):<{width}}  {'effective rank':>14}  {'numerical':>9}  {'of':>5}"]
        size_of = {**self.modalities, "fused": len(last.participation)}
        for name, rank in last.effective_rank.items():
            lines.append(
                f"{name:<{width}}  {rank:>14.1f}  {last.numerical_rank[name]:>9.0f}  {size_of.get(name, min(sum(sizes), len(last.participation))):>5}"
            )
        mean = last.participation.nanmean()
        return "\n".join([*lines, f"modalities a neuron: {mean:.2f} of {len(sizes)}; collision bound {collision_bound(sizes):.2f}"])

    def _look(self, x: Tensor, y: Tensor, grad: Tensor) -> Record:
        parts = dict(zip(self.modalities, x.split(list(self.modalities.values()), 1), strict=True))
        sigmas = {name: singular_values(matrix) for name, matrix in {**parts, "fused": y, "gradient": grad.flatten(1)}.items()}
        weight: Any = self.layer.weight
        return Record(
            self._steps,
            participation(weight, list(self.modalities.values())).cpu(),
            {name: float(effective(sigma)) for name, sigma in sigmas.items()},
            {name: float(numerical(sigma, TOL)) for name, sigma in sigmas.items()},
            similarity(parts).cpu(),
        )


def _seen(watch: Watch, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
    """Keeps the features of a training step that is looked at, until its backward pass; a deep copy of the model has the hook too, and is not the layer."""
    if module is not watch.layer or not module.training or not torch.is_grad_enabled() or transforms.active() or watch._steps % watch.every:
        return
    # what comes after the layer may write into its output
    watch._features = rows_of(args[0].detach(), watch.layer), rows_of(output.detach(), watch.layer).clone()


@torch.no_grad()
def _stepped(watch: Watch, grad: Tensor) -> None:
    """Called in a backward pass with the gradient of the weight: the end of a step."""
    if watch._features is not None:
        watch.records.append(watch._look(*watch._features, grad))
        watch._features = None
    watch._steps += 1


def watch(fusion_layer: nn.Module, modalities: Mapping[str, int], every: int = 100) -> Watch:
    """Watches a fusion layer of any model while it trains: ranks, participation and similarity at every so many steps.

    The layer takes the modalities' features side by side. A step is a backward pass that brings its weight a gradient; each `every`-th is looked at,
    in training mode: the features are those of the layer's last call, the gradient is the whole step's (in a process group, this rank's part of
    both). Nothing else in the model changes, the loss scale of mixed precision and gradient accumulation included. A look takes some eigenvalue
    problems of the sizes of batch, features and weight (docs/collapse.md has the times) and waits for a GPU; at all other steps it is two Python calls.
    The quantities are those of Chaudhuri et al., "A closer look at multimodal representation collapse", ICML 2025; its gradient outer product is
    `mf.collapse.Agop`.

    Args:
        fusion_layer: an nn.Linear on concatenated features, or a convolution on concatenated channels, whose weight is trained.
        modalities: widths of the modalities' blocks of columns, by name, in their order.
        every: steps from one look to the next.

    Returns:
        A handle: `records` is a list of `Record`, `print` shows the last one, `shares()` are the weights by modality, `plot(path)` draws; `remove()`
        takes the hooks out, which leaving a `with`
        does too.

    Raises:
        TypeError, ValueError: an argument is not as described.

    Example:
        >>> model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> with mf.collapse.watch(model[0], {"image": 4, "text": 2}, every=1) as watch:
        ...     for x in torch.randn(3, 8, 6):
        ...         model(x).square().mean().backward()
        >>> [record.step for record in watch.records], watch.records[0].participation.shape
        ([0, 1, 2], torch.Size([4]))
        >>> watch.shares().shape
        torch.Size([4, 2])
    """
    layer = checked(fusion_layer, "fusion_layer")
    weight = layer._parameters.get("weight")
    if not multiplies(layer) or weight is None or not weight.requires_grad:
        raise TypeError(
            f"fusion_layer is a {type(layer).__name__}, expected an nn.Linear or convolution on the modalities' features side by side, whose weight is "
            "a parameter of its own that wants a gradient"
        )
    if not isinstance(modalities, Mapping):
        raise TypeError(
            f"modalities is a {type(modalities).__name__}, expected a dict of widths by name, such as {{'image': 64, 'text': 32}}"
        )
    sizes = widths(list(modalities.values()), "modalities")
    if sum(sizes) != weight.shape[1]:
        raise ValueError(
            f"modalities add up to {sum(sizes)} columns, expected {weight.shape[1]}, those of fusion_layer's weight {tuple(weight.shape)}"
        )
    for name in ("fused", "gradient"):
        if name in modalities:
            raise ValueError(f"modalities has an entry {name!r}, which is a row of the record; choose another name")
    if index(every) < 1:
        raise ValueError(f"every is {every}, expected a positive number")
    return Watch(layer, modalities, every)
