"""The problems by which the kernels of a device are held against those of the CPU, rung by rung; proof.py runs them where somebody uses mmfast."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mmfast.resolvers import MGDA, PCD, CAGrad, Compose, GradDrop, GradVac, Mean, PCGrad, TrimmedMean, UPGrad
from mmfast.resolvers.base import Resolver
from mmfast.resolvers.chain import Bound, bind

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
REPEATS = 20  # calls back to back, over memory that is used again
CPU = torch.device("cpu")


def seeded(make: Callable[[], Resolver]) -> Resolver:
    """A rule with a random stream of its own: torch's generator stays where it is."""
    with torch.random.fork_rng(devices=[]):
        rule = make()
        for module in rule.modules():
            if (stream := module._buffers.get("rng")) is not None:
                stream.copy_(torch.tensor([20241128, 0]))
    return rule


@dataclass(frozen=True)
class Resolve:
    """Gradients that conflict, and a rule; called twice, for state and random stream move on."""

    make: Callable[[], Resolver]
    k: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    per: str = "batch"
    missing: tuple[int, ...] = ()
    masked: str = ""  # "", "[K]" or "[B, K]"
    preserve_norm: bool = False
    calls: int = 2

    def inputs(self, seed: int) -> tuple[list[Tensor], Tensor | None]:
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(self.k, *self.shape, generator=generator) * torch.logspace(-1, 1, self.k).view(-1, *[1] * len(self.shape))
        if self.preserve_norm:  # what is left of the sum is below what the Gramian knows, so lengths are measured
            rows[-1] = -rows[:-1].sum(0) * (1 + 1e-3)
        total = self.k + len(self.missing)
        mask = torch.rand((self.shape[0], total), generator=generator) < 0.8 if self.masked == "[B, K]" else torch.arange(total) != 1
        return list(rows.to(self.dtype).unbind(0)), mask if self.masked else None

    def run(self, functions: Any, device: torch.device, seed: int) -> list[Tensor]:
        """What the functions of a backend make of it on the device: a result and an info for each call, then states and random stream."""
        grads, mask = self.inputs(seed)
        grads, mask = [g.to(device) for g in grads], None if mask is None else mask.to(device)
        bound = self.bound(device)
        found: list[Tensor] = []
        for _ in range(self.calls):
            found += functions.resolve(grads, self.missing, mask, bound, self.per, self.preserve_norm, True)
        return found + [state for state in bound.states if state is not None] + ([] if bound.rng is None else [bound.rng])

    def bound(self, device: torch.device) -> Bound:
        chain = seeded(self.make).chain()
        assert chain is not None
        return bind(chain, self.shape[:1] if self.per == "sample" else (), self.k + len(self.missing), device)

    def tolerances(self) -> Iterator[float]:
        """Of each tensor of `run` where bits are not promised: relative to its largest element."""
        wide = self.dtype == torch.float64
        result, info = max(4 * torch.finfo(self.dtype).eps, 1e-11 if wide else 1e-4), 1e-10 if wide else 1e-3
        return itertools.chain(itertools.chain.from_iterable([(result, info)] * self.calls), itertools.repeat(info))

    def __str__(self) -> str:
        options = [
            f"per={self.per!r}",
            *([f"missing {self.missing}"] if self.missing else []),
            *([f"mask {self.masked}"] if self.masked else []),
        ]
        name = f"{seeded(self.make)!r}, {self.k} gradients {list(self.shape)} of {self.dtype}"
        return ", ".join([name, *options, *(["preserve_norm"] if self.preserve_norm else [])])


