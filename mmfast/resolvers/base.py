"""What a resolver is: a module from a K x K Gramian to K weights."""

import math
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from mmfast import contract
from mmfast.resolvers.philox import Draw

EPS = torch.finfo(torch.float64).eps


def cancelled(precision: float) -> float:
    """A squared length below this part of its summands' squared sum is their rounding: its direction means nothing."""
    return max(1e-14, 8 * precision)


@dataclass
class Problem:
    """A batch of K x K problems as the plain-torch form of a rule sees it.

    Rows that do not take part have 1 on the diagonal and 0 elsewhere; whatever a rule returns for them is ignored.
    """

    G: Tensor  # [B, K, K] float64 Gramian / scale, trace over the active rows in [1, 4); lifted for rules that ask for it (solve.py)
    active: Tensor  # [B, K] bool
    scale: Tensor  # [B] a power of four
    state: Tensor | None  # [B, S] float64; zeros at first
    draw: Draw | None  # random streams, for rules with random = True
    precision: float = EPS  # relative rounding of the entries of G
    lift: Tensor | float = 0.0  # [B, 1]: part of each squared norm on the diagonal of G that the gradients do not have
    next_state: Tensor | None = None  # [B, S], to be set by rules that keep state

    @property
    def count(self) -> Tensor:
        """Number of active rows [B], float64."""
        return self.active.sum(-1).double()

    @property
    def cancelled(self) -> float:
        """`cancelled` of the precision of G."""
        return cancelled(self.precision)


def numbers(G: Tensor, values: Sequence[float]) -> Tensor:
    """values [K] as a tensor like G, by fills: a copy from the host would wait for the device, and end the capture of a CUDA graph."""
    return torch.stack([G.new_full((), value) for value in values])


def new_stream(device: torch.device | None = None) -> Tensor:
    """A random stream, seed and number of calls: the seed is drawn from torch's generator, so that torch.manual_seed governs it."""
    return torch.stack([torch.randint(2**53, (), device=device), torch.zeros((), dtype=torch.int64, device=device)])


def check_not_capturing(device: torch.device, what: str) -> None:
    """Raises where `what` is to be made on a GPU while a CUDA graph is captured: each replay would make it anew, and from the host nothing can come."""
    if device.type == "cuda" and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"{what} comes to the GPU on first use, which cannot be a CUDA graph's capture; call once before the capture")


def on_device(buffer: Tensor, device: torch.device) -> Tensor:
    """A state or stream on another device; from the meta device, where there are no values, it comes as it is at first."""
    check_not_capturing(device, "what a rule keeps")
    if not buffer.is_meta or device.type == "meta":
        return buffer.to(device)
    return torch.zeros_like(buffer, device=device) if buffer.is_floating_point() else new_stream(torch.device("cpu")).to(device)


def kept_by_apply(before: Tensor | None, after: Tensor | None) -> Tensor | None:
    """What a state or stream is after `Module._apply`: its own values and dtype, whatever memory or precision the function gave (to_empty, half)."""
    if before is None or after is None or after is before or type(after) is not Tensor:
        return after
    return on_device(before, after.device)


def was_saved(local_metadata: dict[str, object]) -> bool:
    """Whether a module had a place in the checkpoint that is loaded; parts of one (`strict=False`) change only what they hold."""
    return "version" in local_metadata


class Resolver(nn.Module):
    """Maps the Gramian of K gradients to K weights; subclass it and write `forward` for a rule of your own.

    `forward(G, mask=None)` takes float64 [..., K, K] (and a bool mask [K] or [..., K], False where a row is missing)
    and returns the weights [..., K] in float64: the resolved gradient is sum_i w_i g_i.

        >>> class Shortest(mf.Resolver):
        ...     def forward(self, G, mask=None):
        ...         squares = G.diagonal(dim1=-2, dim2=-1)
        ...         squares = squares if mask is None else torch.where(mask, squares, torch.inf)
        ...         return torch.nn.functional.one_hot(squares.argmin(-1), G.shape[-1]).double()
    """

    keeps: ClassVar[bool] = False  # True where it goes on from its last call, though no rule of its chain says so
    of_parameters: ClassVar[bool] = False  # True where it keeps numbers of single elements, which must be the same ones at every call
    degree: float = 0.0  # the weights of c times the gradients are c^degree times theirs; 0 where only ratios of the gradients matter

    def forward(self, G: Tensor, mask: Tensor | None = None) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define forward(G, mask=None) -> weights")

    def check(self, k: int) -> None:
        """Raises ValueError where the resolver cannot serve k gradients."""

    def chain(self) -> "list[Rule] | None":
        """The rules whose steps the compiled solver runs for this resolver, or None where only its `forward` can."""
        return None

    def keeps_state(self, k: int) -> bool:
        """Whether it goes on from its last call of k gradients."""
        return self.keeps or any(rule.state_size(k) for rule in self.chain() or ())

    def reset(self) -> None:
        """Forgets what was kept from earlier calls."""


