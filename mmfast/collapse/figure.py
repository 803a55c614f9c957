"""The drawing of what was watched: neurons by modality, and ranks over training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmfast.collapse.record import Watch


def draw(watched: Watch, path: str | Path) -> None:
    """A heat map of the share of each modality in the weights of each neuron, sorted by it; beside it the effective ranks at each record."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("a drawing needs matplotlib: pip install matplotlib") from None
    shares = watched.shares().nan_to_num(0.0).cpu()
    order = sorted(range(len(shares)), key=lambda i: (int(shares[i].argmax()), -float(shares[i].max())))
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.6))
    image = left.imshow(shares[order].tolist(), aspect="auto", vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
    left.set_xticks(range(len(watched.modalities)), list(watched.modalities))
    left.set_ylabel("neurons, by the modality they read most")
    left.set_title("share of each modality in a neuron's weights", fontsize=9, loc="left")
    figure.colorbar(image, ax=left)
    steps = [record.step for record in watched.records]
    for name in watched.records[0].effective_rank if watched.records else ():
        style = {"fused": "k-", "gradient": "k:"}.get(name, "-")
        right.plot(steps, [record.effective_rank[name] for record in watched.records], style, marker=".", label=name)
    right.set_xlabel("step")
    right.set_ylim(bottom=0)
    right.set_title("effective rank of features and of the weight's gradient", fontsize=9, loc="left")
    if watched.records:
        right.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(str(path), dpi=120)
