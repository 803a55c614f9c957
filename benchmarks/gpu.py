"""Times the CUDA and Triton operators over rule x K x N x dtype, L2 warm and cold, beside torch and TorchJD: python -m benchmarks.gpu FILE.csv.

Every line is written at once. A line is: what, its median and the shares of what the device can do, measured in the same run. "cold" is the time of the GPU, which
is busy clearing its cache while the call is prepared; "warm" starts from an idle GPU and has the preparation in it.
"""

import csv
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import mmfast as mf
from benchmarks import tabular
from benchmarks.machine import environment
from benchmarks.providers import jacobian
from mmfast import ops
from mmfast.backends import cuda

SIZES = [(k, n) for n in (4096, 65536, 1 << 20, 1 << 24) for k in (2, 3, 5, 8, 16, 50) if k * n <= 1 << 27]
DTYPES = (torch.float32, torch.bfloat16)
BUDGET = 85.0  # seconds for all
FIELDS = ["what", "k", "n", "dtype", "l2", "median_us", "p20_us", "p80_us", "bytes", "percent_of_copy_rate", "ratio_to_ours", "error"]


def microseconds(call: Callable[[], object], cold: Tensor | None, rounds: int = 30) -> list[float]:
    """Of each call by CUDA events; before each, `cold` is written to push everything else out of the L2 cache."""
    call()
    found = []
    for _ in range(rounds):
        if cold is not None:
            cold.add_(1)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) * 1e3)
    return sorted(found)


@torch.compile(dynamic=False)
def by_norms(J: Tensor) -> Tensor:
    """What torch.compile makes of a Gramian and a weighted sum, without a solver between them: less than any rule needs."""
    return torch.rsqrt((J @ J.T).diagonal()) @ J


def calls(k: int, n: int, dtype: torch.dtype) -> tuple[dict[str, tuple[Callable[[], object], int]], Tensor]:
    """(call, bytes it must move) by name; the gradients. Of resolve the floor: each gradient read once; of its other ways what they move."""
    J = jacobian(k, n).cuda().to(dtype)
    grads, e = list(J.unbind(0)), J.element_size()
    w = torch.rand(k, dtype=torch.float64, device="cuda")
    found: dict[str, tuple[Callable[[], object], int]] = {
        "gram": (lambda: ops.gram(grads, backend="cuda"), k * n * e),
        "combine": (lambda: ops.combine(grads, w, backend="cuda"), (k + 1) * n * e),
        "torch gram": (lambda: J @ J.T, k * n * e),
    }
    if ops.backends()["triton"][0]:
        found |= {
            "gram, Triton": (lambda: ops.gram(grads, backend="triton"), k * n * e),
            "combine, Triton": (lambda: ops.combine(grads, w, backend="triton"), (k + 1) * n * e),
        }
    for rule in (mf.MGDA(), mf.UPGrad(), mf.PCGrad().cuda(), mf.CAGrad(c=0.5), mf.IMTLG()):
        name = type(rule).__name__
        found[f"resolve {name}"] = (lambda rule=rule: mf.resolve(grads, rule, backend="cuda"), (k + 1) * n * e)  # type: ignore[misc]

    def forced(path: str, overlap: str) -> None:
        os.environ["MMFAST_CUDA_PATH"], os.environ["MMFAST_CUDA_OVERLAP"] = path, overlap
        try:
            mf.resolve(grads, mf.MGDA(), backend="cuda")
        finally:
            del os.environ["MMFAST_CUDA_PATH"], os.environ["MMFAST_CUDA_OVERLAP"]

    for path, size in (("two_pass", (2 * k + 1) * n * e), ("persistent", (k + 1) * n * e), ("cluster", (k + 1) * n * e)):
        found[f"resolve MGDA, {path}"] = (lambda path=path: forced(path, "1"), size)  # type: ignore[misc]
    found["resolve MGDA, two_pass, one after the other"] = (lambda: forced("two_pass", "0"), (2 * k + 1) * n * e)
    if ops.backends()["triton"][0]:
        found["resolve MGDA, Triton"] = (lambda: mf.resolve(grads, mf.MGDA(), backend="triton"), (2 * k + 1) * n * e)
    found["resolve MGDA, plain torch"] = (lambda: mf.resolve(grads, mf.MGDA(), backend="reference"), (2 * k + 1) * n * e)
    if k == 5 and dtype == torch.float32:  # each shape is compiled anew
        found["resolve MGDA, torch.compile without a solver"] = (lambda: by_norms(J), (2 * k + 1) * n * e)
    try:
        from torchjd import aggregation

        for name in ("UPGrad", "MGDA", "PCGrad", "IMTLG"):
            aggregate = getattr(aggregation, name)()
            found[f"resolve {name}, TorchJD"] = (lambda aggregate=aggregate: aggregate(J.float()), (2 * k + 1) * n * e)  # type: ignore[misc]
    except ImportError:
        pass
    return found, J


