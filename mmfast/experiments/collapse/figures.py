"""The noise sweep and the rank of the fused features over the training, as PNG."""

import statistics
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mmfast.experiments.collapse import report
from mmfast.experiments.collapse.report import Sheet, Variant
from mmfast.experiments.collapse.settings import CURES, NOISY
from mmfast.experiments.settings import NONE

COLOURS = {NONE: "black", "kd": "#1a5fb4", "ebr": "#c64600"}


def draw(table: Sequence[Sheet], folder: Path) -> list[Path]:
    """Writes noise.png and ranks.png into a folder, each where there is something to draw; returns what was written.

    noise.png: the score of early fusion with each cure over the standard deviation of the noise, mean and interval. ranks.png: effective rank of its fused
    features after each epoch of the last stage, mean over the seeds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for name, shown, panel in (
        ("noise.png", [s for s in table if any(v.noise for v in s.runs)], _noise),
        ("ranks.png", [s for s in table if any(Variant("early", cure) in s.runs for cure in CURES)], _ranks),
    ):
        if not shown:
            continue
        figure, axes = plt.subplots(1, len(shown), figsize=(3.6 * len(shown), 2.8), squeeze=False, layout="constrained")
        for ax, sheet in zip(axes[0], shown, strict=True):
            panel(ax, sheet)
            ax.set_title(sheet.data, fontsize=9, loc="left")
            ax.spines[["top", "right"]].set_visible(False)
            ax.tick_params(labelsize=7)
            ax.legend(frameon=False, fontsize=7)
        made.append(_written(figure, folder / name))
    return made


def _noise(ax: Axes, sheet: Sheet) -> None:
    levels = sorted({v.noise for v in sheet.runs if v.system == "early" and v.rule == NONE})
    for cure, colour in COLOURS.items():
        found = [(level, sheet.value(Variant("early", cure, noise=level), report.main)) for level in levels]
        known = [(level, v) for level, v in found if v is not None]
        weights = [f"{next(iter(sheet.runs[Variant('early', cure, noise=level)].values())).settings.weight:g}" for level, _ in known]
        label = (CURES[cure] or "no cure") + (f", weight {', '.join(weights)}" if len(set(weights)) > 1 else "")  # level by level
        ax.plot([level for level, _ in known], [v.mean for _, v in known], color=colour, label=label, lw=1.4, marker=".")
        ax.fill_between(
            [level for level, _ in known], [v.low for _, v in known], [v.high for _, v in known], color=colour, alpha=0.15, lw=0
        )
    ax.set_xlabel(f"noise in {NOISY[sheet.data]}, standard deviation", fontsize=8)
    ax.set_ylabel("ROC" if sheet.classes == 2 else "accuracy", fontsize=8)


def _ranks(ax: Axes, sheet: Sheet) -> None:
    for cure, colour in COLOURS.items():
        curves = list(zip(*(r.ranks for r in sheet.runs.get(Variant("early", cure), {}).values()), strict=False))
        means = [statistics.mean(known) if (known := [x for x in of if x is not None]) else float("nan") for of in curves]
        if means:
            ax.plot(range(1, len(means) + 1), means, color=colour, label=CURES[cure] or "no cure", lw=1.4)
    ax.set_xlabel("epoch", fontsize=8)
    ax.set_ylabel("effective rank, fused", fontsize=8)


def _written(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
