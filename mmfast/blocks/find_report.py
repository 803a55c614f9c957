"""What `find_blocks` found, as a table and as a drawing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmfast.blocks.find import FoundBlock


def table(blocks: Sequence[FoundBlock]) -> str:
    """A block of lines for each tensor."""
    if not blocks:
        return "no tensor at which gradients of different terms meet"
    lines = []
    for i, block in enumerate(blocks):
        lines.append(f"{i}  {block.producer}  {list(block.shape)}")
        width = max(len(term) for term in block.terms)
        lines.append(f"   {'':<{width}}      norm  cosines")
        for term, norm, row in zip(block.terms, block.norms.tolist(), block.cosines.tolist(), strict=True):
            lines.append(f"   {term:<{width}}  {norm:8.2e}  {' '.join(f'{c:6.2f}' for c in row)}")
        if line := block.attach_line():
            lines.append(f"   {line}")
    return "\n".join(lines)


def draw(blocks: Sequence[FoundBlock], path: str | Path) -> None:
    """One row for each tensor: whose gradients meet, how long they are, and a map of their cosines."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("a drawing needs matplotlib: pip install matplotlib") from None
    rows = max(len(blocks), 1)
    figure = Figure(figsize=(9, 0.6 + 1.7 * rows), layout="constrained")
    grid = figure.add_gridspec(rows, 2, width_ratios=(2.2, 1))
    for i, block in enumerate(blocks):
        bars = figure.add_subplot(grid[i, 0])
        bars.barh(range(len(block.terms)), block.norms.tolist(), color="0.35")
        bars.set_yticks(range(len(block.terms)), list(block.terms))
        bars.invert_yaxis()
        bars.set_title(f"{block.producer} {list(block.shape)}: length of each term's gradient", fontsize=9, loc="left")
        cosines = figure.add_subplot(grid[i, 1])
        image = cosines.imshow(block.cosines.tolist(), vmin=-1, vmax=1, cmap="RdBu")
        cosines.set_xticks([])
        cosines.set_yticks([])
        cosines.set_title("cosines", fontsize=9, loc="left")
        figure.colorbar(image, ax=cosines)
    if not blocks:
        figure.text(0.5, 0.5, table(blocks), ha="center")
    figure.savefig(str(path), dpi=120)
