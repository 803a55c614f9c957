"""The figure: per-feature errors, conflict over the training, speed."""

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter

from mmfast.demo.report import change, mean_error, medians, percent
from mmfast.demo.run import OURS, WITH, WITHOUT, Conflict, Result

GREY, BLUE, LIGHT, INK = "#9aa0a6", "#1a5fb4", "#e3e6e8", "#202124"
STYLE: Any = {
    "font.size": 9.5,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": "#5f6368",
    "ytick.color": INK,
    "text.color": INK,
    "figure.facecolor": "white",
    "text.parse_math": False,  # a dollar in a column's name is a dollar
}
MOST_FEATURES = 40  # in one figure: more would be too small to read


def _short(name: str, most: int = 32) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}\N{HORIZONTAL ELLIPSIS}"


def shown_features(result: Result) -> list[int]:
    """The features in the figure, from the one that lost most to the one that gained most; of too many, half from either end."""
    gain = (medians(result, WITHOUT) - medians(result, WITH)).nan_to_num(0.0)
    order = gain.argsort(stable=True).tolist()
    half = MOST_FEATURES // 2
    return order if len(order) <= MOST_FEATURES else order[:half] + order[-half:]


def _errors(ax: Axes, result: Result) -> None:
    """A dumbbell per feature: from the error without the block to the error with it; whiskers span the seeds."""
    before, after = medians(result, WITHOUT), medians(result, WITH)
    order = shown_features(result)
    for y, i in enumerate(order):
        a, b = before[i].item(), after[i].item()
        ax.plot([a, b], [y, y], color=BLUE if b < a else GREY, lw=2.5, alpha=0.35, solid_capstyle="round", zorder=2)
        for name, colour, shift in ((WITHOUT, GREY, 0.13), (WITH, BLUE, -0.13)):
            seeds = [outcome.errors[i].item() for outcome in result.outcomes[name]]
            ax.plot([min(seeds), max(seeds)], [y + shift] * 2, color=colour, lw=1, zorder=1)
        ax.plot(a, y, "o", color=GREY, ms=7, zorder=3, clip_on=False)
        ax.plot(b, y, "o", color=BLUE, ms=7, zorder=3, clip_on=False)
    columns = [result.table.columns[i] for i in order]
    ax.set_yticks(range(len(order)), [f"{_short(column.name.replace('_', ' '))}  ({column.kind})" for column in columns])
    ax.set_ylim(-0.7, len(order) - 0.3)
    ax.set_xlim(left=0)
    ax.grid(axis="x", color=LIGHT, lw=0.8)
    ax.tick_params(length=0)
    ax.spines["left"].set_visible(False)
    ax.set_xlabel(
        f"error on held-out rows: error rate, or RMSE / range{'; thin lines: range over the seeds' if len(result.outcomes[WITH]) > 1 else ''}"
    )
    k, shown = len(result.table.columns), len(order)
    ax.set_title(
        "Reconstruction error of each feature" if shown == k else f"Reconstruction error of {shown} of {k} features: most gained, most lost"
    )
    ax.plot([], [], "o", color=GREY, ms=7, label="without block")
    ax.plot([], [], "o", color=BLUE, ms=7, label=f"with block ({result.settings.rule})")
    ax.legend(frameon=False, loc="best", handletextpad=0.2)


def _over_time(ax: Axes, result: Result, name: str, value: Callable[[Conflict], float], **line: Any) -> None:
    """The median over the seeds, and each seed faintly behind it."""
    outcomes = result.outcomes[name]
    curves = [[value(c) for c in outcome.conflicts] for outcome in outcomes]
    for curve in curves if len(curves) > 1 else ():
        ax.plot(outcomes[0].steps, curve, **(line | {"label": None, "lw": 0.7, "alpha": 0.3}))
    ax.plot(outcomes[0].steps, [statistics.median(values) for values in zip(*curves, strict=True)], **line)


