"""Tables of a run: where it stands against the targets, and each rule's speed-up. `python -m benchmarks.report [CSV]` prints those of docs/speed.md."""

import sys
from pathlib import Path

from benchmarks.rows import RESULTS, Row, newest, read
from benchmarks.targets import TARGETS, geometric_mean, ratios

QUOTED = RESULTS / "2026-11-29-9789eab.csv"  # the run that docs/speed.md and the picture of README show
BUSY = 5.0  # percent of the processors that other programs may use while numbers are made


def number(value: float | None) -> str:
    """Three significant digits, without exponent."""
    if value is None:
        return ""
    if value >= 99.95:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def table(head: list[str], body: list[list[str]]) -> str:
    """Markdown that reads well in a terminal too: first column to the left, the others to the right."""
    widths = [max(len(line[c]) for line in [head, *body]) for c in range(len(head))]

    def line(cells: list[str]) -> str:
        return "| " + " | ".join(x.ljust(w) if c == 0 else x.rjust(w) for c, (x, w) in enumerate(zip(cells, widths, strict=True))) + " |"

    rule = "|" + "|".join("-" * (w + 2) if c == 0 else "-" * (w + 1) + ":" for c, w in enumerate(widths)) + "|"
    return "\n".join([line(head), rule, *map(line, body)])


def standing(rows: list[Row]) -> str:
    body = []
    for target in TARGETS:
        found = target.measure(rows)
        value, where, verdict = (
            ("not measured", "", "") if found is None else (number(found[0]) + " " + target.unit, found[1], target.verdict(found[0]))
        )
        body.append([target.name, f"{number(target.must)} {target.unit}", f"{number(target.aim)} {target.unit}", value, verdict, where])
    return table(["target", "must", "aim", "measured", "reached", "where"], body)


def speed_up(rows: list[Row]) -> str:
    """TorchJD's time / ours: the geometric mean over K for each rule and N, and the worst cell."""
    found = ratios(rows)
    sizes = sorted({r.n for r in found})
    body = []
    for rule in dict.fromkeys(r.rule for r in found):
        own = [r for r in found if r.rule == rule]
        means = [[r.ratio_to_ours or 0 for r in own if r.n == n] for n in sizes]
        worst = min(own, key=lambda r: r.ratio_to_ours or 0)
        body.append(
            [rule, *(number(geometric_mean(m)) if m else "" for m in means), f"{number(worst.ratio_to_ours)} (K={worst.k}, N={worst.n})"]
        )
    return table(["rule", *(f"N = {n}" for n in sizes), "worst"], body)


def by_provider(rows: list[Row], section: str, columns: list[str]) -> str:
    """Microseconds of every provider, one line per case; a red gate or a missing peer says so."""
    cases: dict[tuple[str, int, int], dict[str, Row]] = {}
    for r in rows:
        if r.section == section and r.provider in columns:
            cases.setdefault((r.rule, r.k, r.n), {})[r.provider] = r
    body = []
    for (rule, k, n), own in cases.items():
        cells = []
        for provider in columns:
            r = own.get(provider)
            ratio = f" ({number(r.ratio_to_ours)}x)" if r and r.ratio_to_ours and provider != "ours" else ""
            cells.append("" if r is None else number(r.median_us) + ratio if r.median_us else "wrong" if r.verdict == "wrong" else "–")
        if any(cells):
            body.append([rule, str(k), str(n), *cells])
    return table(["rule", "K", "N", *(f"{c}, µs" for c in columns)], body)


def gram(rows: list[Row]) -> str:
    body = [
        [str(r.k), str(r.n), r.dtype, r.provider, number(r.median_us), number(r.gbps), number(r.gflops), number(r.percent_of_roofline)]
        for r in rows
        if r.section == "gram"
    ]
    return table(["K", "N", "dtype", "provider", "µs", "GB/s", "GFLOP/s", "% of roofline"], body)


def disturbed(env: dict[str, str]) -> str:
    """What to say where the machine was not quiet, or nothing."""
    others = float(env["others_percent"] or 0)
    return f"Other programs used {others:.0f} % of the processors during this run: not to be quoted." if others > BUSY else ""


