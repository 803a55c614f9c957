"""What a backward pass says once, where it does what it was asked for and that is probably not what was meant."""

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor

from mmfast import contract
from mmfast.resolvers.base import Resolver

_PIECEMEAL = ("autograd/gradcheck.py", "autograd/functional.py")  # they go back for each output by itself, and put nothing together
LOOKS = 16  # backward passes of a resolver that may be one of several: looking costs a reading of the gradients
_looks: WeakKeyDictionary[Resolver, int] = WeakKeyDictionary()
_told_apart: WeakSet[Resolver] = WeakSet()
_told_shards: WeakSet[Resolver] = WeakSet()

HAS_GROUPS = torch.distributed.is_available()  # whether this torch was built with process groups
goes_back_again = torch._C._autograd._get_current_graph_task_keep_graph  # whether the graph is kept for another backward pass


_apart: set[int] = set()  # threads that differentiate each loss by itself


def taken_apart() -> bool:
    """Asked in a backward pass that is not compiled: whether find_blocks, backward or collect is at work in this thread. Then a block passes the plain
    sum on, and keeps nothing."""
    return bool(_apart) and threading.get_ident() in _apart


@contextlib.contextmanager
def taking_apart() -> Iterator[None]:
    """No block on the way resolves, records, draws or warns; those of backward passes in other threads do."""
    thread = threading.get_ident()
    if thread in _apart:
        yield
        return
    _apart.add(thread)
    try:
        with torch.autograd.set_multithreading_enabled(False):  # or the backward pass of a GPU's tensors had a thread of its own
            yield
    finally:
        _apart.discard(thread)


def plain_sum(grads: Sequence[Tensor | None]) -> Tensor | None:
    """What a tensor gets that feeds several branches without a block."""
    there = [g for g in grads if g is not None]
    return functools.reduce(torch.add, there) if there else None


def looks(ctx: Any) -> bool:
    """Asked in a backward pass that is not compiled: whether `tell` has something to look at."""
    return ctx.seen is not None or goes_back_again() or HAS_GROUPS and torch.distributed.is_initialized()


def tell(ctx: Any, resolver: Resolver, per: str, present: Callable[..., Tensor], *gradients: Any, group: Any = None) -> None:
    """Called in a backward pass that is not compiled; present(*gradients) are the branches that it brings, looked at where that may matter."""
    if (ctx.seen is not None or goes_back_again()) and watches(resolver):
        branches_apart(ctx, resolver, present(*gradients))
    if HAS_GROUPS and group is None and torch.distributed.is_initialized():
        shards(resolver, per)


def watches(resolver: Resolver) -> bool:
    """Whether to look at which branches a backward pass brings that keeps its graph: the first times, until it was told what they are."""
    looks = _looks.get(resolver, 0)
    _looks[resolver] = looks + 1
    return looks < LOOKS and resolver not in _told_apart


def present_branches(grads: tuple[Tensor | None, ...]) -> Tensor:
    """Which of K gradients are there and not all zero, bool [K]."""
    device = next(g.device for g in grads if g is not None)
    absent = torch.zeros((), dtype=torch.bool, device=device)
    return torch.stack([absent if g is None else ((g if g.layout == torch.strided else g.to_dense()) != 0).any() for g in grads])


def present_heads(delta: Tensor, head_of: Tensor, k: int) -> Tensor:
    """The same of the gradient of K branches' outputs side by side."""
    sends = (delta != 0).reshape(-1, delta.shape[-1]).any(0)
    return sends.new_zeros(k, dtype=torch.int64).index_add(0, head_of, sends.long()) != 0


def branches_apart(ctx: Any, resolver: Resolver, present: Tensor) -> None:
    """Called in a backward pass that is one of several through one forward pass: says where they bring different branches."""
    before, ctx.seen = ctx.seen, present
    if before is None or present.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    if torch.equal(before, present) or not present.any() or _piecemeal():
        return
    _told_apart.add(resolver)
    first, then = (", ".join(str(i) for i, there in enumerate(x.tolist()) if there) or "none" for x in (before, present))
    contract.tell(
        f"a second backward call went through one forward pass of a block, with other branches (first {first}; then {then}): each call resolves only the "
        "gradients that it brings, so what conflicts between the calls was added up, not resolved; call sum(losses).backward() once instead of "
        "backward() for each loss, or give gradients that you have taken one by one to mmfast.resolve"
    )


def _piecemeal() -> bool:
    frame = sys._getframe(1)
    while frame.f_back:
        if frame.f_code.co_filename.endswith(_PIECEMEAL):
            return True
        frame = frame.f_back
    return False


def shards(resolver: Resolver, per: str) -> None:
    """Called where a process group is up: says what a block makes of it."""
    if per == "sample" or resolver in _told_shards or (ranks := torch.distributed.get_world_size()) < 2:
        return
    _told_shards.add(resolver)
    contract.tell(
        f"a process group of {ranks} ranks is up: a block resolves the gradients of each rank's own part of the batch, and what is then averaged over "
        "the ranks is not what the whole batch would give (with per='sample' it is); give the block group=torch.distributed.group.WORLD"
    )


def own_gradients(resolver: Resolver) -> None:
    """Called by `backward` without a group: says that no rank gets another one's gradients, where there is another one."""
    if not HAS_GROUPS or not torch.distributed.is_initialized():
        return
    if resolver in _told_shards or (ranks := torch.distributed.get_world_size()) < 2:
        return
    _told_shards.add(resolver)
    contract.tell(
        f"a process group of {ranks} ranks is up: mmfast.backward gives each rank the gradients of its own part of the batch, which nothing averages "
        "(DistributedDataParallel's hooks do not run there), so that the ranks' parameters drift apart; give it group=torch.distributed.group.WORLD"
    )
