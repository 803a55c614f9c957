"""backward with group=: each loss's gradients at the parameters, averaged over the ranks, which all hold the same parameters."""

import zlib
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from mmfast import contract
from mmfast.ops import across
from mmfast.ops.across import Ranks
from mmfast.resolvers.base import Resolver

Row = list[Tensor | None]  # a loss's gradient at each parameter


def check_parameters(
    shared: Sequence[Tensor], heads: Sequence[Tensor], reached: Iterable[Tensor], names: tuple[str, ...], ranks: Ranks
) -> None:
    """Raises on every rank where the ranks do not hold the same lists, and on this one where a loss reaches a parameter that is in neither."""
    known = {id(p) for p in (*shared, *heads)}
    strange = [tuple(p.shape) for p in reached if id(p) not in known]
    if strange:
        raise ValueError(
            f"with group=, params and heads must name every parameter that the losses reach, on every rank in the same order, but {len(strange)} are in "
            f"neither (shapes {', '.join(map(str, strange[:4]))})"
        )
    kinds = [(tuple(p.shape), p.dtype) for p in (*shared, *heads)]
    mine = [len(names), len(shared), len(heads), zlib.crc32(repr((names, kinds)).encode())]
    device = (*shared, *heads)[0].device
    most = ranks.largest(torch.tensor([*mine, *(-x for x in mine)], device=device)).tolist()
    if most != [*mine, *(-x for x in mine)]:
        raise ValueError(
            f"the ranks of the group were given other losses, params or heads than each other: this one has {len(names)} losses ({contract.shortened(names)}), {len(shared)} parameters in params and "
            f"{len(heads)} in heads; expected the same on every rank, in the same order (None for a loss that one lacks)"
        )


def averaged(
    rows: Mapping[str, Row],
    names: Sequence[str],
    sums: Sequence[tuple[Tensor, Tensor]],
    shared: Sequence[Tensor],
    heads: Sequence[Tensor],
    ranks: Ranks,
) -> tuple[dict[str, Row], list[tuple[Tensor, Tensor]]]:
    """(each loss's row, the heads with their gradients): the means over the ranks, None or left out where no rank has a gradient; what one rank lacks is zero there.

    One all-reduce of the parameters' size for each loss and one of the heads' for all, after a short one of what is there.
    """
    own = {id(p): g for p, g in sums}
    table = [rows.get(name, [None] * len(shared)) for name in names]
    table.append([own.get(id(p)) for p in heads])
    here = [g is not None for row in table for g in row]
    anywhere = ranks.largest(torch.tensor(here, dtype=torch.int64, device=(*shared, *heads)[0].device)).bool().tolist()
    means: list[Row] = []
    for params, row in zip([*[shared] * len(names), heads], table, strict=True):
        reached, anywhere = anywhere[: len(params)], anywhere[len(params) :]
        means.append(_mean(params, row, reached, ranks))
    return dict(zip(names, means, strict=False)), [(p, g) for p, g in zip(heads, means[-1], strict=True) if g is not None]


@torch.no_grad()
def _mean(params: Sequence[Tensor], row: Row, reached: Sequence[bool], ranks: Ranks) -> Row:
    """The mean over the ranks of each gradient that a rank has; 16-bit numbers are summed as float32."""
    found: Row = [None] * len(params)
    for dtype in dict.fromkeys(p.dtype for p, there in zip(params, reached, strict=True) if there):
        places = [t for t, p in enumerate(params) if reached[t] and p.dtype == dtype]
        parts = [torch.zeros_like(params[t]) if (g := row[t]) is None else g.to_dense() for t in places]
        flat = torch.cat([x.reshape(-1) for x in parts])
        flat = ranks.total(flat.float() if flat.dtype.itemsize == 2 else flat) / ranks.size
        for t, x in zip(places, flat.split([params[t].numel() for t in places]), strict=True):
            found[t] = x.view(params[t].shape).to(dtype)
    return found


def agree_on_what_is_kept(resolver: Resolver, k: int, params: Sequence[Tensor], ranks: Ranks) -> None:
    """States and random streams of all ranks become those of the first one."""
    device = params[0].device if params else torch.device("cpu")
    kept = across.kept_by(resolver, k, device)
    if kept:
        across.agree(torch.zeros(0, dtype=torch.float64, device=device), kept, ranks)
