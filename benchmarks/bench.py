"""The benchmark: `python -m benchmarks.bench [--quick] [--only NAME ...]`. NAME is a section or a rule.

* A number comes from an operator that has just agreed with its float64 reference; one that has not gets no time, and the exit code is 1.
* Competitors are timed side by side, one sample of each in turn: median with 20th and 80th percentile. What others used of the machine meanwhile
  is measured too: a disturbed run is kept as CSV, but does not become the latest one.
* Calls repeat on the same data, which stays in the cache that the column data_in names (memory: larger than half of every cache).
* Half of all pairs of gradients conflict and norms spread over a factor of ten (providers.jacobian).

A whole run writes results/DATE-COMMIT.csv (one schema for all rows) and, if the machine was quiet, results/latest.md and results/latest.png.
A new section is a function in SECTIONS; a new promise is a line in targets.TARGETS.
"""

import argparse
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

import torch

import mmfast as mf
from benchmarks import attached, compiled, likelihoods, multimodal, naive, overhead, parameters, report, roofline, tabular, together
from benchmarks.machine import Quiet, caches, data_in, environment
from benchmarks.providers import BLOCK, ELEMENTWISE, MIN_K, PROVIDERS, RULES, TWELVE, Data, Unavailable, gate
from benchmarks.rows import RESULTS, Row, write
from benchmarks.targets import GRAM_FEW, GRAM_MANY, GRID_WORST, LATENCY
from benchmarks.timing import Call, Timing, side_by_side

KS = [2, 3, 5, 8, 16, 32, 64]
NS = [4096, 65536, 1048576]


@dataclass
class Run:
    """What this run measures, and what it has measured so far."""

    quick: bool
    rules: list[str]
    rows: list[Row] = field(default_factory=list)

    @property
    def budget(self) -> float:
        """Seconds for each call of a case."""
        return 0.05 if self.quick else 0.15

    @property
    def wrong(self) -> list[Row]:
        return [r for r in self.rows if r.verdict == "wrong"]


def _line(rows: list[Row]) -> str:
    """One case, for the terminal."""
    first = rows[0]
    cells = []
    for r in rows:
        value = f"{report.number(r.median_us)} µs" if r.median_us else r.verdict
        ratio = f" {report.number(r.ratio_to_ours)}x" if r.ratio_to_ours and r.provider != "ours" else ""
        memory = f" {report.number(r.peak_mb)} MB" if r.peak_mb else ""
        share = f" {r.percent_of_roofline:.0f}% of roofline" if r.percent_of_roofline else ""
        cells.append(f"{r.provider} {value}{ratio}{memory}{share}")
    what = first.rule or first.dtype
    return f"{first.section:9} {what:12} K={first.k:<3} N={first.n:<9} " + "   ".join(cells)


def compare(run: Run, rows: dict[str, Row], calls: dict[str, Call], right: bool, error: float, budgets: float = 1) -> dict[str, Timing]:
    """Times the calls of one case side by side and fills their rows; a red gate leaves our row alone, without a time.

    Calls of many milliseconds need more than one budget for enough samples.
    """
    rows["ours"].error = error
    if not right:
        rows["ours"].verdict = "wrong"
        rows, calls = {"ours": rows["ours"]}, {}
    timings = side_by_side(calls, run.budget * budgets) if calls else {}
    for p, row in rows.items():
        if p in timings:
            row.timed(timings[p]).ratio_to_ours = timings[p].median / timings["ours"].median
    run.rows += rows.values()
    return timings


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
    print(_line(list(rows.values())), flush=True)


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
    print(_line([row for row in rows.values() if row.median_us or row.verdict]), flush=True)


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
        print(_line(list(rows.values())), flush=True)


def heads(run: Run) -> None:
    """Training steps of a tabular VAE whose heads are linear; K as in the paper's data sets, N = S, the samples of z."""
    for k in [13] if run.quick else [13, 24, 50]:
        for samples in [1] if run.quick else [1, 20]:
            for name in [n for n in run.rules if n not in ELEMENTWISE]:
                error, right = tabular.gate(k, RULES[name])
                calls = tabular.steps(k, samples, RULES[name], name)
                rows = {p: Row("heads", name, k, samples, p, data_in=data_in(samples * 128 * 50 * 4)) for p in calls}
                compare(run, rows, calls, right, error)
                print(_line(list(rows.values())), flush=True)


