"""The picture of a run: how many times faster than TorchJD, for every rule, K and N."""

import math
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.colors import LogNorm
from matplotlib.patches import Rectangle

from benchmarks.report import disturbed, number
from benchmarks.rows import Row
from benchmarks.targets import GRID_MEAN, GRID_WORST, geometric_mean, ratios

LARGEST = 1000.0  # the colour scale ends here


def _size(n: int) -> str:
    return f"{n >> 20} M" if n >= 1 << 20 else f"{n >> 10} k" if n >= 1 << 10 else str(n)


def _short(value: float) -> str:
    return f"{value / 1000:.1f}k" if value >= 1000 else f"{value:.0f}" if value >= 9.95 else f"{value:.1f}"


def heat_map(rows: list[Row], env: dict[str, str], path: Path) -> bool:
    """Writes one panel per N, rules x K, on one logarithmic scale; returns False when the run has no such rows."""
    found = ratios(rows)
    if not found:
        return False
    rules, ks, ns = list(dict.fromkeys(r.rule for r in found)), sorted({r.k for r in found}), sorted({r.n for r in found})
    value = {(r.rule, r.k, r.n): r.ratio_to_ours or math.nan for r in found}
    norm = LogNorm(1, LARGEST)
    colours = plt.get_cmap("YlGnBu").with_extremes(bad="#f2f2f2")
    plt.rcParams.update({"font.family": "DejaVu Sans", "font.size": 9})
    size = (1.6 + 0.5 * len(ks) * len(ns), 1.5 + 0.31 * len(rules))
    figure, axes = plt.subplots(1, len(ns), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axis, n in zip(axes[0], ns, strict=True):
        cells = [[value.get((rule, k, n), math.nan) for k in ks] for rule in rules]
        image = axis.imshow(cells, norm=norm, cmap=colours, aspect="auto")
        for y, line in enumerate(cells):
            for x, cell in enumerate(line):
                if math.isnan(cell):
                    continue
                dark = norm(max(1.0, min(cell, LARGEST))) > 0.55
                axis.text(x, y, _short(cell), ha="center", va="center", fontsize=7.5, color="white" if dark else "#1a1a1a")
                if cell < GRID_WORST.must:
                    axis.add_patch(Rectangle((x - 0.46, y - 0.46), 0.92, 0.92, fill=False, edgecolor="#d62728", linewidth=1.6))
        mean = geometric_mean([c for line in cells for c in line if not math.isnan(c)])
        axis.set_title(f"N = {_size(n)}   (mean {_short(mean)}x)", fontsize=9.5)
        axis.set_xticks(range(len(ks)), [str(k) for k in ks])
        axis.set_yticks(range(len(rules)), rules)
        axis.set_xlabel("K gradients")
        axis.tick_params(length=0)
        axis.set_xticks([x - 0.5 for x in range(1, len(ks))], minor=True)
        axis.set_yticks([y - 0.5 for y in range(1, len(rules))], minor=True)
        axis.grid(which="minor", color="white", linewidth=1.2)
        axis.tick_params(which="minor", length=0)
        for side in axis.spines.values():
            side.set_visible(False)
    bar = figure.colorbar(image, ax=axes, shrink=0.9, pad=0.015, aspect=28, extend="both")
    bar.set_ticks([1, 3, 10, 30, 100, 300, 1000], labels=["1x", "3x", "10x", "30x", "100x", "300x", "1000x"])
    bar.outline.set_visible(False)  # type: ignore[operator]
    overall = GRID_MEAN.measure(rows)
    mean = number(overall[0] if overall else None)
    title = (
        f"mf.resolve against TorchJD on a CPU: {mean} times faster (geometric mean of {len(found)} cases; red: below {GRID_WORST.must}x)"
    )
    note = disturbed(env)
    figure.suptitle(f"{title}\n{note}" if note else title, fontsize=11, x=0.01, ha="left", color="#d62728" if note else "#1a1a1a")
    figure.savefig(path, dpi=160)
    plt.close(figure)
    return True
