"""The blocks of a model, and what each has recorded since the last row: gathered where it was computed, without waiting for it."""

from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from mmfast.blocks.attach import Attached
from mmfast.blocks.impartial import Impartial
from mmfast.plots.log import columns
from mmfast.resolvers.elementwise import ElementwiseRule

MOST_SAMPLES = 256  # of a block with a problem for each: as many records stand for all


class Watched:
    """One block, and the records of its backward passes since the last fetch."""

    def __init__(self, name: str, block: Impartial) -> None:
        self.name, self.block = name, block
        self.k = len(block.names)
        self.columns = columns(name, block.names)
        self._records: list[Tensor] = []  # [N, K + K*K] each
        self._row = 0  # the first of them that belongs to the row to come
        self._counts: list[int] = []  # of problems, for each row that is complete
        self.held = 0  # numbers in the rows that are complete
        self._seen, self._version = block._info, _version(block._info)
        self._last = _bits(self._seen)  # what was in it, where that is known

    def look(self) -> bool:
        """Keeps the block's record, if a backward pass has made another one since the last look. Nothing is computed."""
        info = self.block._info
        if info is self._seen:
            if info is None or _version(info) == self._version:
                return False
            self._keep(info, copy=True)
        else:
            self._seen = info
            if info is None:
                return False
            self._keep(info, copy=False)
        self._version, self._last = _version(info), None
        return True

    def look_again(self) -> None:
        """The same where something may have written into the record without a sign that Python could see: a CUDA graph, or on a CPU Inductor's code, which is
        told by another content."""
        info = self._seen
        if info is None:
            return
        last, self._last = self._last, _bits(info)
        if _replayable(info) or (last is not None and self._last is not None and not torch.equal(last, self._last)):
            self._keep(info, copy=True)

    def _keep(self, info: Tensor, copy: bool) -> None:
        if copy:  # compiled code and CUDA graphs write into one tensor at every step
            if self._records and self._records[-1] is info:
                self._records.pop()
            info = info.clone()
        elif info.dim() > 1:
            info = info[:MOST_SAMPLES]
        if info.dim() > 1:  # the last pass serves
            del self._records[self._row :]
        self._records.append(info)

    def end_row(self) -> None:
        """What is recorded from now on belongs to the next one."""
        row = self._records[self._row :]
        count = sum(1 if info.dim() == 1 else len(info) for info in row)
        self._counts.append(count)
        self.held += sum(info.numel() for info in row)
        self._row = len(self._records)

    def take(self) -> tuple[list[Tensor], list[int]]:
        """(the records of the complete rows as vectors, how many problems each row has); the others stay."""
        taken, counts = self._records[: self._row], self._counts
        self._records, self._row, self._counts, self.held = self._records[self._row :], 0, [], 0
        return [info.flatten() for info in taken], counts


def recorded(infos: Tensor, counts: Sequence[int], k: int) -> tuple[Tensor, list[int]]:
    """infos [N, K + K*K] and how many belong to each row, without those that only say that there was nothing to resolve: squared norms below 0."""
    there = ~(infos[:, k] < 0)
    if bool(there.all()):
        return infos, list(counts)
    return infos[there], [int(row.sum()) for row in there.split(list(counts))]


def means_of(infos: Tensor, counts: Sequence[int], k: int) -> list[list[float]]:
    """Rows of conflict rate, K weights, K norms and the cosines of the pairs: means over the problems in which there was something to see.

    Args:
        infos: float64 [N, K + K*K] on the CPU, as `ops.resolve_info` gives them.
        counts: of the problems that belong to each row, in order; their sum is N.
    """
    rows = [[torch.nan] * (1 + 2 * k + k * (k - 1) // 2)] * len(counts)
    parts = infos.split(list(counts))
    for count in set(counts) - {0}:  # most often there is one: no row takes an operation of its own
        which = [n for n, c in enumerate(counts) if c == count]
        chosen = infos if len(which) == len(counts) else torch.cat([parts[n] for n in which])
        for n, row in zip(which, _means(chosen.view(len(which), count, -1), k).tolist(), strict=True):
            rows[n] = row
    return rows


def _means(infos: Tensor, k: int) -> Tensor:
    """[R, columns] from [R, N, K + K*K]. Of fifty branches K x K numbers are most of the work, so they are passed over as rarely as may be, without `stats`."""
    lengths = infos[..., k :: k + 1].sqrt()
    present = lengths != 0
    there, inverse = present.double(), torch.where(present, 1 / lengths, 0.0)
    cosines = infos[..., k:].unflatten(-1, (k, k)) * inverse.unsqueeze(-1)
    cosines *= inverse.unsqueeze(-2)
    others = there.sum(-1)
    pairs = others * (others - 1)  # each twice
    conflict = (cosines < 0).sum((-1, -2)) / pairs.clamp(min=1) + 0 * lengths.sum(-1)  # NaN of what is no number
    there_in, both = there.sum(1), there.mT @ there
    i, j = torch.triu_indices(k, k, 1)
    means = [
        ((conflict * (pairs > 0)).sum(1) / (pairs > 0).sum(1)).unsqueeze(1),
        infos[..., :k].sum(1) / there_in,
        lengths.sum(1) / there_in,
        (cosines.sum(1) / both)[:, i, j].clamp(-1, 1),
    ]
    return torch.cat(means, 1)


def _version(info: Tensor | None) -> int:
    """How often a tensor was written into."""
    return 0 if info is None or info.is_inference() else info._version


def _replayable(info: Tensor) -> bool:
    return info.is_cuda


def _bits(info: Tensor | None) -> Tensor | None:
    """A copy, in which NaN equals itself; of what is on a CPU."""
    return info.detach().clone().view(torch.int64) if info is not None and info.is_cpu else None


def blocks_of(model: nn.Module) -> list[Watched]:
    """The blocks in a model and those that `attach` put into it, by their names in it."""
    found: dict[Impartial, str] = {}
    for path, module in model.named_modules():
        if isinstance(module, Impartial):
            found[module] = ".".join(_parts(path)) or "block"
    for path, handle in _attached(model):
        found.setdefault(handle, path)
    watched, taken = [], Counter[str]()
    for block, path in found.items():
        if isinstance(block.resolver, ElementwiseRule):
            continue
        taken[path] += 1
        watched.append(Watched(path if taken[path] == 1 else f"{path}.{taken[path]}", block))
    if watched:
        return watched
    if found:
        raise ValueError(
            "model has blocks whose rules work on each element by itself (GradDrop, TrimmedMean): they have neither weights nor Gramian to watch"
        )
    raise ValueError(
        f"model is a {type(model).__name__} without a block, expected one with an ImpartialityBlock or LinearHeads in it, one that mmfast.attach "
        "was called on before, or the handle that attach gave back (a plain mmfast.fork keeps no record)"
    )


def _parts(path: str) -> list[str]:
    """Of a module's name, without what torch.compile puts in between."""
    return [part for part in path.split(".") if part != "_orig_mod"]


def _attached(model: nn.Module) -> Iterator[tuple[str, Attached]]:
    """Handles whose hooks are on modules of the model, by what is common to their branches' names."""
    paths: dict[Attached, list[list[str]]] = {}
    for path, module in model.named_modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(handle := getattr(hook, "handle", None), Attached):
                paths.setdefault(handle, []).append(_parts(path))
    for handle, branches in paths.items():
        common = []
        for parts in zip(*(branch[:-1] for branch in branches), strict=False):
            if len(set(parts)) > 1:
                break
            common.append(parts[0])
        yield ".".join(common) or "attached", handle
