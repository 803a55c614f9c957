"""The picture at the top of README, from our own code and record. `python -m benchmarks.picture` writes docs/picture.svg."""

import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from torch import Tensor

import mmfast as mf
from benchmarks.report import QUOTED
from benchmarks.rows import RESULTS, read
from benchmarks.targets import geometric_mean
from mmfast.experiments import results
from mmfast.experiments.report import Cell, cells
from mmfast.experiments.settings import MODELS

PICTURE = RESULTS.parent.parent / "docs" / "picture.svg"
RECORD = RESULTS / "table1" / "runs.jsonl"
INK, GREY, BLUE, RED = "#7a828c", "#9aa1a9", "#2f81f7", "#d9534f"  # all of a middle lightness: the background may be white or dark
COLOURS = {"image": "#d08700", "sound": "#1a9e77", "text": "#b5589c"}
GRADIENTS = {"image": (3.4, -0.6), "sound": (-0.1, 1.2), "text": (-1.4, 1.1)}  # to be followed, so minus the losses' gradients
STYLE: Any = {
    "svg.hashsalt": "mmfast",  # the same file on every run
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlepad": 8,
    "xtick.color": INK,
    "ytick.color": INK,
}


def directions() -> tuple[Tensor, Tensor, Tensor]:
    """The gradients [3, 2], their plain sum, and what a block passes on: UPGrad at the length of the plain sum."""
    grads = torch.tensor(list(GRADIENTS.values()))
    total, resolved = grads.sum(0), mf.resolve(grads, mf.UPGrad())
    return grads, total, resolved * total.norm() / resolved.norm()


def worst() -> list[tuple[str, float, float]]:
    """(model and data, largest error of a feature without a block, with the chosen rule), medians over seeds, of every cell of the record."""

    def largest(cell: Cell) -> tuple[str, float, float]:
        before, after = (max(errors) for errors in zip(*cell.chosen.features.values(), strict=True))
        return f"{MODELS[cell.run.model]}, {cell.run.data}", before, after

    return [largest(cell) for cell in cells(results.read(RECORD)) if cell.of_paper]


def steps() -> dict[str, float]:
    """A training step's time by that of the same model with one plain layer and no block; geometric means over the cases that every way has."""
    rows, _ = read(QUOTED)
    found = {(r.provider, r.rule, r.k, r.n): r.median_us for r in rows if r.section == "heads" and r.median_us and r.rule != "Mean"}
    cases = [case for provider, *case in found if provider == "naive"]
    return {
        name: geometric_mean([found[(provider, *case)] / found[("fused", *case)] for case in cases])
        for provider, name in (("fused", "no block"), ("ours", "mmfast"), ("naive", "naive block"))
    }


def description() -> str:
    """What the picture shows, in numbers; kept in the file, so that a test can hold it to the record."""
    grads, total, resolved = directions()
    along = [f"{name} {a:+.2f}, {b:+.2f}" for name, a, b in zip(GRADIENTS, grads @ total, grads @ resolved, strict=True)]
    errors = [f"{name} {before:.3f}, {after:.3f}" for name, before, after in worst()]
    times = [f"{name} {time:.2f}" for name, time in steps().items()]
    return "; ".join(["along the sum, along the block's gradient", *along, "largest error without, with", *errors, "step", *times])


def _arrow(ax: Axes, to: Tensor, colour: str, width: float) -> None:
    x, y = to.tolist()
    ax.annotate(
        "",
        (x, y),
        (0, 0),
        arrowprops={"arrowstyle": "-|>", "color": colour, "lw": width, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 9 + 3 * width},
    )


def _plane(ax: Axes) -> None:
    grads, total, resolved = directions()
    for (name, colour), g in zip(COLOURS.items(), grads, strict=True):
        _arrow(ax, g, colour, 1.6)
        x, y = (g + 0.16 * g / g.norm()).tolist()
        ax.text(x, y, name, color=colour, ha="center" if abs(x) < 1.5 else "left", va="bottom" if y > 0 else "center", fontweight="bold")
    for direction, colour, name in ((total, GREY, "plain sum"), (resolved, BLUE, "block")):
        _arrow(ax, direction, colour, 3.2)
        x, y = (direction + 0.1 * direction / direction.norm()).tolist()
        ax.text(x, y, f" {name}", color=colour, va="center", fontweight="bold", fontsize=10)
    against = [name for name, along in zip(GRADIENTS, grads @ total, strict=True) if along < 0]
    assert min((grads @ resolved).tolist()) > -1e-6, "the block's gradient must work against none"
    ax.text(-1.5, -0.75, f"The plain sum works against {' and '.join(against)},", va="top")
    ax.text(-1.5, -1.07, "the block (UPGrad) against none.", va="top", color=BLUE)
    ax.plot(0, 0, "o", color=INK, ms=4)
    ax.set(xlim=(-1.6, 4.1), ylim=(-1.4, 2.6), aspect="equal")
    ax.axis("off")
    ax.set_title("Three modalities' gradients", color=INK)


def _errors(ax: Axes) -> None:
    found = worst()
    for y, (_, before, after) in enumerate(reversed(found)):
        colour = BLUE if after < before else RED
        ax.plot([before, after], [y, y], color=colour, lw=2, alpha=0.45, zorder=1)
        ax.plot(before, y, "o", color=GREY, ms=6, zorder=2)
        ax.plot(after, y, "o", color=colour, ms=6, zorder=3)
    ax.set_yticks(range(len(found)), [name for name, _, _ in reversed(found)])
    ax.set_xlim(0, 1.08 * max(math.ceil(10 * max(before, after)) / 10 for _, before, after in found))
    ax.set_ylim(-0.6, len(found) - 0.4)
    ax.grid(axis="x", color=GREY, alpha=0.25, lw=0.7)
    ax.set_title("Error of the worst feature", color=INK)
    ax.set_xlabel("share wrong, or RMSE / range, held out")
    for colour, label in ((GREY, "without"), (BLUE, "with block"), (RED, "worse")):
        ax.plot([], [], "o", color=colour, ms=6, label=label)
    ax.legend(frameon=False, labelcolor=INK, handletextpad=0.1, loc="lower right", borderpad=0)


def _times(ax: Axes) -> None:
    found = steps()
    for y, (name, time) in enumerate(reversed(found.items())):
        ax.barh(y, time, color=BLUE if name == "mmfast" else GREY, height=0.55)
        ax.text(time, y, f" {time:.2f}" if time < 10 else f" {time:.0f}", va="center", color=INK, fontweight="bold")
    ax.set_yticks(range(len(found)), list(reversed(found)))
    ax.set_xlim(0, 1.2 * max(found.values()))
    ax.set_ylim(-0.6, len(found) - 0.4)
    ax.set_xticks([])
    ax.set_title("Time of a training step", color=INK)
    ax.set_xlabel("no block = 1")


def draw(path: Path) -> None:
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(10, 3.1), layout="constrained")
        grid = figure.add_gridspec(1, 3, width_ratios=[1.2, 1.05, 0.75], wspace=0.06)
        left, middle, right = (figure.add_subplot(cell) for cell in grid)
        _plane(left)
        _errors(middle)
        _times(right)
        for ax in (middle, right):
            ax.tick_params(length=0)
            for side in ("top", "right", "left"):
                ax.spines[side].set_visible(False)
        figure.savefig(path, transparent=True, metadata={"Date": None, "Creator": None, "Description": description()})
        plt.close(figure)


if __name__ == "__main__":
    draw(PICTURE)
    print(f"written: {PICTURE.relative_to(Path.cwd()) if PICTURE.is_relative_to(Path.cwd()) else PICTURE}")
