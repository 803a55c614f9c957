"""The order of a run: what the design asks for first, the largest sizes first, plain torch last; it ends when its time is over."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product

import torch

import mmfast as mf
from benchmarks.gpu import cases, model
from benchmarks.gpu.cases import RULES, Problem
from benchmarks.gpu.device import COPIES, Device, Make
from benchmarks.gpu.lines import Line

Size = tuple[int, int, torch.dtype]  # K, N, type
F32, BF16 = torch.float32, torch.bfloat16
PLAIN = 15.0  # seconds that are kept for plain torch
SLOW = 5  # rounds of what takes long
WRONG = 1e-5  # error of a Gramian that is not timed


@dataclass(frozen=True)
class Sizes:
    """What is timed."""

    beyond: list[Size]  # more than a GPU keeps on its chip
    on_chip: list[Size]  # 16 MB to what it keeps
    small: list[Size]  # 2 MB and less
    rivals: list[Size]
    grid: list[Size]
    steps: list[int]  # K of the training step
    rounds: int = 30  # of each call
    copied: int = 1 << 29  # bytes read, and written, to measure the copy rate


FULL = Sizes(
    beyond=[
        (16, 1 << 24, F32),
        (8, 1 << 24, F32),
        (4, 1 << 25, F32),
        (8, 1 << 25, BF16),
        (2, 1 << 25, F32),
        (3, 1 << 24, F32),
        (5, 1 << 22, F32),
    ],
    on_chip=[(3, 2_400_000, F32), (5, 1_400_000, F32), (8, 1_700_000, BF16), (4, 1 << 20, F32), (2, 1 << 21, F32)],
    small=[
        (8, 1 << 16, F32),
        (4, 1 << 17, F32),
        (8, 1 << 15, F32),
        (5, 50_000, F32),
        (3, 1 << 16, BF16),
        (3, 1 << 14, F32),
        (3, 1 << 12, F32),
    ],
    rivals=[(5, 1 << 22, F32), (5, 1 << 20, F32), (3, 1 << 12, F32)],
    grid=[
        (k, n, dtype)
        for n, k, dtype in product((1 << 24, 1 << 20, 1 << 16, 1 << 12), (50, 16, 8, 5, 3, 2), (F32, BF16))
        if k * n <= 1 << 27
    ],
    steps=[50, 5],
)
DRY = Sizes([(3, 5000, F32)], [(3, 300, F32)], [(2, 50, BF16)], [(2, 40, F32)], [(3, 60, F32)], [2], rounds=2, copied=1 << 10)


def reason(failure: Exception) -> str:
    return f"{type(failure).__name__}: {failure}".replace("\n", " ")[:200]


@dataclass
class Run:
    """One run on a device: every line goes to `add` as soon as it is known."""

    device: Device
    sizes: Sizes
    add: Callable[[Line], None]
    seconds: float = 120.0
    rate: float = 1.0  # bytes per us that a copy reads and writes
    start: float = field(default_factory=time.monotonic)

    def over(self, kept: float = 0.0) -> bool:
        return time.monotonic() - self.start > self.seconds - kept

    def all(self) -> None:
        """The whole run. A part that fails leaves a line that says why, and the others go on."""
        for part in (self.ceilings, self.design, self.steps, self.rivals, self.grid, self.plain):
            if not self.over():
                try:
                    part()
                except Exception as failure:  # noqa: BLE001
                    self.add(Line("run", part.__name__, note=reason(failure)))
        if self.over():
            self.add(Line("run", "end", note="the time is over, what is missing was not measured"))

    def attempt(self, line: Line, measure: Callable[..., Line], *arguments: object) -> None:
        """Adds the line as measured, or why it was not: a rival that fails, or a path that a size does not take, must not end the run."""
        try:
            self.add(measure(line, *arguments))
        except Exception as failure:  # noqa: BLE001
            self.add(replace(line, note=reason(failure)))

    def cold(self, line: Line, make: Make) -> Line:
        slow = line.section in ("rivals", "plain")
        return line.timed(self.device.cold(make(), min(SLOW, self.sizes.rounds) if slow else self.sizes.rounds))

    def eager(self, line: Line, make: Make) -> Line:
        return line.timed(self.device.eager(make(), self.sizes.rounds))

    def graph(self, line: Line, make: Make, copies: int = COPIES) -> Line:
        timing, kernels = self.device.graphed(make(), self.sizes.rounds, copies)
        return replace(line.timed(timing), kernels=kernels)

    def ceilings(self) -> None:
        """What the device can do: the rate of a copy, the time of an empty cooperative launch."""
        source = torch.ones(self.sizes.copied, dtype=torch.uint8, device=self.device.device)
        target, moved = torch.empty_like(source), 2 * self.sizes.copied
        copy = self.device.cold(lambda: target.copy_(source), self.sizes.rounds)
        self.rate = moved / copy.median
        line = Line("ceiling", "copy", n=self.sizes.copied, dtype="uint8", way="cold", floor_bytes=moved, path_bytes=moved)
        self.add(replace(line.timed(copy), predicted_us=copy.median))
        empty = Line("ceiling", "empty cooperative launch", way="graph", predicted_us=model.LAUNCH, planned_kernels=1)
        self.attempt(empty, self.graph, self.device.empty_launch)

    def problems(self, section: str, sizes: list[Size], kept: float = 0.0) -> Iterator[tuple[Problem, Line]]:
        """Each problem whose Gramian is right, with the line that its measurements begin with."""
        for k, n, dtype in sizes:
            if self.over(kept):
                return
            line = Line(section, "gram", k, n, str(dtype).removeprefix("torch."))
            try:
                problem = Problem(self.device, k, n, dtype)
                error = problem.error()
            except Exception as failure:  # noqa: BLE001
                self.add(replace(line, note=reason(failure)))
                continue
            line = replace(line, error=error, floor_bytes=problem.read + problem.written)
            if error < WRONG:
                yield problem, line
            else:
                self.add(replace(line, note="wrong, nothing was timed"))

    def resolve_line(self, line: Line, p: Problem, name: str, rule: mf.Resolver) -> Line:
        """The line of a resolve by the path that the plan takes, with what the model makes of it."""
        path, read, written, launches = self.device.plan(rule, p.k, p.n, p.J.element_size())
        predicted = model.microseconds(path, read, written, launches, p.n, self.rate)
        resolved = replace(line, what=f"resolve {name}", path=path, path_bytes=read + written)
        return replace(resolved, predicted_us=predicted, planned_kernels=launches)

    def design(self) -> None:
        """The design's rows: cold, and small problems in a graph, where the host's part of a call does not count."""
        for section, sizes in (("beyond", self.sizes.beyond), ("on chip", self.sizes.on_chip), ("small", self.sizes.small)):
            for p, line in self.problems(section, sizes):
                for name, rule in RULES.items():
                    resolver = rule().to(self.device.device)
                    line, make = self.resolve_line(line, p, name, resolver), partial(cases.resolve, p, resolver)
                    self.attempt(replace(line, way="cold"), self.cold, make)
                    self.attempt(replace(line, way="graph"), self.graph, make, COPIES if section == "small" else 1)
                    if section == "small":
                        self.attempt(replace(line, way="eager", predicted_us=None), self.eager, make)

    def steps(self) -> None:
        """A training step, with LinearHeads and without a block."""
        for k in self.sizes.steps:
            with cases.auto_takes(self.device.backend):
                for name, call in cases.training_steps(self.device, k).items():
                    line = Line("step", name, k, dtype="float32")
                    self.attempt(replace(line, way="eager"), self.eager, lambda call=call: call)
                    self.attempt(replace(line, way="graph", predicted_us=model.STEP[name]), self.graph, lambda call=call: call, 1)

    def others(self, p: Problem, line: Line, calls: dict[str, Make]) -> None:
        for name, make in calls.items():
            if self.over():
                return
            self.attempt(replace(line, what=f"resolve {name}", way="cold"), self.cold, make)

    def rivals(self) -> None:
        """Ours and others, side by side."""
        for p, line in self.problems("rivals", self.sizes.rivals):
            self.others(p, line, cases.ours(p) | cases.rivals(p))

    def grid(self) -> None:
        """Gramian, sum and every path over many sizes."""
        for p, line in self.problems("grid", self.sizes.grid, PLAIN):
            line = replace(line, way="cold")
            for name, (make, size) in cases.passes(p).items():
                self.attempt(replace(line, what=name, floor_bytes=size, path_bytes=size), self.cold, make)
            for path, overlap in (("two_pass", True), ("two_pass", False), ("persistent", True), ("cluster", True)):
                forced = replace(line, what="resolve MGDA" if overlap else "resolve MGDA, no overlap", path=path)
                self.attempt(forced, self.cold, partial(cases.forced, p, mf.MGDA(), path, overlap))

    def plain(self) -> None:
        """Plain torch."""
        for p, line in self.problems("plain", self.sizes.rivals):
            self.others(p, line, cases.plain(p))
