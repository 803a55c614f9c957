"""A few small problems for every CUDA kernel, against the CPU operators, for compute-sanitizer to watch: python -m benchmarks.gpu.sanitize [TOOL ...].

Without a tool it runs the problems; with some (memcheck, racecheck, synccheck), all at once, each in a process of its own. Torch's own kernels are
kept out, for the tools look at each kernel before its first launch.
"""

import copy
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import mmfast as mf
from mmfast import ops
from mmfast.ops.heads import heads

Outcome = Callable[[str, str], list[Tensor]]  # what a backend makes of a problem on a device
F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64


def gradients(k: int, shape: tuple[int, ...], dtype: torch.dtype, cancel: bool = False) -> list[Tensor]:
    """Random; `cancel` makes them sum to nearly nothing, so that lengths are measured."""
    J = torch.randn(k, *shape)
    return list((J - (1 - 1e-5) * J.mean(0) if cancel else J).to(dtype).unbind(0))


def resolved(rule: mf.Resolver, grads: list[Tensor], per: str = "batch", mask: Tensor | None = None, norm: bool = True) -> Outcome:
    """The results and weights of two calls, with a last gradient that is missing."""

    def outcome(backend: str, device: str) -> list[Tensor]:
        mine = copy.deepcopy(rule).to(device)
        there, hidden = [*on(device, grads), None], None if mask is None else mask.to(device)
        found = []
        for _ in range(2):
            out, info = ops.resolve_info(there, mine, per, hidden, preserve_norm=norm, backend=backend)
            found += [out] if info is None else [out, info]
        return found

    return outcome


def gram_of(grads: list[Tensor], per: str = "batch", mask: Tensor | None = None) -> Outcome:
    return lambda backend, device: [ops.gram(on(device, grads), per, mask=None if mask is None else mask.to(device), backend=backend)]


def weights_of(rule: mf.Resolver, G: Tensor) -> Outcome:
    return lambda backend, device: [ops.weights(G.to(device), rule, backend=backend)]


def heads_of(per: str, delta: Tensor, weight: Tensor, head_of: Tensor) -> Outcome:
    """The weights and the Gramian: the matrix product behind them is torch's."""

    def outcome(backend: str, device: str) -> list[Tensor]:
        k = int(head_of.max()) + 1
        return [heads(delta.to(device), weight.to(device), head_of.to(device), mf.MGDA(), k, per, None, True, backend)[1]]

    return outcome


def on(device: str, tensors: list[Tensor]) -> list[Tensor]:
    return [t.to(device) for t in tensors]


def by_path(path: str) -> Iterator[tuple[str, Outcome]]:
    """One problem of every width of rows, with what a path does beside: missing and hidden rows, state, random numbers, measured lengths."""
    shape, per = ((3, 5000), "sample") if path == "per_sample" else ((1, 9001), "batch")
    for k, dtype in ((2, BF16), (3, F32), (4, F64), (7, F32)):
        for rule in (mf.MGDA(), mf.PCGrad()) if k == 3 else (mf.PCD(),):
            yield f"{type(rule).__name__} K={k} {dtype}", resolved(rule, gradients(k, shape, dtype), per, torch.arange(k + 1) != 1)
    yield "lengths that are measured", resolved(mf.MGDA(), gradients(3, shape, F32, cancel=True), per)


def general() -> Iterator[tuple[str, Outcome]]:
    """What has one path only."""
    tall, mask = gradients(5, (9, 333), BF16), torch.rand(9, 5) < 0.7
    delta, weight = torch.randn(5, 60, 65), torch.randn(65, 40)
    head_of = torch.arange(4).repeat_interleave(torch.tensor([31, 1, 1, 32]))
    G = torch.stack([J @ J.mT for J in torch.randn(3, 5, 40, dtype=F64)])
    yield "gram, 13 rows", gram_of(gradients(13, (2, 4097), F32))
    for per in ("batch", "sample", "batch_sum"):
        yield f"gram, {per}, masked", gram_of(tall, per, mask)
        yield f"UPGrad, {per}", resolved(mf.UPGrad(), tall, per, torch.rand(9, 6) < 0.7)
        yield f"heads, {per}", heads_of(per, delta, weight, head_of)
    for rule in (mf.UPGrad(), mf.CAGrad(), mf.IMTLG(), mf.AlignedMTL()):
        yield f"weights of {type(rule).__name__}", weights_of(rule, G)
    for name, elementwise in (("GradDrop", mf.GradDrop(leak=0.1)), ("TrimmedMean", mf.TrimmedMean(trim=1))):
        yield name, resolved(elementwise, tall, mask=torch.rand(9, 6) < 0.8, norm=False)


PATHS = {"two_pass": "1", "two_pass, no overlap": "0", "persistent": "1", "cluster": "1", "per_sample": "1"}  # MMFAST_CUDA_OVERLAP of each


def check(backend: str, device: str) -> int:
    """Runs every problem by `backend` and on the CPU; returns how many differ, or could not be run."""
    torch.manual_seed(0)
    wrong = 0
    for path, overlap in PATHS.items():
        os.environ |= {"MMFAST_CUDA_PATH": path.split(",")[0], "MMFAST_CUDA_OVERLAP": overlap}
        wrong += sum(differs(f"{path}: {name}", outcome, backend, device) for name, outcome in by_path(path))
    os.environ["MMFAST_CUDA_PATH"] = ""
    return wrong + sum(differs(name, outcome, backend, device) for name, outcome in general())


def differs(name: str, outcome: Outcome, backend: str, device: str) -> bool:
    try:
        found, expected = on("cpu", outcome(backend, device)), outcome("cpu", "cpu")
        elementwise = name in ("GradDrop", "TrimmedMean")  # whose sums are rounded in their own order
        alike = all(torch.allclose(a, b, 1e-5, 1e-6) if elementwise else torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        said = "the same" if alike else "differs from the CPU"
    except (RuntimeError, ValueError) as error:
        alike, said = False, str(error)
    print(f"{name}: {said}", flush=True)
    return not alike


def watched(tool: str) -> int:
    """The problems under a tool of compute-sanitizer, each of its lines with the tool's name; its exit status."""
    # without torch's cache every tensor is an allocation of its own, and what is written behind it shows
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    line = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "benchmarks.gpu.sanitize"]
    with subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for said in process.stdout:
            print(f"{tool}: {said}", end="", flush=True)
    return process.returncode


def main(tools: list[str]) -> int:
    if not tools:
        wrong = check("cuda", "cuda")
        print(f"{wrong} failed")
        return int(wrong > 0)
    if shutil.which("compute-sanitizer") is None:
        print("compute-sanitizer is not installed, nothing was looked for")
        return 3
    statuses: dict[str, int] = {}
    threads = [threading.Thread(target=lambda tool=tool: statuses.update({tool: watched(tool)})) for tool in tools]  # type: ignore[misc]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print("; ".join(f"{tool}: status {status}" for tool, status in statuses.items()))
    return max(statuses.values())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
