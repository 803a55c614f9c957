"""The benchmark: `python -m benchmarks.bench [--quick] [--only NAME ...]`. NAME is a section or a rule.

* A number comes from an operator that has just agreed with its float64 reference; one that has not gets no time, and the exit code is 1.
* Competitors are timed side by side, one sample of each in turn: median with 20th and 80th percentile. What others used of the machine meanwhile
  is measured too: a disturbed run is kept as CSV, but does not become the latest one.
* Calls repeat on the same data, which stays in the cache that the column data_in names (memory: larger than half of every cache).
* Half of all pairs of gradients conflict and norms spread over a factor of ten (providers.jacobian).

A whole run writes results/DATE-COMMIT.csv (one schema for all rows) and, if the machine was quiet, results/latest.md and results/latest.png.
A new section is a function in SECTIONS (steps.py: of training steps); a new promise is a line in targets.TARGETS.
"""

import argparse
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter

import torch

import mmfast as mf
from benchmarks import naive, overhead, report, roofline, steps
from benchmarks.case import Run, compare, line
from benchmarks.machine import Quiet, caches, data_in, environment
from benchmarks.providers import BLOCK, MIN_K, PROVIDERS, RULES, TWELVE, Data, Unavailable, gate
from benchmarks.rows import RESULTS, Row, write
from benchmarks.targets import GRAM_FEW, GRAM_MANY, GRID_WORST, LATENCY
from benchmarks.timing import Call, side_by_side
from mmfast.experiments.memory import keep_memory

KS = [2, 3, 5, 8, 16, 32, 64]
NS = [4096, 65536, 1048576]


def resolve_case(run: Run, section: str, name: str, data: Data, providers: list[str]) -> None:
    """One (rule, K, N): gate, then all providers side by side."""
    if data.k < MIN_K.get(name, 1):
        return
    rows = {p: Row(section, name, data.k, data.n, p, data_in=data_in(data.k * data.n * 4)) for p in providers}
    calls: dict[str, Call] = {}
    for p in providers:
        try:
            calls[p] = PROVIDERS[p](name, data)
        except Unavailable as reason:
            rows[p].verdict = str(reason)
    error, right = gate(name, data)
    timings = compare(run, rows, calls, right, error)
    if right:
        ours = rows["ours"]
        ours.gbps = (data.k + 1) * data.n * 4 / timings["ours"].median / 1e3
        if section == "grid" and "torchjd" in timings:
            rows["torchjd"].verdict = GRID_WORST.verdict(rows["torchjd"].ratio_to_ours or 0)
        if section == "latency" and data.n == 4096:
            ours.verdict = LATENCY.verdict(timings["ours"].median)
    print(line(list(rows.values())), flush=True)


def grid(run: Run) -> None:
    """Against TorchJD over rule x K x N: the design's first promise."""
    for n in NS[:2] if run.quick else NS:
        for k in [3, 16] if run.quick else KS:
            data = Data(k, n)
            for name in run.rules:
                resolve_case(run, "grid", name, data, ["ours", "torchjd"])


def providers(run: Run) -> None:
    """Every way to do it, torch.compile and the usual loops included, at a few sizes."""
    for k in [3] if run.quick else [3, 8, 32]:
        data = Data(k, 65536)
        for name in run.rules:
            who = ["ours", "torchjd", "torch", "naive"] + ["compile"] * (k == 3 and not run.quick)  # compiling takes seconds: once a rule
            resolve_case(run, "providers", name, data, who)


def latency(run: Run) -> None:
    """Small gradients: what one Python call costs; N = 1 is the host overhead alone."""
    for n in (1, 4096):
        data = Data(3, n)
        for name in run.rules:
            resolve_case(run, "latency", name, data, ["ours", "torchjd", "torch"])


def machine(run: Run) -> None:
    """What the machine can do at best."""
    size = 16 if run.quick else 64
    data = torch.ones(size << 20)
    for name, timing in side_by_side(roofline.readers(data), run.budget * 4).items():
        rate = data.nbytes / timing.median / 1e3
        run.rows.append(Row("machine", "read", 1, data.numel(), name, data_in="memory", gbps=rate).timed(timing))
        print(f"machine   reading {rate:.1f} GB/s ({name})")
    operations = 10**8 if run.quick else 2 * 10**9
    for name, timing in side_by_side(roofline.multiply_adds(operations), run.budget * 4).items():
        rate = operations / timing.median / 1e3
        run.rows.append(Row("machine", "multiply-add", 0, 0, name, gflops=rate).timed(timing))
        print(f"machine   multiply-adds {rate:.0f} GFLOP/s ({name})", flush=True)


def _gram_right(grads: list[torch.Tensor], J: torch.Tensor) -> tuple[float, bool]:
    """(largest error relative to the rows' norms, against float64; whether it is at most twice that of torch's product)."""
    found = mf.gram(grads)
    expected = torch.zeros_like(found)
    for block in J.split(BLOCK, dim=1):
        expected += block.double() @ block.double().T
    norms = expected.diagonal().sqrt()
    error, same = (float(((G.double() - expected) / torch.outer(norms, norms)).abs().max()) for G in (found, J @ J.T))
    return error, error <= 2 * same + 1e-6


