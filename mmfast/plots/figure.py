"""What the blocks saw over a run, and what one saw in a pass, as figures of matplotlib."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations
from math import isfinite, nan
from pathlib import Path
from statistics import fmean, quantiles
from typing import TYPE_CHECKING, Any

from mmfast.plots.log import BlockLog, Log

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure, FigureBase

    from mmfast.stats import BlockStats

MOST_LINES = 10  # in one panel; of more branches, each is a row of a map
INK, SOFT, LIGHT, BLUE = "#202124", "#5f6368", "#e3e6e8", "#1a5fb4"
STYLE: Any = {
    "axes.edgecolor": "#9aa0a6",
    "axes.grid.axis": "y",
    "axes.labelcolor": SOFT,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "font.size": 9,
    "grid.color": LIGHT,
    "legend.edgecolor": "none",
    "legend.framealpha": 0.7,
    "svg.fonttype": "none",  # text stays text
    "text.color": INK,
    "text.parse_math": False,  # a dollar in a branch's name is a dollar
    "xtick.color": SOFT,
    "ytick.color": SOFT,
}


@contextmanager
def styled(width: float, height: float) -> "Iterator[Figure]":
    """A figure to draw into, without a window. Raises ImportError where matplotlib is missing."""
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("a plot needs matplotlib: pip install 'mmfast[plot]'") from None
    with mpl.rc_context(STYLE):
        yield Figure(figsize=(width, height), layout="constrained")


def draw(log: Log, path: str | Path) -> None:
    """Draws every block of a run into one image file."""
    with styled(13, 5.4 * len(log.blocks)) as figure:
        parts = figure.subfigures(len(log.blocks), 1, squeeze=False)[:, 0]
        for part, block in zip(parts, log.blocks, strict=True):
            fill(part, block, log.steps)
            part.suptitle(_short(block.name, 80), x=0.01, ha="left", fontweight="bold", fontsize=12)
        figure.savefig(str(path), dpi=120)


def fill(figure: "FigureBase", block: BlockLog, steps: Sequence[int]) -> None:
    """The panels of one block: a map of the cosines, and cosines, conflict, weights and norms over the steps."""
    grid = figure.add_gridspec(2, 3, width_ratios=(1.5, 1, 1))
    last = max(1, len(steps) // 10)
    cosines = [mean(column) for column in zip(*block.cosines[-last:], strict=True)]
    since = f"mean from step {steps[-last]:,} on" if last > 1 else f"at step {steps[-1]:,}"
    _map(figure.add_subplot(grid[:, 0]), block.branches, cosines, f"cosines, {since}")
    axes = [figure.add_subplot(grid[i // 2, 1 + i % 2]) for i in range(4)]
    _cosines(axes[0], block, steps)
    conflict = [100 * c for c in block.conflict]
    axes[1].plot(steps, conflict, color=LIGHT if len(steps) > 40 else BLUE, lw=1, **_marker(conflict))
    if len(steps) > 40:
        axes[1].plot(steps, smooth(conflict), color=BLUE, lw=1.5)
    axes[1].set_ylim(-3, 103)
    axes[1].set_title("pairs that conflict, %")
    _branches(axes[2], block.branches, steps, block.weights, "weights", log=False)
    _branches(axes[3], block.branches, steps, block.norms, "norms of the gradients", log=True)
    for ax in axes:
        ax.grid(visible=True)
        ax.set_axisbelow(True)
        if len(steps) > 1:
            ax.set_xlim(steps[0], steps[-1])
    for ax in axes[2:]:
        ax.set_xlabel("step")


def draw_stats(stats: "BlockStats", path: str | Path) -> None:
    """Draws what a block saw in one backward pass; means over the samples for per="sample"."""
    k = len(stats.names)
    lead = tuple(range(stats.conflict_rate.dim()))

    def values(x: Any) -> Any:
        return (x.nanmean(lead) if lead else x).tolist()

    C = values(stats.cosines)
    height = min(9.0, max(4.0, 0.9 + 0.16 * k))
    with styled(6.5 + height, height) as figure:
        grid = figure.add_gridspec(1, 4, width_ratios=(height, 2, 2, 2))
        rate = f"cosines; {100 * values(stats.conflict_rate):.0f} % of the pairs conflict" if k > 1 else "cosines"
        _map(figure.add_subplot(grid[0]), stats.names, [C[i][j] for i, j in combinations(range(k), 2)], rate)
        bars = (("weights", stats.weights), ("norms", stats.norms), ("cosines to the result", stats.cosine_to_direction))
        for n, (title, column) in enumerate(bars):
            ax = figure.add_subplot(grid[1 + n])
            numbers = [v if isfinite(v) else 0.0 for v in values(column)]
            ax.barh(range(k), numbers, color=[BLUE if v >= 0 else "#b3261e" for v in numbers], height=0.7)
            shown = range(0, k, -(-k // 50))
            ax.set_yticks(shown, [] if n else [_short(stats.names[i]) for i in shown], fontsize=_font(k))
            ax.set_ylim(k - 0.5, -0.5)
            ax.axvline(0, color=SOFT, lw=0.8)
            ax.tick_params(axis="y", length=0)
            ax.set_title(title)
        figure.savefig(str(path), dpi=120)


def _map(ax: "Axes", names: Sequence[str], pairs: Sequence[float], title: str) -> None:
    """K x K cosines, with the numbers where there is room for them."""
    k = len(names)
    C = [[nan if k > 1 else 1.0] * k for _ in names]
    for (i, j), cosine in zip(combinations(range(k), 2), pairs, strict=True):
        C[i][j] = C[j][i] = cosine
        if isfinite(cosine):  # otherwise the branch may never have had a gradient
            C[i][i] = C[j][j] = 1.0
    ax.set_facecolor("#d0d0d0")  # where there is none
    image = ax.imshow(C, vmin=-1, vmax=1, cmap="RdBu", interpolation="nearest")
    shown = range(0, k, -(-k // 25))
    ticks = [_short(names[i], 14) for i in shown]
    ax.set_xticks(shown, ticks, rotation=0 if k <= 4 else 90, fontsize=_font(k))
    ax.set_yticks(shown, ticks, fontsize=_font(k))
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)
    for i, j in [(i, j) for i in range(k) for j in range(k)] if k <= MOST_LINES else []:
        text = f"{C[i][j]:.2f}" if isfinite(C[i][j]) else "–"
        ax.text(j, i, text, ha="center", va="center", color="white" if abs(C[i][j]) > 0.6 else INK, fontsize=10 if k <= 6 else 7)
    ax.set_title(title)
    bar = ax.figure.colorbar(image, ax=ax, shrink=0.6, pad=0.02, aspect=30)
    bar.outline.set_visible(False)  # type: ignore[operator]


def _cosines(ax: "Axes", block: BlockLog, steps: Sequence[int]) -> None:
    """Each pair's where they are few; of many the spread."""
    pairs = [f"{_short(a)}, {_short(b)}" for a, b in combinations(block.branches, 2)]
    ax.set_ylim(-1.05, 1.05)
    ax.axhline(0, color=SOFT, lw=0.8)
    if len(pairs) <= 6:
        _lines(ax, pairs, steps, block.cosines)
        ax.set_title("cosines of the pairs")
        return
    ranges = [quantiles(there, n=20, method="inclusive") if len(there := _finite(row)) > 1 else [nan] * 19 for row in block.cosines]
    low, quarter, middle, three, high = ([r[n] for r in ranges] for n in (0, 4, 9, 14, 18))
    ax.fill_between(steps, low, high, color=BLUE, alpha=0.15, lw=0, label="90 % of them")
    ax.fill_between(steps, quarter, three, color=BLUE, alpha=0.3, lw=0, label="half")
    ax.plot(steps, middle, color=BLUE, lw=1.5, label="median", **_marker(middle))
    ax.legend(fontsize=8, loc="best", ncols=3, handlelength=1.2, columnspacing=1.0)
    ax.set_title(f"cosines of the {len(pairs):,} pairs")


