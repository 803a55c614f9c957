"""A run as one HTML file: the figures inside it, nothing from elsewhere."""

import io
from html import escape
from math import isfinite
from pathlib import Path

from mmfast import __version__
from mmfast.plots.figure import fill, mean, styled
from mmfast.plots.log import BlockLog, Log

STYLE = """
:root { color-scheme: light dark; --ink: #202124; --soft: #5f6368; --line: #e3e6e8; --page: #f7f8f9 }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --soft: #9aa0a6; --line: #3c4043; --page: #18191b } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); max-width: 1280px; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin: 2.5rem 0 .5rem } p, summary, nav { color: var(--soft) }
.figure { background: #fff; border: 1px solid var(--line); border-radius: 8px; padding: .5rem; overflow-x: auto }
.figure svg { display: block; width: 100%; min-width: 900px; height: auto } .figure text { font-family: system-ui, sans-serif }
table { border-collapse: collapse; font-variant-numeric: tabular-nums } th, td { padding: .15rem 1rem .15rem 0; text-align: right }
th:first-child { text-align: left } tr { border-bottom: 1px solid var(--line) } td, thead th { white-space: nowrap } nav a { margin-right: 1rem }
"""


def page(log: Log, title: str) -> str:
    """The document."""
    parts = [_block(n, block, log.steps) for n, block in enumerate(log.blocks)]
    links = "".join(f'<a href="#block-{n}">{escape(block.name)}</a>' for n, block in enumerate(log.blocks))
    shown = "" if len(log.steps) == log.rows else f", {len(log.steps):,} of them shown"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>\n<h1>{escape(title)}</h1>\n"
        f"<p>Steps {log.steps[0]:,} to {log.steps[-1]:,}; {log.rows:,} rows{shown}; {len(log.blocks)} "
        f"block{'s' * (len(log.blocks) > 1)}; mmfast {__version__}</p>\n"
        + (f"<nav>{links}</nav>\n" if len(log.blocks) > 1 else "")
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def write(log: Log, path: Path, title: str) -> None:
    """Writes the page into a file."""
    path.write_text(page(log, title), encoding="utf-8")


def _block(number: int, block: BlockLog, steps: list[int]) -> str:
    last = max(1, len(steps) // 10)
    rows = []
    for i, name in enumerate(block.branches):
        numbers = (mean([row[i] for row in block.weights[-last:]]), mean([row[i] for row in block.norms[-last:]]))
        rows.append(f"<tr><th>{escape(name)}</th>{''.join(f'<td>{_number(x)}</td>' for x in numbers)}</tr>")
    conflict = mean(block.conflict[-last:])
    said = f": {100 * conflict:.0f} % of the pairs conflict" if isfinite(conflict) else ""
    return (
        f'<h2 id="block-{number}">{escape(block.name)}</h2>\n<div class="figure">{_svg(number, block, steps)}</div>\n'
        f"<details><summary>{len(block.branches)} branches, means from step {steps[-last]:,} on{said}</summary>\n"
        f"<table><thead><tr><th>branch</th><th>weight</th><th>norm</th></tr></thead><tbody>{''.join(rows)}</tbody></table></details>"
    )


def _number(x: float) -> str:
    return f"{x:.4g}" if isfinite(x) else "–"


def _svg(number: int, block: BlockLog, steps: list[int]) -> str:
    with styled(13, 5.2) as figure:
        import matplotlib as mpl

        mpl.rcParams["svg.hashsalt"] = f"mmfast {number}"  # names of parts: the same on every run, and of its own for each figure
        fill(figure, block, steps)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]