def machine(rows: list[Row], env: dict[str, str]) -> str:
    reads = [r.gbps for r in rows if r.section == "machine" and r.gbps]
    flops = [r.gflops for r in rows if r.section == "machine" and r.gflops]
    measured = []
    if reads:
        measured.append(f"reads {number(max(reads))} GB/s")
    if flops:
        measured.append(f"multiply-adds {number(max(flops))} GFLOP/s")
    busy = f" **{disturbed(env)}**" if disturbed(env) else ""
    return (
        f"{env['cpu']}, {env['threads']} threads, {env['machine']}; Python {env['python']}, torch {env['torch']}, "
        f"TorchJD {env['torchjd'] or 'absent'}, mmfast {env['mmfast']} at {env['commit']}, {env['date']}"
        + (f"; measured here: {', '.join(measured)}" if measured else "")
        + "."
        + busy
    )


def summary(rows: list[Row], env: dict[str, str]) -> str:
    """What docs/speed.md quotes: targets, and the speed-up of each rule."""
    parts = [standing(rows)]
    if ratios(rows):
        parts.append("TorchJD's time / ours (geometric mean over K), gradients already stacked for TorchJD:\n\n" + speed_up(rows))
    parts.append(machine(rows, env))
    return "\n\n".join(parts) + "\n"


TITLES = {
    "providers": ("Every way to do it, µs", ["ours", "torchjd", "torch", "compile", "naive"]),
    "latency": ("Small gradients, µs per Python call", ["ours", "torchjd", "torch"]),
    "block": ("A block's forward and backward, µs", ["ours", "naive", "none"]),
    "heads": (
        "Training step of a tabular VAE with linear heads (N: samples of z), µs",
        ["ours", "fused", "parts", "split", "loop", "naive"],
    ),
    "parameters": ("Four losses at the 62 parameters of a ResNet-18, as lists, µs", ["ours", "torchjd", "torchjd sums"]),
    "attach": ("Training step with attach, with a block built in, without one (N: batch x width), µs", ["ours", "built", "none"]),
    "monitor": (
        "Training step with a block, and what a Monitor adds to it (CPU time of the thread; N: batch x width), µs",
        ["none", "monitor"],
    ),
    "likelihoods": (
        "Likelihoods and their gradients, and a backward pass without any (K features; N: rows), µs",
        ["ours", "torch", "none"],
    ),
    "together": ("Training step of K tabular VAEs together, and of one by itself (N: samples of z), µs", ["ours", "single"]),
    "collapse": (
        "Average gradient outer product of a layer of 1,024, first or behind another one, and one backward pass (K outputs; N samples), µs",
        ["ours", "backward"],
    ),
    "multimodal": (
        'Training step of a multimodal VAE with blocks (ours: "p"), without, and by loops (N: samples of z x batch), µs',
        ["ours", "none", "pq", "pqs", "loops", "naive", "multivae"],
    ),
    "compile": ("The same step with LinearHeads, loss and backward pass by torch.compile, µs", ["ours", "eager", "none"]),
    "compile block": (
        "The same step with an ImpartialityBlock over nn.Linear, loss and backward pass by torch.compile, µs",
        ["ours", "eager", "none"],
    ),
}


def full(rows: list[Row], env: dict[str, str]) -> str:
    """Everything: the file results/latest.md."""
    parts = ["# Benchmarks: the latest run", summary(rows, env).rstrip()]
    sections = {r.section for r in rows}
    if "gram" in sections:
        parts += ["## Gramian against the roofline", gram(rows)]
    for section, (title, columns) in TITLES.items():
        if section in sections:
            parts += [f"## {title}", by_provider(rows, section, columns)]
    if "grid" in sections:
        parts += ["## All cases of the grid, µs", by_provider(rows, "grid", ["ours", "torchjd"])]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else newest()
    if path is None:
        sys.exit("no results yet: run `make bench`")
    print(summary(*read(path)), end="")