def _branches(ax: "Axes", names: Sequence[str], steps: Sequence[int], values: Sequence[Sequence[float]], title: str, log: bool) -> None:
    """A line for each branch, or a map with a row for each where they are many."""
    finite = [v for row in values for v in _finite(row) if v > 0]
    log = log and bool(finite) and max(finite) > 5 * min(finite)
    if len(names) <= MOST_LINES:
        _lines(ax, [_short(name) for name in names], steps, values)
        if log:
            ax.set_yscale("log")
            _label_powers(ax.yaxis)
        ax.set_title(title)
        return
    from matplotlib.colors import LogNorm

    table = [[v if not log or v > 0 else nan for v in column] for column in zip(*values, strict=True)]
    ax.set_facecolor("#d0d0d0")
    edges = [*steps, 2 * steps[-1] - steps[-2]] if len(steps) > 1 else [steps[0] - 0.5, steps[0] + 0.5]
    image = ax.pcolormesh(
        edges, [n - 0.5 for n in range(len(names) + 1)], table, cmap="viridis", norm=LogNorm() if log else None, rasterized=True
    )
    ax.set_ylim(len(names) - 0.5, -0.5)
    ticks = range(0, len(names), -(-len(names) // 12))
    ax.set_yticks(ticks, [_short(names[n], 14) for n in ticks], fontsize=7)
    bar = ax.figure.colorbar(image, ax=ax, pad=0.02)
    bar.outline.set_visible(False)  # type: ignore[operator]
    if log:
        _label_powers(bar.ax.yaxis)
    ax.set_title(f"{title} of {len(names)} branches" if title == "weights" else f"{title}, {len(names)} branches")


def _lines(ax: "Axes", names: Sequence[str], steps: Sequence[int], values: Sequence[Sequence[float]]) -> None:
    """A line for each name; where they are long, a smooth one over a faint one."""
    import matplotlib as mpl

    for n, name in enumerate(names):
        curve, colour = [row[n] for row in values], mpl.color_sequences["tab10"][n]
        if len(steps) > 40:
            ax.plot(steps, curve, color=colour, lw=0.6, alpha=0.3)
            curve = smooth(curve)
        ax.plot(steps, curve, color=colour, lw=1.5, label=name, **_marker(curve))
    if names:
        ax.legend(fontsize=8, loc="best", ncols=1 if len(names) <= 3 else 2, handlelength=1.2)


def mean(values: Sequence[float]) -> float:
    """Of those that are numbers."""
    there = _finite(values)
    return fmean(there) if there else nan


def smooth(values: Sequence[float]) -> list[float]:
    """Running means over a twentieth of the values, centred; NaN where there is none."""
    half = max(1, len(values) // 40)
    return [mean(values[max(0, n - half) : n + half + 1]) for n in range(len(values))]


def _finite(values: Sequence[float]) -> list[float]:
    return [v for v in values if isfinite(v)]


def _marker(values: Sequence[float]) -> dict[str, Any]:
    """Points where a line would show nothing: of a number between gaps there is none."""
    return {"marker": "o", "ms": 3} if len(_finite(values)) < 10 else {}


def _label_powers(axis: "Axis") -> None:
    """Plain numbers: the usual ones are formulas, which branches' names must not be taken for."""
    from matplotlib.ticker import LogFormatter

    axis.set_major_formatter(LogFormatter())
    axis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))


def _font(k: int) -> float:
    return 9 if k <= 20 else 7


def _short(name: str, most: int = 24) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}\N{HORIZONTAL ELLIPSIS}"