def captured(step: Callable[[], object]) -> Callable[[], object]:
    """The replay of a whole training step as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def training_steps(line: Callable[..., None]) -> None:
    """A tabular VAE's step with LinearHeads, by the CUDA operators, against the same with one plain layer; each eager and as a CUDA graph."""
    chosen = ops.serving
    ops.serving = lambda device, backend, k: (
        "cuda" if device.type == "cuda" else chosen(device, backend, k)
    )  # as "auto" once a GPU has run it
    try:
        for k in (5, 50):
            with torch.device("cuda"):
                found = tabular.steps(k, 1, lambda _: mf.MGDA(), "")
                calls: dict[str, Callable[[], object]] = {name: found[name] for name in ("fused", "ours")}
                calls |= {f"{name}, graph": captured(call) for name, call in list(calls.items())}
                times = {name: microseconds(call, None, 100) for name, call in calls.items()}
            for name, all_times in times.items():
                median, ours = statistics.median(all_times), statistics.median(times[name.replace("fused", "ours")])
                line(what=f"training step, {name}", k=k, dtype="float32", l2="warm", median_us=median, p20_us=all_times[20], p80_us=all_times[80],
                     ratio_to_ours=median / ours)  # fmt: skip
                print(f"training step K={k}, {name}: {median:.0f} us, ours takes {ours / median:.3f} of it")
    finally:
        ops.serving = chosen


def error(k: int, n: int, J: Tensor) -> float:
    """Of the Gramian against float64, relative to the norms of its rows: refuses to time what is wrong."""
    G = ops.gram(list(J.unbind(0)), backend="cuda")
    exact = J.double() @ J.double().T
    norms = exact.diagonal().sqrt()
    return ((G - exact) / norms.outer(norms)).abs().max().item()


def main(path: Path) -> int:
    if reason := cuda.why_not():
        print(f"nothing can be timed: {reason}", file=sys.stderr)
        return 3
    env = environment() | {"gpu": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda)}
    start = time.monotonic()
    with path.open("w", newline="") as file:
        out = csv.DictWriter(file, FIELDS + list(env), lineterminator="\n")
        out.writeheader()

        def line(**values: object) -> None:
            out.writerow(env | {name: f"{v:.4g}" if isinstance(v, float) else v for name, v in values.items()})
            file.flush()

        source = torch.empty(1 << 28, device="cuda")
        half = source.numel() // 2
        copy = statistics.median(microseconds(lambda: source[half:].copy_(source[:half]), None))
        rate = source.numel() * 4 / copy  # bytes per microsecond, read and written
        line(what="copy", n=half, dtype="float32", l2="cold", median_us=copy, bytes=source.numel() * 4)
        cold = source[: 1 << 26]
        try:
            training_steps(line)
        except Exception as failure:  # noqa: BLE001 the kernels are timed all the same
            line(what=f"training step: {failure}"[:200])
        for k, n in SIZES:
            for dtype in DTYPES:
                found, J = calls(k, n, dtype)
                off = error(k, n, J)
                if not off < 1e-5:
                    line(what="gram is wrong: nothing timed", k=k, n=n, dtype=str(dtype), error=off)
                    continue
                ours: dict[str, float] = {}
                for name, (call, size) in found.items():
                    for l2 in ("cold",) if "," in name else ("warm", "cold"):
                        if time.monotonic() - start > BUDGET:
                            print(f"the time is over before K={k} N={n} {name}")
                            return 0
                        slow = "plain torch" in name or "TorchJD" in name
                        try:
                            times = microseconds(call, cold if l2 == "cold" else None, 5 if slow else 30)
                        except Exception as failure:  # noqa: BLE001 a rival that fails, or a path that one size does not take, must not end the run
                            line(what=f"{name}: {failure}"[:200], k=k, n=n, dtype=str(dtype), l2=l2)
                            continue
                        median = statistics.median(times)
                        if l2 == "cold":
                            ours.setdefault(name, median)
                        line(
                            what=name, k=k, n=n, dtype=str(dtype).removeprefix("torch."), l2=l2, median_us=median,
                            p20_us=times[len(times) // 5], p80_us=times[4 * len(times) // 5], bytes=size,
                            percent_of_copy_rate=100 * size / rate / median, error=off,
                            ratio_to_ours=median / ours[name.split(",")[0]] if "," in name else "",
                        )  # fmt: skip
                print(f"K={k} N={n} {dtype}: " + ", ".join(f"{name} {us:.1f} us" for name, us in ours.items()))
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m benchmarks.gpu FILE.csv")
    sys.exit(main(Path(sys.argv[1])))