def parameter_lists(run: Run) -> None:
    """Lists of tensors, one problem: the parameters of a ResNet-18, against TorchJD in both of its ways."""
    data = parameters.Lists(list(parameters.resnet18())[: 20 if run.quick else None])
    for name in [n for n in run.rules if n not in ELEMENTWISE]:
        rows = {p: Row("parameters", name, data.k, data.n, p, data_in=data_in(data.k * data.n * 4)) for p in parameters.PROVIDERS}
        calls: dict[str, Call] = {}
        for p, provider in parameters.PROVIDERS.items():
            try:
                calls[p] = provider(name, data)
            except Unavailable as reason:
                rows[p].verdict = str(reason)
        error, right = gate(name, data, data.resolve)
        timings = compare(run, rows, calls, right, error, 4)
        if right:
            rows["ours"].gbps = (2 * data.k + 1) * data.n * 4 / timings["ours"].median / 1e3
        print(_line(list(rows.values())), flush=True)


def attach(run: Run) -> None:
    """A training step with `attach`, with the block built in and without one: a usual size, and small ones, where every microsecond of the host shows."""
    for width, batch in [(512, 256)] if run.quick else [(512, 256), (64, 256), (16, 32)]:
        calls, error, right = attached.steps(width, batch)
        rows = {
            p: Row("attach", "UPGrad", attached.HEADS, batch * width, p, data_in=data_in(attached.HEADS * batch * width * 4)) for p in calls
        }
        compare(run, rows, calls, right, error, 12)
        print(_line(list(rows.values())), flush=True)


def log_probs(run: Run) -> None:
    """Likelihoods and their gradients, the compiled operator against plain torch."""
    for name, rows_of_x, samples in likelihoods.CASES[: 3 if run.quick else None]:
        case = likelihoods.Case(name, rows_of_x, samples)
        error, right = case.gate()
        calls = {p: case.call(p) for p in ("ours", "torch", "none")}
        rows = {
            p: Row("likelihoods", name, len(case.joint.sizes), rows_of_x * samples, p, data_in=data_in(case.raw.numel() * 4)) for p in calls
        }
        compare(run, rows, calls, right, error, 4)
        print(_line(list(rows.values())), flush=True)


def many_models(run: Run) -> None:
    """A training step of several models together against one of a single model."""
    for objective, samples, count in together.CASES[: 2 if run.quick else None]:
        calls, error, right = together.steps(objective, samples, count)
        rows = {p: Row("together", objective, count, samples, p) for p in calls}
        compare(run, rows, calls, right, error, 8)
        print(_line(list(rows.values())), flush=True)


def multimodal_steps(run: Run) -> None:
    """A training step of a multimodal VAE with blocks against one without, and what either has alive at once."""
    for mixture in multimodal.CASES[: 1 if run.quick else None]:
        calls, missing, error, right = multimodal.steps(mixture)
        rows = {p: Row("multimodal", mixture, 3, multimodal.SAMPLES * multimodal.BATCH, p) for p in [*calls, *missing]}
        for p, reason in missing.items():
            rows[p].verdict = reason
        if right:
            for p, call in calls.items():
                rows[p].peak_mb = multimodal.peak(call)
        compare(run, rows, calls, right, error, 40)
        print(_line(list(rows.values())), flush=True)


def compile_step(run: Run) -> None:
    """The training step of `heads` under torch.compile, against itself in eager mode; one rule unless others are asked for."""
    if run.quick:
        return  # compiling alone takes longer than all the rest
    k = 13
    for section, (make, plain) in compiled.HEADS.items():
        for samples in [1, 20]:
            for name in [n for n in run.rules if n not in ELEMENTWISE] if len(run.rules) < len(TWELVE) else ["MGDA"]:
                calls, error, right = compiled.steps(k, samples, make(k, RULES[name](k)), plain(k))
                rows = {p: Row(section, name, k, samples, p, data_in=data_in(samples * 128 * 50 * 4)) for p in calls}
                compare(run, rows, calls, right, error, 4)
                print(_line(list(rows.values())), flush=True)


SECTIONS: dict[str, Callable[[Run], None]] = {
    "machine": machine,
    "gram": gram,
    "latency": latency,
    "block": block,
    "heads": heads,
    "parameters": parameter_lists,
    "attach": attach,
    "likelihoods": log_probs,
    "together": many_models,
    "multimodal": multimodal_steps,
    "compile": compile_step,
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