def gram_case(run: Run, k: int, n: int, dtype: torch.dtype = torch.float32) -> None:
    J, size = torch.randn(k, n).to(dtype), k * n * dtype.itemsize
    grads = list(J.unbind(0))
    rows = {p: Row("gram", "", k, n, p, str(dtype).removeprefix("torch."), data_in(size)) for p in ("ours", "torch")}
    calls: dict[str, Call] = {"ours": lambda: mf.gram(grads), "torch": lambda: J @ J.T}
    operations = k * (k + 1) * n
    # the limit reads the very memory that the kernel reads: two buffers of one size can differ by half in their rates
    floats = J.view(-1).view(torch.uint8)[: size // 4 * 4].view(torch.float32)
    limits = roofline.readers(floats) if k <= 4 else roofline.multiply_adds(operations)
    error, right = _gram_right(grads, J)
    timings = compare(run, rows, calls | limits, right, error, 4)
    for p, row in rows.items():
        if p not in timings:
            continue
        row.gbps, row.gflops = size / timings[p].median / 1e3, operations / timings[p].median / 1e3
        row.percent_of_roofline = 100 * min(timings[limit].median for limit in limits) / timings[p].median
    if right and dtype == torch.float32:
        rows["ours"].verdict = (GRAM_FEW if k <= 4 else GRAM_MANY).verdict(rows["ours"].percent_of_roofline or 0)
    print(line([row for row in rows.values() if row.median_us or row.verdict]), flush=True)


def gram(run: Run) -> None:
    """The only pass that reads all data, against what the machine can do, timed beside it: reading for few gradients, multiply-adds for many."""
    largest = max((size for _, size in caches()), default=32 << 20)
    size = 4 * largest if run.quick else max(256 << 20, 8 * largest)
    for k in (1, 2, 3, 4):
        gram_case(run, k, size // (4 * k))
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        gram_case(run, 3, size // (3 * dtype.itemsize), dtype)
    gram_case(run, 50, 1 << (18 if run.quick else 20))


def block(run: Run) -> None:
    """A fork's forward and backward at K = 3, N = 4096, against the naive one and against autograd's plain sum."""
    k, n = 3, 4096
    data = Data(k, n)
    y = torch.zeros(n, requires_grad=True)

    def backward(outputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return torch.autograd.grad(outputs, y, data.grads)[0]

    for name in run.rules:
        rule = RULES[name](k)
        calls: dict[str, Call] = {
            "ours": lambda rule=rule: backward(mf.fork(y, k, rule)),  # type: ignore[misc]
            "none": lambda: backward(tuple(y.view_as(y) for _ in range(k))),
        }
        if name in naive.RULES:
            loops = naive.RULES[name](k)
            calls["naive"] = lambda loops=loops: backward(naive.fork(y, k, loops))  # type: ignore[misc]
        rows = {p: Row("block", name, k, n, p, data_in=data_in(k * n * 4)) for p in calls}
        error, right = gate(name, data, lambda rule: backward(mf.fork(y, k, rule)), preserve_norm=True)
        compare(run, rows, calls, right, error)
        print(line(list(rows.values())), flush=True)


SECTIONS: dict[str, Callable[[Run], None]] = {
    "machine": machine,
    "gram": gram,
    "latency": latency,
    "block": block,
    "heads": steps.heads,
    "parameters": steps.parameter_lists,
    "attach": steps.attach,
    "monitor": steps.monitor,
    "likelihoods": steps.log_probs,
    "together": steps.many_models,
    "collapse": steps.gradient_outer_products,
    "multimodal": steps.multimodal_steps,
    "compile": steps.compile_step,
    "providers": providers,
    "grid": grid,
}


def _save(run: Run, env: dict[str, str]) -> Iterator[Path]:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{env['date']}-{env['commit'] or 'unversioned'}.csv"
    write(run.rows, env, path)
    yield path
    if report.disturbed(env):
        # a stalled thread at a barrier costs a peer milliseconds where it needs microseconds: ratios of such a run are far too good
        print("latest.md and latest.png are left as they are:", report.disturbed(env))
        return
    latest = RESULTS / "latest.md"
    latest.write_text(report.full(run.rows, env))
    yield latest
    try:
        from benchmarks.plots import heat_map
    except ImportError:
        print("no plot: matplotlib is not installed")
        return
    picture = RESULTS / "latest.png"
    if heat_map(run.rows, env, picture):
        yield picture


def main() -> int:
    names = [*SECTIONS, "overhead", *RULES]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a subset within a minute; keeps no results")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", choices=names, help="a section or a rule; repeatable")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    keep_memory()  # else what a call costs depends on what was freed before it
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    # NashMTL's solver says at every call that its problem is stated in a way that cannot be cached
    warnings.filterwarnings("ignore", category=UserWarning, module="torchjd")
    quiet = Quiet()
    rules = [name for name in options.only if name in RULES] or [*TWELVE, "Mean"]
    sections = [name for name in options.only if name not in RULES] or [*SECTIONS, "overhead"]
    run = Run(options.quick, rules)
    start = perf_counter()
    for name in sections:
        if name in SECTIONS:
            SECTIONS[name](run)
    env = environment(quiet.share())
    print(f"\n{report.summary(run.rows, env)}\n{perf_counter() - start:.0f} s")
    if not options.quick and not options.only:
        for path in _save(run, env):
            print("wrote", path)
    if "overhead" in sections and not options.quick:
        overhead.compare()
    if run.wrong:
        print(f"\n{len(run.wrong)} results disagree with the float64 reference and have no time:", file=sys.stderr)
        for row in run.wrong:
            print(f"  {row.section} {row.rule} K={row.k} N={row.n} {row.dtype}: relative error {row.error:.2g}", file=sys.stderr)
    return 1 if run.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
