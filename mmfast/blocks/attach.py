"""attach: a block in a model as it stands. Hooks give each branch aliases of its own of the tensors that it is called with, as fork does."""

import sys
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from mmfast import contract
from mmfast.blocks import notices, transforms
from mmfast.blocks.find import has_no_forward
from mmfast.blocks.fork import Plan, present_in_lists, refuse_double_backward, resolved, resolved_across, resolved_lists
from mmfast.blocks.impartial import Impartial, give_up
from mmfast.blocks.local_step import scale_outputs
from mmfast.blocks.scaling import LocalScale
from mmfast.resolvers.elementwise import ElementwiseRule
from mmfast.resolvers.names import ResolverLike

DTYPES = frozenset(contract.DTYPES + contract.COMPLEX)
# operations that show a tensor's memory in another way: two tensors that they made of one, alike in shape and strides, are one tensor
_VIEWS = frozenset(
    f"{name}Backward{overload}"
    for name in ("Alias", "Expand", "Permute", "ReshapeAlias", "Select", "Slice", "Split", "Squeeze", "T", "Transpose", "Unbind")
    + ("Unsqueeze", "View")
    for overload in range(4)
)


def _references() -> tuple[int, int, int]:
    """How many references a tensor has that only a list and its own aliases hold; the same of a view, and of what it is a view of.

    Whether torch counts those of C++ depends on its version.
    """
    ys = [torch.zeros(1), torch.zeros(1).view(1)]
    aliases = [y.view_as(y) for y in ys]
    counts = sys.getrefcount(ys[0]), sys.getrefcount(ys[1]), sys.getrefcount(ys[1]._base)
    del aliases
    return counts


_OURS, _OUR_VIEW, _OUR_BASE = _references()


def _origin(y: Tensor) -> tuple[Any, int]:
    """What made the memory that a tensor shows: the operation and which of its results, or a leaf."""
    node: Any = y.grad_fn
    result = y.output_nr
    if node is None:
        return y, 0
    while node.name() in _VIEWS:
        node, result = node.next_functions[0]
    return getattr(node, "variable", node), result


class Meeting:
    """Tensors that a branch was called with, and the aliases of them that are left for the other branches."""

    def __init__(self, ys: Sequence[Tensor], handle: "Attached") -> None:
        self.ys, self.handle = list(ys), handle
        self.versions = [y._version for y in ys]
        self.in_backward = torch._C._current_graph_task_id() != -1  # where reentrant checkpointing computes a branch again
        self.takers: list[set[int]] = [set() for _ in ys]
        flat = transforms.apply(mmfast_attach, self, *ys)
        self.aliases = [flat[i * len(ys) : (i + 1) * len(ys)] for i in range(len(handle.names))]

    def find(self, y: Tensor) -> int | None:
        """Which of them it is: the same object, or the same view of the same tensor (each h[:, 0] makes a new one)."""
        for t, mine in enumerate(self.ys):
            if mine is y:
                return t if self.versions[t] == y._version else None  # changed in place, it is another one
        if not y._is_view() or y._backward_hooks or y.retains_grad:
            return None
        return next((t for t in range(len(self.ys)) if self._shows(t, y)), None)

    def _shows(self, t: int, y: Tensor) -> bool:
        mine = self.ys[t]
        if mine._version != self.versions[t] or mine._backward_hooks or mine.dtype != y.dtype or mine.shape != y.shape:
            return False
        if mine.stride() != y.stride() or mine.storage_offset() != y.storage_offset():
            return False
        (one, i), (other, j) = _origin(mine), _origin(y)
        return one is other and i == j

    def is_only(self, y: Any) -> bool:
        return self.ys[0] is y and len(self.ys) == 1 and self.versions[0] == y._version

    def alias(self, branch: int, t: int) -> Tensor:
        self.takers[t].add(branch)
        return self.aliases[branch][t]

    def held_outside(self) -> bool:
        """Whether another branch can still come with one of them: somebody else has it, or what it is a view of."""
        for t in range(len(self.ys)):
            if self.ys[t]._version != self.versions[t]:
                continue
            if not self.ys[t]._is_view():
                if sys.getrefcount(self.ys[t]) > _OURS:
                    return True
            elif sys.getrefcount(self.ys[t]) > _OUR_VIEW or sys.getrefcount(self.ys[t]._base) > _OUR_BASE:
                return True
        return False