class Rule(Resolver):
    """A built-in rule: hyper-parameters, a plain-torch form (`rule` or `rows`), and the number of its C++ solver.

    Every one takes `every=R`: it is solved at each R-th call, and its weights are kept in between (`Hold`).
    """

    method: ClassVar[int]  # id of its Rule<> in csrc/solvers
    random: bool = False  # True where it draws random numbers; read once, when the rule is made
    lifts: ClassVar[bool] = False  # True where it follows the inverse of the Gramian, and must not follow its rounding (solve.py)
    needs_gram: ClassVar[bool] = True  # False where the weights do not depend on the Gramian
    smooths: ClassVar[bool] = False  # True where it changes the weights of the step before (CRMOGM, Hold)

    def __init__(self, *, every: int = 1) -> None:
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise ValueError(f"{type(self).__name__}: every is {every!r}, expected a number of calls, 1 or more")
        super().__init__()
        self.state: Tensor | None
        self.rng: Tensor | None
        self.register_buffer("state", None)
        self.register_buffer("rng", new_stream() if self.random else None)  # one stream per resolver
        self.hold: Hold | None = Hold(self, every) if every > 1 else None  # the step after it, where it is not solved at every call

    @property
    def every(self) -> int:
        """At which calls it is solved; set when the rule is made."""
        return 1 if self.hold is None else self.hold.every

    def params(self) -> list[float]:
        """Hyper-parameters in the order in which the C++ solver reads them."""
        return []

    def state_size(self, k: int) -> int:
        """Number of float64 values kept per problem of k rows."""
        return 0

    def rows(self, p: Problem) -> Tensor:
        """Row map A [B, K, K]: row i becomes sum_j A[i, j] g_j. Only rules that map rows define it."""
        raise NotImplementedError

    def rule(self, p: Problem) -> Tensor:
        """Weights [B, K] in plain torch: the reference of the C++ solver."""
        return self.rows(p).sum(-2)

    @property
    def maps_rows(self) -> bool:
        return type(self).rows is not Rule.rows

    def chain(self) -> "list[Rule] | None":
        return [self] if self.hold is None else [self, self.hold]

    def forward(self, G: Tensor, mask: Tensor | None = None) -> Tensor:
        return weights_of(self, G, mask)

    def reset(self) -> None:
        if self.hold is not None:
            self.hold.reset()
        self.state = None
        if self.rng is not None:
            self.rng[1] = 0

    def reset_parameters(self) -> None:
        """State zero, and a seed drawn anew: what FSDP's users call of every module after `to_empty`."""
        if self.state is not None:
            self.state = torch.zeros_like(self.state)
        if self.rng is not None:
            self.rng = on_device(self.rng.to("meta"), self.rng.device)

    def _apply(self, fn, recurse=True):
        state, rng = self.state, self.rng
        super()._apply(fn, recurse)
        self.state, self.rng = kept_by_apply(state, self.state), kept_by_apply(rng, self.rng)
        return self

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        # the state takes its shape from the first problem it meets, so a saved one may be larger than ours
        saved, own = state_dict.get(prefix + "state"), self.state
        if saved is not None:
            self.state = torch.empty_like(saved, device=saved.device if own is None else own.device)
        elif was_saved(local_metadata):
            self.state = None  # before the first problem
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def extra_repr(self) -> str:
        return ""

    def __repr__(self) -> str:
        every = [] if self.hold is None else [f"every={self.hold.every}"]
        return f"{type(self).__name__}({', '.join([self.extra_repr(), *every] if self.extra_repr() else every)})"


