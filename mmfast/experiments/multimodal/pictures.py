"""What a model generates, and the conflict over its training, as PNG."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from torch import Tensor

from mmfast.data.triplets import MODALITIES, Triplets
from mmfast.data.words import read
from mmfast.experiments.multimodal.metrics import SUBSETS
from mmfast.experiments.multimodal.report import Cell
from mmfast.experiments.multimodal.settings import MODELS, OBJECTIVES
from mmfast.experiments.settings import NONE
from mmfast.models.multimodal import MultimodalVAE
from mmfast.models.multimodal.networks import mean

SIDE = 34  # pixels of a picture with its margin
SHOWN = ("M", "S", "T", "MST")  # what is generated from
GREY = "#9aa0a6"


@torch.no_grad()
def generated(vae: MultimodalVAE, test: Triplets, device: torch.device, path: Path, title: str) -> Path:
    """Writes a picture: one test triplet of each digit; all modalities generated from each alone and from all; and from z of the prior.

    Args:
        vae: the model; its random numbers are torch's.
        test: triplets.
        device: of the model.
        path: of the PNG.
        title: above it.

    Returns:
        The path.
    """
    which = torch.stack([(test.labels == digit).nonzero()[0, 0] for digit in test.labels.unique()])
    inputs = {name: x.to(device) for name, x in test.batch(which).items()}
    groups: list[tuple[str, dict[str, Tensor]]] = [("test triplets", inputs)]
    for letters in SHOWN:
        z = vae.sample(inputs, SUBSETS[letters])[0]
        groups.append((f"from {letters}", _decoded(vae, z)))
    groups.append(("from the prior", _decoded(vae, torch.randn(len(which), vae.latent, device=device))))
    rows = len(groups) * 3
    canvas = torch.ones(rows * SIDE, len(which) * SIDE, 3)
    figure, ax = plt.subplots(figsize=(1 + 0.5 * len(which), 0.6 + 0.5 * rows))
    for g, (label, shown) in enumerate(groups):
        ax.text(-6, (g * 3 + 1.5) * SIDE, label, ha="right", va="center", fontsize=9)
        for r, name in enumerate(MODALITIES):
            for c, x in enumerate(shown[name].cpu()):
                top, left = (g * 3 + r) * SIDE, c * SIDE
                if name == "text":
                    ax.text(left + SIDE / 2, top + SIDE / 2, read(x.argmax(-1)).strip(), ha="center", va="center", fontsize=6)
                else:
                    h, w = x.shape[1:]
                    y, left = top + (SIDE - h) // 2, left + (SIDE - w) // 2
                    canvas[y : y + h, left : left + w] = x.permute(1, 2, 0).expand(h, w, 3)
        ax.axhline((g + 1) * 3 * SIDE - 0.5, color=GREY, lw=0.8)
    ax.imshow(canvas.numpy(), interpolation="nearest")
    ax.axis("off")
    ax.set_title(title, fontsize=9, loc="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)
    return path


def _decoded(vae: MultimodalVAE, z: Tensor) -> dict[str, Tensor]:
    return {name: mean(name, vae.modalities[name].decoder(z)) for name in MODALITIES}  # type: ignore[operator]


def conflict(table: Sequence[Cell], path: Path) -> Path:
    """Writes a figure: for each model and loss the share of decoders' pairs that conflict at z over the training, mean over the seeds, a line for each rule on "p".
    Each data set, size and number of epochs has rows of its own."""
    parts = {cell.part for cell in table}
    rows = list(dict.fromkeys((cell.part, cell.model) for cell in table))
    losses = [loss for loss in OBJECTIVES if any(cell.objective == loss for cell in table)]
    rules = sorted({rule for cell in table for rule, blocks in cell.variants if blocks == "p"})
    colours = {NONE: "black"} | {rule: f"C{i}" for i, rule in enumerate(rules)}  # the same in every cell, whichever run of it ended first
    figure, axes = plt.subplots(
        len(rows),
        len(losses),
        figsize=(3.6 * len(losses), 0.4 + 2.4 * len(rows)),
        squeeze=False,
        sharex="row",
        sharey=True,
        layout="constrained",
    )
    for cell in table:
        ax = axes[rows.index((cell.part, cell.model)), losses.index(cell.objective)]
        _curves(ax, cell, colours)
        of_part = f"; {cell.data}, {cell.size}, {cell.epochs} epochs" if len(parts) > 1 else ""
        ax.set_title(f"{MODELS[cell.model]}, {cell.objective.upper()}{of_part}", fontsize=7 if of_part else 9, loc="left")
    lines = {str(line.get_label()): line for ax in axes.flat for line in ax.lines}
    figure.legend(list(lines.values()), list(lines), loc="outside upper right", ncols=len(lines), frameon=False, fontsize=7)
    figure.supxlabel("training step", fontsize=9)
    figure.supylabel("pairs of decoders that conflict at z", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _curves(ax: Axes, cell: Cell, colours: Mapping[str, str]) -> None:
    for (rule, blocks), runs in sorted(cell.variants.items(), key=lambda item: item[0][0] != NONE):
        if blocks in ("", "p"):
            shares: dict[float, list[float]] = {}  # by step: a run may lack looks that were not finite
            for step, share, _ in (look for r in runs.values() for look in r.conflict):
                shares.setdefault(step, []).append(share)
            means = [statistics.mean(shares[step]) for step in sorted(shares)]
            ax.plot(sorted(shares), means, label=rule, lw=1.4, color=colours[rule])
    ax.set_ylim(0, 1)
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=7)