def _conflict(share: Axes, ratio: Axes, result: Result) -> None:
    for name, colour in ((WITHOUT, GREY), (WITH, BLUE)):
        _over_time(share, result, name, lambda c: 100 * c.share, color=colour, lw=1.6, label=name)
        _over_time(ratio, result, name, lambda c: c.imbalance, color=colour, lw=1.6)
    dashes = {"color": BLUE, "lw": 1.6, "ls": (0, (3, 1.5)), "label": "with block, after its weights"}
    if all(c.resolved is not None for outcome in result.outcomes[WITH] for c in outcome.conflicts):
        _over_time(ratio, result, WITH, lambda c: c.resolved or 1.0, **dashes)
    share.set_ylim(0, None)
    share.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.0f} %"))
    share.set_title("Pairs of gradients that conflict")
    share.tick_params(labelbottom=False)
    ratio.set_yscale("log")
    ratio.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}×"))
    ratio.yaxis.set_minor_formatter(NullFormatter())
    ratio.set_title("Largest gradient over smallest")
    ratio.set_xlabel("training step")
    ratio.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}"))
    ratio.set_ylim(bottom=1)
    for ax in (share, ratio):
        ax.grid(axis="y", color=LIGHT, lw=0.8)
        ax.set_xlim(0, None)
        if ax.get_legend_handles_labels()[0]:
            ax.legend(frameon=False, fontsize=8.5, loc="best", ncols=2)
        ax.tick_params(length=0, which="both")


def _speed(ax: Axes, result: Result) -> None:
    top = max(s.per_second or 0.0 for s in result.speeds)
    for y, s in enumerate(reversed(result.speeds)):
        inside = (s.per_second or 0.0) > top / 2
        if s.per_second is not None:
            ax.barh(y, s.per_second, color=BLUE if s.label == OURS else "#c4c7ca", height=0.62)
            number = ax.annotate(f" {s.per_second:,.0f}", (s.per_second, y), va="center")
            if inside:
                ax.text(0, y, f" {s.reason}", va="center", fontsize=8.5)
            else:
                ax.annotate(f"  {s.reason}", (1, 0.5), xycoords=number, va="center", color="#5f6368", fontsize=8.5)
        else:
            ax.text(0, y, f" {s.reason}", va="center", color="#5f6368", fontsize=8.5)
    ax.set_yticks(range(len(result.speeds)), [f"{s.label}, {s.rule}" if s.rule else s.label for s in reversed(result.speeds)])
    ax.set_xlim(0, 1.15 * top)
    ax.tick_params(length=0)
    ax.spines["left"].set_visible(False)
    ax.set_xlabel("training steps per second")
    ax.set_title("Speed")


def draw(result: Result, path: Path) -> Path:
    """Writes the figure as a PNG."""
    k, timed = len(shown_features(result)), len(result.speeds)
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(12, max(7.2, 1.6 + 0.36 * k)), layout="constrained")
        grid = figure.add_gridspec(3, 2, width_ratios=[1.25, 1], height_ratios=[1, 1, 0.25 + 0.16 * timed])
        _errors(figure.add_subplot(grid[:, 0]), result)
        share = figure.add_subplot(grid[0, 1])
        _conflict(share, figure.add_subplot(grid[1, 1], sharex=share), result)
        _speed(figure.add_subplot(grid[2, 1]), result)
        a, b = (mean_error(result, name) for name in (WITHOUT, WITH))
        seeds = len(result.outcomes[WITH])
        figure.suptitle(
            f"{_short(result.table.name)}: mean error {a:.3f} without the block, {b:.3f} with it ({percent(change(a, b))}), "
            f"{f'median of {seeds} seeds' if seeds > 1 else 'one seed'}, {result.epochs:,} epochs",
            x=0.01,
            ha="left",
            fontsize=13,
            fontweight="bold",
        )
        figure.savefig(path, dpi=150)
        plt.close(figure)
    return path
