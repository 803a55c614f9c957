"""verify: the kernels of a device against those of the CPU, path by path; warmup: what must not be loaded or compiled later."""

import json
import math
import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass
from typing import Any

import torch

from mmfast.backends import cpu, cuda, proof, verdict
from mmfast.backends.choice import triton_kernels, why_no_triton
from mmfast.backends.target import CudaTarget, GpuTarget, Target
from mmfast.backends.verdict import Result
from mmfast.ops.resolve import resolve
from mmfast.resolvers.chain import bind
from mmfast.resolvers.elementwise import GradDrop
from mmfast.resolvers.names import ResolverLike, instance_of


@dataclass(frozen=True)
class Report:
    """What `verify` found; printed as a table, a line for each path.

    Attributes:
        device: its name.
        results: of each path of each backend that was tested: backend, path, passed, problems, worst (error relative to the largest element), seconds, why.
        skipped: backends that were not tested, and why.
        kept: where the verdict is kept for later processes; None where it lives as long as this one.
    """

    device: str
    results: tuple[Result, ...]
    skipped: dict[str, str]
    kept: str | None

    @property
    def passed(self) -> bool:
        """Whether every path that was tested passed."""
        return all(result.passed for result in self.results)

    def to_json(self) -> str:
        """The same for machines."""
        results = [asdict(r) | {"worst": r.worst if math.isfinite(r.worst) else None} for r in self.results]
        return json.dumps(asdict(self) | {"passed": self.passed, "results": results}, indent=1)

    def __str__(self) -> str:
        rows = [("backend", "path", "problems", "worst error", "seconds", "verdict")]
        for r in self.results:
            rows.append(
                (r.backend, r.path, str(r.problems), f"{r.worst:.1e}", f"{r.seconds:.3f}", "passed" if r.passed else f"LEFT OUT: {r.why}")
            )
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = ["  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[5]]) for row in rows]
        lines += [f"{backend} was not tested: {why}" for backend, why in self.skipped.items()]
        return "\n".join([self.device, *lines, *([f"kept in {self.kept}"] if self.kept else [])])


def verify(device: torch.device | str | None = None, thorough: bool = False) -> Report:
    """Tests every path of every backend on this device against the CPU's, and keeps the verdict by which backend="auto" chooses.

    On a GPU the compiled CUDA kernels must give the bits of the compiled CPU operators where bits are promised, in a dozen problems for each path and in
    twenty calls back to back; Triton's kernels, which are tested where CUDA does not serve, must agree within tolerance. A path that fails is left out
    from then on. On the CPU the compiled operators are held against plain torch. It runs on a stream, generator and with modes of its own.

    Args:
        device: where to test; the current GPU, or the CPU where there is none.
        thorough: more rules, sizes and numbers of gradients; seconds instead of about 0.1 s.

    Returns:
        A `Report`, made to be printed.

    Raises:
        ValueError: for a device that no backend but plain torch serves.
        RuntimeError: while a CUDA graph is captured.

    >>> import mmfast as mf
    >>> mf.verify("cpu").passed
    True
    """
    found = torch.device("cuda" if torch.cuda.is_available() else "cpu") if device is None else torch.device(device)
    if found.type == "cpu":
        return _report(
            "CPU", [Target("cpu", found, cpu)] if cpu.why_not() is None else [], {"cpu": cpu.why_not()}, verdict.Kept(None), thorough
        )[0]
    if found.type != "cuda" or not torch.cuda.is_available():
        raise ValueError(f"device is {found}, expected 'cpu' or a GPU that torch can use: nothing but plain torch runs elsewhere")
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("a CUDA graph is being captured, which a test would end; call mmfast.verify() before it")
    found = torch.device("cuda", torch.cuda.current_device() if found.index is None else found.index)
    with torch.cuda.device(found):
        no_cuda, no_triton = cuda.why_not(), why_no_triton()
        if no_triton is None and found.type not in triton_kernels().DEVICES:
            no_triton = "TRITON_INTERPRET is set: its kernels are interpreted on the CPU"
        kept = verdict.Kept(verdict.facts(found))
        targets: list[Target] = [CudaTarget(found)] if no_cuda is None else []
        report, results = _report(torch.cuda.get_device_name(found), targets, {"cuda": no_cuda}, kept, thorough)
        if not any(r.passed and r.path == "two_pass" for r in report.results):
            if any(("cuda", path) not in results for target in targets for path in target.paths):  # an error or a hang ended the test
                no_triton = "the device no longer serves this process; verify again in another"
            targets = [GpuTarget("triton", found, triton_kernels())] if no_triton is None else []
            report, results = _report(report.device, targets, report.skipped | {"triton": no_triton}, kept, thorough, results)
    proof.replace(found, results)
    return report


def _report(
    name: str, targets: list[Target], why_not: dict[str, Any], kept: verdict.Kept, thorough: bool, results: proof.Results | None = None
) -> tuple[Report, proof.Results]:
    results = dict(results or {})
    for target in targets:
        results = proof.prove(target, kept, results, thorough)
    skipped = {backend: why for backend, why in why_not.items() if why}
    return Report(name, tuple(results.values()), skipped, str(kept.file) if kept.file and kept.load() == results else None), results


def warmup(
    shapes: Iterable[Sequence[int]],
    resolver: ResolverLike,
    *,
    per: str = "batch",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    preserve_norm: bool = True,
    backend: str = "auto",
) -> float:
    """Loads and compiles now what calls with such gradients would load and compile at their first time: before a capture, or a measurement.

    The self-check of a GPU is made, its kernels are loaded (Triton's compiled), and the resolver gets its state and random stream on the device; neither moves on.

    Args:
        shapes: [K, ...] of the gradients of each kind of call: 3 gradients [128, 512] are (3, 128, 512).
        resolver, per, preserve_norm, backend: as for `fork`.
        dtype, device: of the gradients; the device is the current GPU, or the CPU where there is none.

    Returns:
        Seconds that it took.

    Raises:
        ValueError, TypeError: as `resolve` would.

    >>> import mmfast as mf
    >>> mf.warmup([(3, 128, 512)], mf.MGDA(), device="cpu") < 60
    True
    """
    start = time.monotonic()
    on = torch.device("cuda" if torch.cuda.is_available() else "cpu") if device is None else torch.device(device)
    for shape in shapes:
        if isinstance(shape, (int, str)):
            raise TypeError(f"shapes holds {shape!r}, expected a list of shapes, each [K, ...] of K gradients")
        if len(shape) < 1:
            raise ValueError("shapes has one without numbers, expected [K, ...] of K gradients")
        rule = instance_of(resolver, shape[0])
        chain = rule.chain()
        if chain is not None:
            bind(chain, tuple(shape[1:2]) if per == "sample" else (), shape[0], on)
        if isinstance(rule, GradDrop):
            rule.stream(on)
        with torch.cuda.device(on) if on.type == "cuda" else nullcontext():
            resolve(torch.ones(*shape, dtype=dtype, device=on), deepcopy(rule), per, preserve_norm=preserve_norm, backend=backend)
    if on.type == "cuda":
        torch.cuda.synchronize(on)
    return time.monotonic() - start