@dataclass(frozen=True)
class Heads:
    """Linear branches of some numbers of outputs; the matrix product at their end is torch's, and rounded as torch does."""

    sizes: tuple[int, ...]
    dtype: torch.dtype
    per: str = "batch"
    masked: bool = False

    def run(self, functions: Any, device: torch.device, seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        k, outputs, batch = len(self.sizes), sum(self.sizes), 7
        delta = torch.randn(batch, outputs, generator=generator).to(self.dtype).to(device)
        weight = torch.randn(outputs, 129, generator=generator).to(self.dtype).to(device)
        head_of = torch.arange(k).repeat_interleave(torch.tensor(self.sizes)).to(device)
        mask = (torch.arange(k) != 1).to(device) if self.masked else None
        chain = seeded(PCGrad).chain()
        assert chain is not None
        bound = bind(chain, (batch,) if self.per == "sample" else (), k, device)
        return list(functions.heads(delta, weight, head_of, mask, bound, k, self.per, True))

    def tolerances(self) -> Iterator[float]:
        product = max(8 * torch.finfo(self.dtype).eps, 0 if self.dtype == torch.float64 else 4e-3)  # TF32, where the user allows it
        return itertools.chain([product], itertools.repeat(1e-3 if self.dtype != torch.float64 else 1e-10))

    def __str__(self) -> str:
        return f"linear branches of {self.sizes} outputs in {self.dtype}, per={self.per!r}{', mask [K]' if self.masked else ''}"


@dataclass(frozen=True)
class Elementwise:
    """A rule that decides element by element."""

    make: Callable[[], Resolver]
    k: int
    dtype: torch.dtype
    masked: bool = False

    def run(self, functions: Any, device: torch.device, seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        grads = [g.to(self.dtype).to(device) for g in torch.randn(self.k, 9, 333, generator=generator)]
        mask = (torch.rand(9, self.k, generator=generator) < 0.8).to(device) if self.masked else None
        rule: Any = seeded(self.make)
        return [rule.through(functions, grads, (), mask) for _ in range(2)]

    def tolerances(self) -> Iterator[float]:
        return itertools.repeat(max(4 * torch.finfo(self.dtype).eps, 1e-5 if self.dtype != torch.float64 else 1e-12))

    def __str__(self) -> str:
        return f"{seeded(self.make)!r}, {self.k} gradients of {self.dtype}{', mask [B, K]' if self.masked else ''}"


Problem = Resolve | Heads | Elementwise


def _rules(thorough: bool) -> Sequence[Callable[[], Resolver]]:
    """Those whose numbers have the same bits on every device: no exponentials, logarithms or powers."""
    few: list[Callable[[], Resolver]] = [MGDA, PCGrad, PCD, UPGrad]
    return few + [lambda: CAGrad(0.4), GradVac, Mean, lambda: Compose(GradVac(), PCGrad())] if thorough else few


def _fused(shapes: Sequence[tuple[int, ...]], per: str, thorough: bool) -> list[Resolve]:
    """For the paths of one launch: at most eight rows, four of float64."""
    rules, shape_of, found = itertools.cycle(_rules(thorough)), itertools.cycle(shapes), []
    for k, dtype in itertools.product((3, 5, 8) if not thorough else range(1, 9), DTYPES):
        k = min(k, 4 if dtype == torch.float64 else 8)
        masked = "" if k == 3 else "[B, K]" if per == "sample" else "[K]"
        found.append(Resolve(next(rules), k, dtype, next(shape_of), per, (1,) if k == 3 else (), masked))
    again = Resolve(UPGrad, 5, torch.float32, shapes[-1], per, calls=REPEATS)
    return [*found, Resolve(Mean, 4, torch.float32, shapes[0], per, preserve_norm=True), again]


def _general(thorough: bool) -> list[Resolve]:
    """For the kernels of several launches, which take everything."""
    rules, found = itertools.cycle(_rules(thorough)), []
    kinds = itertools.cycle([("batch", (1, 4097)), ("batch_sum", (3, 1367)), ("sample", (7, 901))])
    for k, dtype in itertools.product((3, 5, 8) if not thorough else (1, 2, 3, 4, 5, 8, 9, 13, 34), DTYPES):
        per, shape = next(kinds)
        masked = "[B, K]" if k == 5 else "[K]" if k == 8 else ""
        found.append(Resolve(next(rules), k, dtype, shape, per, (0,) if k == 3 else (), masked))
    more = [Resolve(Mean, 4, torch.float32, shape, per, preserve_norm=True) for per, shape in (("batch", (1, 9001)), ("sample", (3, 333)))]
    return [*found, Resolve(UPGrad, 13, torch.float32, (2, 3001)), *more, Resolve(UPGrad, 5, torch.float32, (1, 60_001), calls=REPEATS)]


def _heads(thorough: bool) -> list[Heads]:
    sizes = [(3, 1, 7), (5, 2, 20, 6)] + ([(31, 1, 1, 32), (2,) * 50] if thorough else [])
    per = itertools.cycle(("batch", "sample", "batch_sum"))
    return [Heads(s, dtype, next(per), masked) for s, dtype, masked in itertools.product(sizes, DTYPES, (False, True))]


def _elementwise(thorough: bool) -> list[Elementwise]:
    makes: list[Callable[[], Resolver]] = [lambda: GradDrop(leak=0.1), lambda: TrimmedMean(trim=1)]
    return [
        Elementwise(make, k, dtype, k == 5) for make, k, dtype in itertools.product(makes, (3, 5) if not thorough else (3, 4, 5, 9), DTYPES)
    ]


def problems(rung: str, thorough: bool) -> Sequence[Problem]:
    """The problems of a rung: two_pass, overlap, persistent, cluster, per_sample, heads or elementwise."""
    if rung in ("two_pass", "overlap"):
        return _general(thorough)
    if rung in ("persistent", "cluster"):
        return _fused([(1, 4097), (3, 1367), (1, 20_001)], "batch", thorough)
    if rung == "per_sample":
        return _fused([(5, 2101), (2, 4099), (3, 5001)], "sample", thorough)
    return _heads(thorough) if rung == "heads" else _elementwise(thorough)


def wanted(problem: Problem, oracle: Any, seed: int) -> list[Tensor]:
    """What the functions that are trusted make of it on the CPU."""
    if isinstance(problem, Resolve) and problem.calls == REPEATS:  # its rule keeps nothing, so all calls give the same
        return replace(problem, calls=1).run(oracle, CPU, seed) * REPEATS
    return problem.run(oracle, CPU, seed)


def differences(problem: Problem, found: Sequence[Tensor], expected: Sequence[Tensor], exact: bool) -> tuple[float, str | None]:
    """(the largest error relative to the largest element, None or what is wrong) of what `problem.run` gave."""
    worst, wrong = 0.0, None
    for i, (ours, theirs, tolerance) in enumerate(zip(found, expected, problem.tolerances(), strict=False)):
        # the matrix product of linear branches, and what elementwise rules add up, are rounded in an order of their own
        bits = exact and not isinstance(problem, Elementwise) and not (isinstance(problem, Heads) and i == 0)
        a, b = ours.double(), theirs.double()
        error = ((a - b).abs().max() / b.abs().max().clamp(min=1e-300)).item() if a.numel() else 0.0
        error = error if math.isfinite(error) else math.inf
        worst = max(worst, error)
        if torch.equal(ours, theirs) if bits else error <= tolerance:
            continue
        promised = "not the bits of the CPU" if bits else f"more than the tolerance of {tolerance:.0e}"
        wrong = wrong or f"{problem}: off by {error:.1e}, {promised}"
    return worst, wrong