class Hold(Rule):
    """The weights of another rule between the calls that solve it: what `every` adds to it as a step of its own. Mirrors csrc/solvers/hold.h.

    The rule is solved at every R-th call of a problem and whenever a row is there that was missing when it was; a row that is missing in between gets
    weight 0. Weights of c times the gradients are c^degree times those for the gradients: c is the mean change of the norms since.
    """

    method = 23
    smooths = True
    needs_gram = False  # but the norms, where its rule does
    of: Rule

    def __init__(self, rule: Rule, every: int) -> None:
        super().__init__()
        self.__dict__["of"] = rule  # not as a submodule: it has this one for its own
        self._every = every

    @property
    def every(self) -> int:
        """Every how many calls its rule is solved."""
        return self._every

    def params(self) -> list[float]:
        return [float(self.every), self.of.degree]

    def state_size(self, k: int) -> int:
        return 2 * k + 1

    def due(self, p: Problem, state: Tensor) -> Tensor:
        """Which problems are solved at this call [B, 1]."""
        k = p.G.shape[-1]
        norms, calls = state[..., k : 2 * k], state[..., 2 * k :]
        return (calls == 0) | (calls >= self.every) | (p.active & (norms == 0)).any(-1, keepdim=True)

    def smooth(self, p: Problem, w: Tensor) -> Tensor:
        """The weights [B, K] of this call, for weights w of the rule."""
        assert p.state is not None
        kept, norms, calls = p.state.split([w.shape[-1]] * 2 + [1], -1)
        due, norm = self.due(p, p.state), (p.G.diagonal(dim1=-2, dim2=-1) * p.scale.unsqueeze(-1)).sqrt()
        change = torch.where(p.active, norm / torch.where(norms == 0, 1, norms), 0).sum(-1, keepdim=True) / p.count.unsqueeze(-1)
        now = torch.where(due, w, kept if self.of.degree == 0 else kept * change**self.of.degree)
        kept, norms, calls = (torch.where(due, new, old) for new, old in ((w * p.active, kept), (norm * p.active, norms), (0.0, calls)))
        p.next_state = torch.cat([kept, norms, calls + 1], -1)
        return now

    def extra_repr(self) -> str:
        return f"every={self.every}"


class PreferringRule(Rule):
    """A rule with a preference for each gradient, or None for equal ones."""

    def __init__(self, pref: Sequence[float] | None, *, every: int = 1) -> None:
        super().__init__(every=every)
        self.pref = None if pref is None else tuple(float(x) for x in pref)
        if self.pref is not None and not (all(math.isfinite(x) and x >= 0 for x in self.pref) and any(self.pref)):
            raise ValueError(f"pref is {contract.shortened(self.pref)}, expected K finite numbers, none negative, not all zero")

    def params(self) -> list[float]:
        return list(self.pref or ())

    def check(self, k: int) -> None:
        if self.pref is not None and len(self.pref) != k:
            raise ValueError(f"pref has {len(self.pref)} numbers, expected {k}, one per gradient")

    def preference(self, p: Problem, equal: Tensor) -> Tensor:
        """[B, K], zero for rows that do not take part; `equal` where none was given."""
        return torch.where(p.active, equal if self.pref is None else numbers(p.G, self.pref), 0)

    def extra_repr(self) -> str:
        return "" if self.pref is None else f"pref={self.pref}"


def weights_of(resolver: Resolver, G: Tensor, mask: Tensor | None) -> Tensor:
    """The weights of a chain of rules that is called as a module: the operator solves it, as it does everywhere else."""
    from mmfast.ops.weights import weights  # the one import that runs up the house

    return weights(G, resolver, mask)


# How exact the Gramian is that a resolver written in Python sees: one inside another must not take rounding for a direction.
_precision: ContextVar[float] = ContextVar("precision", default=0.0)


def known_precision() -> float:
    """Relative rounding of the Gramian that is being resolved; float64's own where nobody said, or in a traced graph."""
    return EPS if torch.compiler.is_compiling() else max(_precision.get(), EPS)


def call_resolver(resolver: Resolver, G: Tensor, mask: Tensor, precision: float) -> Tensor:
    """The weights of a resolver's `forward`, checked, zero where masked; it is made known how exact G is."""
    if torch.compiler.is_compiling():  # a traced graph can't hold context variables
        w = resolver(G, mask)
    else:
        token = _precision.set(max(_precision.get(), precision))
        try:
            w = resolver(G, mask)
        finally:
            _precision.reset(token)
    if not isinstance(w, Tensor) or w.shape != G.shape[:-1]:
        raise ValueError(
            f"{type(resolver).__name__} returned {tuple(w.shape) if isinstance(w, Tensor) else type(w).__name__} for a Gramian of shape "
            f"{tuple(G.shape)}, expected weights of shape {tuple(G.shape[:-1])}"
        )
    return torch.where(mask, w.detach().double(), 0)