class mmfast_attach(torch.autograd.Function):
    """Its name stands in torch's error when an alias is changed in place."""

    @staticmethod
    def forward(ctx: Any, meeting: Meeting, *ys: Tensor) -> tuple[Tensor, ...]:
        ctx.meeting_takers, ctx.handle, ctx.in_backward = meeting.takers, meeting.handle, meeting.in_backward
        ctx.kinds = None if meeting.handle.ranks is None else [(y.shape, y.dtype, y.device) for y in ys]
        ctx.seen = None  # the branches of an earlier backward pass
        ctx.set_materialize_grads(False)
        return ys * len(meeting.handle.names)

    @staticmethod
    def backward(ctx: Any, *flat: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        handle, takers, count = ctx.handle, ctx.meeting_takers, len(ctx.meeting_takers)
        if not torch.compiler.is_compiling() and notices.taken_apart():
            return (None, *(notices.plain_sum(flat[t::count]) for t in range(count)))
        handle.close(takers)
        if ctx.in_backward:
            handle.computed_again(takers)
        plan = Plan(len(handle.names), handle.resolver, handle.per, handle.preserve_norm, handle, handle.ranks)
        across = plan.ranks is not None and plan.per != "sample"
        if not across and all(g is None for g in flat):
            return (None,) * (1 + count)
        refuse_double_backward("an attached block")
        if count == 1 and len(takers[0]) > 1 and not across:  # the usual case
            notices.tell(ctx, plan.resolver, plan.per, notices.present_branches, flat, group=plan.ranks)
            return None, resolved(plan, None, *flat)
        grads = [flat[i * count : (i + 1) * count] for i in range(plan.k)]
        shared = [t for t in range(count) if len(takers[t]) > 1]
        if not shared:
            handle.tell_apart()
        if across:  # who else took them is known to all ranks together
            if any(g is not None for g in flat):
                notices.tell(ctx, plan.resolver, plan.per, present_in_lists, grads, group=plan.ranks)
            return (None, *resolved_across(plan, None, grads, ctx.kinds, takers))
        # what one branch alone is called with is no shared tensor: its gradient passes
        out: list[Tensor | None] = [next((g[t] for g in grads if g[t] is not None), None) for t in range(count)]
        rows = [[g[t] for t in shared] for g in grads]
        if any(g is not None for row in rows for g in row):
            notices.tell(ctx, plan.resolver, plan.per, present_in_lists, rows, group=plan.ranks)
            for t, g in zip(shared, resolved_lists(plan, None, rows), strict=True):
                out[t] = g
        return (None, *out)


class Attached(Impartial):
    """What `attach` gives back: the rule and its state, the record of the last backward pass, and the hooks in the model. Also a context manager."""

    def __init__(
        self,
        branches: Mapping[str, nn.Module],
        resolver: ResolverLike,
        local: LocalScale | Sequence[float] | Tensor | None,
        per: str,
        preserve_norm: bool,
        group: Any,
    ) -> None:
        self._names = tuple(branches)
        super().__init__(len(branches), resolver, local, per, preserve_norm, group)
        self.tell_names()
        if self.ranks is not None and isinstance(self.resolver, ElementwiseRule):
            raise TypeError(
                f"resolver is {self.resolver!r}, an elementwise rule, which attach can't serve with group=; use an ImpartialityBlock there"
            )
        self._open: list[Meeting] = []
        self._met: deque[set[int]] = deque(maxlen=256)  # which branches took the tensors since the last backward pass
        self._seen_apart = self._told = self._told_hidden = False
        self._alone: set[int] = set()  # branches that were computed again by themselves
        self._hooks = []
        self._scales = local is not None
        for i, branch in enumerate(branches.values()):
            entering = Entering(self, i, _begins_in_place(branch))
            self._hooks.append(branch.register_forward_pre_hook(entering, prepend=True, with_kwargs=True))
            if self._scales:
                self._hooks.append(branch.register_forward_hook(Leaving(self, i)))
        _compile_anew()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "beta" and value is not None and not self._scales:
            raise AttributeError(
                "beta is set, but attach was called without local=, and nothing scales the branches' gradients; attach with local="
            )
        super().__setattr__(name, value)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the branches: the keys of a mapping, or "0", "1", ..."""
        return self._names

    def remove(self) -> None:
        """Takes the block out: the model is as it was."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        _compile_anew()
        self._open.clear()
        self._met.clear()
        give_up(self.resolver, len(self._names))

    def __enter__(self) -> "Attached":  # noqa: PYI034 typing has Self from Python 3.11 on
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy, which has met nobody yet."""
        return {**self.__dict__, "_open": [], "_met": deque(maxlen=self._met.maxlen)}

    def _replaced(self, i: int, copies: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        """The inputs of a branch with aliases for the tensors that want a gradient; None where there is nothing to replace."""
        if transforms.exporting() or not torch.is_grad_enabled():
            return None
        if transforms.active():
            raise RuntimeError(
                "attached branches can't be called inside a transformation of torch.func; use mmfast.ImpartialityBlock there"
            )
        if len(args) == 1 and not kwargs and type(args[0]) is Tensor and args[0].requires_grad and args[0].dtype in DTYPES:
            alias = self._aliases(i, [args[0]])[0]  # the usual call
            return (alias.clone() if copies else alias,), kwargs
        leaves, spec = tree_flatten((args, kwargs))
        places = [j for j, x in enumerate(leaves) if isinstance(x, Tensor) and x.requires_grad and x.dtype in DTYPES]
        if not places:
            self.no_gradient_wanted()
            self._tell_hidden(i, leaves)
            return None
        for j, alias in zip(places, self._aliases(i, [leaves[j] for j in places]), strict=True):
            leaves[j] = alias.clone() if copies else alias
        return tree_unflatten(leaves, spec)  # type: ignore[return-value]

    def _aliases(self, branch: int, ys: list[Tensor]) -> list[Tensor]:
        """The branch's own aliases of the tensors that it is called with."""
        for y in ys:
            contract.check_dense(y, f"the input of branch {self._names[branch]}")
            if not y.dim():
                contract.check_per(self.per, y.shape)
        fresh = [y for y in ys if not any(m.find(y) is not None for m in self._open)]
        if fresh:
            self._open[:] = [m for m in self._open if m.held_outside()]
            self._open.append(Meeting(fresh, self))
            self._met.extend(self._open[-1].takers)
        found = []
        for y in ys:
            meeting = next(m for m in self._open if m.find(y) is not None)
            t = meeting.find(y)
            assert t is not None
            found.append(meeting.alias(branch, t))
        return found

    def close(self, takers: list[set[int]]) -> None:
        """Called in a backward pass: nobody comes to these tensors any more."""
        if self._met:  # the first of the meetings that this backward pass reaches
            apart = all(len(s) == 1 for s in self._met) and len(set().union(*self._met)) > 1
            # nn.Module would look whether it is a tensor or a module, in more time than all of this takes
            self.__dict__["_seen_apart"] = apart
            self._met.clear()
        self._open[:] = [m for m in self._open if m.takers is not takers]

    def computed_again(self, takers: list[set[int]]) -> None:
        """Says once that reentrant checkpointing gives each branch a copy of its input."""
        if self._told or any(len(s) > 1 for s in takers):
            self._alone.clear()
            return
        self._alone.update(*takers)
        if len(self._alone) > 1:
            self._told = True
            contract.tell(
                f"the branches {', '.join(self._names)} of mmfast.attach are checkpointed one by one with use_reentrant=True, which hands each a copy of its input, "
                "so nothing is resolved; use use_reentrant=False, or checkpoint all of them together"
            )

    def _tell_hidden(self, i: int, leaves: Sequence[Any]) -> None:
        """Says once that what a branch shares with others is where hooks do not look."""
        if self._told_hidden:
            return
        for x in leaves:
            if not isinstance(x, (Tensor, nn.Module)) and _hides(x):
                self._told_hidden = True
                contract.tell(
                    f"branch {self._names[i]} of mmfast.attach was called with a {type(x).__name__}, in which attach looks for no tensors, so nothing is resolved "
                    "there; call branches with tensors, or tuples, lists and dicts of them, or put mmfast.fork where the object is filled"
                )
                return

    def tell_apart(self) -> None:
        """Says once that branches were called with tensors that are not the same ones."""
        if self._seen_apart and not self._told:
            self._told = True
            contract.tell(
                f"the branches {', '.join(self._names)} of mmfast.attach share no input: each was called with a tensor object of its own, so nothing is resolved; "
                "hand all of them the same tensor, not a copy made for each (mmfast.find_blocks shows where gradients meet)"
            )


class Entering:
    """What a branch calls when it is called; a copied or pickled model has a block of its own with it. A Monitor finds the handle by it."""

    def __init__(self, handle: Attached, i: int, copies: bool) -> None:
        self.handle, self.i, self.copies = handle, i, copies
        self._unseen = torch.compiler.disable(handle._replaced)

    def __reduce__(self) -> Any:
        return Entering, (self.handle, self.i, self.copies)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        if torch.compiler.is_compiling():  # who meets whom is seen while it runs: a compiled model's graph breaks here
            return self._unseen(self.i, self.copies, args, kwargs)
        met = self.handle._open
        if met and len(args) == 1 and not kwargs and met[-1].is_only(args[0]) and torch.is_grad_enabled() and not transforms.active():
            alias = met[-1].alias(self.i, 0)  # most often a branch comes with what the one before it came with
            return (alias.clone() if self.copies else alias,), kwargs
        return self.handle._replaced(self.i, self.copies, args, kwargs)


class Leaving:
    """The same behind a branch, where its outputs' gradients are scaled."""

    def __init__(self, handle: Attached, i: int) -> None:
        self.handle, self.i = handle, i

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        local = self.handle.local_step()
        return None if local is None else scale_outputs(output, local, self.i, f"branch {self.handle.names[self.i]}")


def _hides(x: Any, depth: int = 4) -> bool:
    """Whether a tensor that was computed with a gradient is somewhere in an object."""
    if isinstance(x, Tensor):
        return x.grad_fn is not None
    inside = x.values() if isinstance(x, Mapping) else x if isinstance(x, (list, tuple)) else getattr(x, "__dict__", {}).values()
    return depth > 0 and any(_hides(value, depth - 1) for value in list(inside))


def _compile_anew() -> None:
    """Drops what is compiled: it has no guard on hooks, and would go on as if none had come or gone."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def _begins_in_place(branch: nn.Module) -> bool:
    """Whether the first layer of a branch writes into its input, which then has to be a copy."""
    first = next((m for m in branch.modules() if not any(True for _ in m.children())), None)
    return bool(getattr(first, "inplace", False))


def attach(
    branches: Sequence[nn.Module] | Mapping[str, nn.Module] | nn.ModuleList | nn.ModuleDict,
    resolver: ResolverLike,
    *,
    local: LocalScale | Sequence[float] | Tensor | None = None,
    per: str = "batch",
    preserve_norm: bool = True,
    group: Any = None,
) -> Attached:
    """Makes modules of a model as it stands the branches of an impartiality block: no change to the model's code, its checkpoints or its results.

    Wherever two or more of the branches are called with the same tensor, or the same view of one (`h[:, 0]`, `z.reshape(...)`), their gradients are resolved into
    one for it, as by `fork`. A branch takes its inputs as it always did: positional or by keyword, in tuples, lists and dicts; all tensors that branches share at a call are one problem. A branch that is not called, or
    sends nothing back, is a missing modality. What one branch alone is called with passes as it is. Go back once, by `sum(losses).backward()`.
    Algorithm 1 of Javaloy, Meghdadi, Valera, "Mitigating modality collapse in multimodal VAEs via impartial optimization", ICML 2022.

    Args:
        branches: K modules of the model, 1 to 256, in a list, a ModuleList, a ModuleDict or a dict of names. They may be wrapped (DDP, torch.compile).
        resolver: the rule, or its name or class; each call of attach needs its own.
        local: as for `ImpartialityBlock`.
        per, preserve_norm: as for `fork`.
        group: process group whose ranks hold parts of one batch, see `fork`. Where branches share several tensors, each rank must bring the same ones; no
            elementwise rule.

    Returns:
        A handle: `stats()` as of a block, `remove()` takes the block out again, which leaving a `with` does too; it is a module with the rule's state, outside
        of the model. Where the model is compiled as a whole, its graph breaks at each branch; all that this process has compiled is
        compiled again, on remove() too, for torch.compile does not see hooks that come or go, nor tells which code holds the branches. A branch whose first layer works in place gets a copy.

    Raises:
        TypeError, ValueError: an argument is not as described; RuntimeError: in a call inside torch.func, or a backward pass with create_graph=True.

    Example:
        >>> encoder, heads = nn.Linear(4, 3), [nn.Linear(3, 1), nn.Linear(3, 2)]
        >>> with mf.attach(heads, mf.UPGrad()) as block:
        ...     y = encoder(torch.randn(8, 4))
        ...     sum(head(y).square().mean() for head in heads).backward()
        >>> block.stats().weights.shape
        torch.Size([2])
    """
    if isinstance(branches, (nn.ModuleDict, Mapping)):
        named = dict(branches.items())
    elif isinstance(branches, (Sequence, nn.ModuleList)):
        named = {str(i): branch for i, branch in enumerate(branches)}
    else:
        raise TypeError(f"branches is a {type(branches).__name__}, expected a list or dict of modules")
    if not 1 <= len(named) <= contract.MAX_GRADS:
        raise ValueError(f"branches has {len(named)} modules, expected 1 to {contract.MAX_GRADS}")
    for name, branch in named.items():
        if not isinstance(branch, nn.Module):
            raise TypeError(f"branches[{name}] is a {type(branch).__name__}, expected an nn.Module")
        if has_no_forward(branch):
            raise TypeError(
                f"branches[{name}] is a {type(branch).__name__}, which has no forward and is never called; expected a module that is"
            )
    if len({id(branch) for branch in named.values()}) < len(named):
        raise ValueError("branches holds a module twice, expected each once: all of its calls are one branch")
    taken = [n for n, b in named.items() if any(isinstance(getattr(h, "handle", None), Attached) for h in b._forward_pre_hooks.values())]
    handle = Attached(named, resolver, local, per, preserve_norm, group)
    if taken:  # its aliases are all that the earlier one's hooks see from now on, one branch each
        contract.tell(
            f"attached already: {', '.join(taken)}; from now on the block of the earlier mmfast.attach resolves nothing there; "
            "call remove() of its handle first"
        )
    return handle
