"""What is given of a batch: which modalities, which of their rows, and something harmless in place of the absent ones."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class Batch:
    """The modalities of a batch, in the model's order; those that were not given are not in it."""

    x: dict[str, Tensor]  # each [B, *]
    present: dict[str, Tensor] | None  # bool [B] of each, None where no row is absent

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.x)

    @property
    def rows(self) -> int:
        return next(iter(self.x.values())).shape[0]


def filled(x: Tensor, present: Tensor) -> Tensor:
    """x with each absent row replaced by a present one in turn, by ones where none is: what it held is not read, and what stands there suits a likelihood, a zero
    not every one's (the logarithm or the norm of one has no derivative, and zero times that is NaN)."""
    places = torch.arange(x.shape[0], device=x.device)
    present_first = (~present).to(torch.uint8).argsort(stable=True)
    rows = torch.where(present, places, present_first[places % present.sum().clamp(min=1)])
    return torch.where(present.any(), x[rows], torch.ones_like(x))


def check_part(what: str, name: object, marks: str = ".") -> None:
    """Raises where a part of a model can't bear a name: in an nn.ModuleDict, and beside marks that join names."""
    if not isinstance(name, str) or not name or set(name) & set(marks):
        raise ValueError(f"{what} has {name!r}, expected names without {' or '.join({'.': 'a dot', '+': 'a plus'}[m] for m in marks)}")
    if hasattr(nn.ModuleDict(), name):
        raise ValueError(f"{what} has {name!r}, which torch.nn.ModuleDict has as an attribute; expected another name")


def _check_names(names: Iterable[str], known: Sequence[str], what: str) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"{what} has {name!r}, expected names among {', '.join(known)}")


def batch_of(
    inputs: Mapping[str, Tensor], present: Mapping[str, Tensor] | None, known: Sequence[str], subset: Iterable[str] | None = None
) -> Batch:
    """What is given, checked; of a subset alone where one is asked for."""
    if not isinstance(inputs, Mapping):
        raise TypeError(f"inputs is a {type(inputs).__name__}, expected a dict from names to tensors")
    _check_names(inputs, known, "inputs")
    if present is not None and not isinstance(present, Mapping):
        raise TypeError(f"present is a {type(present).__name__}, expected a dict from names to bool tensors [B]")
    if isinstance(subset, str):
        raise TypeError(f"subset is the string {subset!r}, expected several names, such as [{subset!r}]")
    asked = set(known) if subset is None else set(subset)
    if not asked:
        raise ValueError(f"subset is empty, expected names among {', '.join(known)}, or None for all of them")
    _check_names(asked, known, "subset")
    _check_names(present or (), tuple(inputs), "present")
    x = {name: inputs[name] for name in known if name in inputs and name in asked}
    if not x:
        raise ValueError(
            f"inputs has {', '.join(inputs) or 'no modality'}, expected at least one of {', '.join(n for n in known if n in asked)}"
        )
    for name, value in x.items():
        if not isinstance(value, Tensor) or not value.dim():
            raise TypeError(f"inputs[{name!r}] is a {type(value).__name__}, expected a tensor [B, *]")
    rows = next(iter(x.values())).shape[0]
    for name, value in x.items():
        if value.shape[0] != rows:
            raise ValueError(f"inputs[{name!r}] has {value.shape[0]} rows, expected {rows} like the others")
    masks = {name: mask for name, mask in (present or {}).items() if name in x}
    if not masks:
        return Batch(x, None)
    for name, mask in masks.items():
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != (rows,):
            found = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
            raise ValueError(f"present[{name!r}] is {found}, expected bool ({rows},)")
    everywhere = torch.ones(rows, dtype=torch.bool, device=next(iter(masks.values())).device)
    x = {name: filled(value, masks[name]) if name in masks else value for name, value in x.items()}
    return Batch(x, {name: masks.get(name, everywhere) for name in x})
