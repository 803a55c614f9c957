"""The figure of a rule: on the left two gradients, the cone where neither is harmed, and what the rule makes of them; on the right its paths on two losses."""

import math
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from rule_facts import Facts
from torch import Tensor

import mmfast as mf

INK, PAPER_INK = "#24292f", "#c9d1d9"  # of text and axes on a light and on a dark page
BLUE, ORANGE, GREEN, GREY = "#3987c9", "#e0862c", "#2da36a", "#8b949e"
GRADIENTS = torch.tensor([[2.4, 0.6], [-0.7, 0.6]], dtype=torch.float64)
STARTS = ((-1.8, 1.7), (-0.9, -1.6), (1.8, 1.5), (1.9, -1.2))
STEPS = 300
NOISE = 0.3  # standard deviation of a batch's gradients, for rules of two batches
DRAWS = 12


def _bowl(angle: float, scale: float) -> Tensor:
    c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    turn = torch.tensor([[c, -s], [s, c]], dtype=torch.float64)
    return scale * turn @ torch.diag(torch.tensor([2.0, 0.4], dtype=torch.float64)) @ turn.T


# two losses (x - a)' A (x - a) / 2; the second one's gradients are shorter
A = torch.stack([_bowl(65, 1.0), _bowl(-20, 0.3)])
MINIMA = torch.tensor([[-0.9, 0.5], [1.0, -0.3]], dtype=torch.float64)


def rows_of(facts: Facts, g: Tensor) -> Tensor:
    """The gradients that the rule is given for those of two tasks."""
    if facts.rows != "four":
        return g
    mean = g.mean(0, keepdim=True)
    return torch.cat([g, mean, -3 * mean])  # the fourth is corrupted


def resolved(facts: Facts, rule: mf.Resolver, J: Tensor, noise: float = 0.0) -> Tensor:
    """What a rule makes of the rows of J; each of its batches has noise of its own where it takes several."""
    if facts.rows != "batches":
        return mf.resolve(J, rule)
    first, second, third = (J + noise * torch.randn_like(J) for _ in range(3))
    return mf.combine(third, mf.weights(mf.gram(first, others=second), rule))


def path(facts: Facts, start: tuple[float, float]) -> Tensor:
    """Of plain descent with a fresh rule, [STEPS + 1, 2]."""
    torch.default_generator.manual_seed(0)
    rule = facts.make(4 if facts.rows == "four" else 2)
    x = torch.tensor(start, dtype=torch.float64)
    points = [x]
    for _ in range(STEPS):
        g = torch.einsum("kij,kj->ki", A, x - MINIMA)
        if isinstance(rule, mf.MoCo):
            rule.see(torch.einsum("ki,ki->k", g, x - MINIMA) / 2)
        x = x - facts.step * resolved(facts, rule, rows_of(facts, g), NOISE)
        points.append(x)
    return torch.stack(points)


def _arrow(axes, tip: Tensor, color: str, width: float = 2.0, alpha: float = 1.0) -> None:
    style = {"arrowstyle": "-|>,head_width=0.22,head_length=0.5", "color": color, "lw": width, "alpha": alpha, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", tuple(tip.tolist()), (0, 0), arrowprops=style)


def _cone(axes, facts: Facts, make) -> None:
    g = rows_of(facts, GRADIENTS)
    ends = []
    torch.default_generator.manual_seed(0)
    for _ in range(DRAWS if make().draws or facts.rows == "batches" else 1):
        ends.append(resolved(facts, make(), g, NOISE))
    first, second = (math.atan2(y, x) for x, y in GRADIENTS.tolist())
    edges = torch.tensor([[math.cos(t), math.sin(t)] for t in torch.linspace(second - math.pi / 2, first + math.pi / 2, 30).tolist()])
    around = torch.cat([torch.zeros(1, 2), 20 * edges])
    axes.fill(around[:, 0].tolist(), around[:, 1].tolist(), color=GREEN, alpha=0.13, lw=0)
    total = g.sum(0)
    _arrow(axes, total, GREY, 1.3)
    for row, color in zip(g, (BLUE, ORANGE, GREY, GREY)):
        _arrow(axes, row, color)
    for end in ends:
        _arrow(axes, end, GREEN, 2.6 if len(ends) == 1 else 1.1, 1.0 if len(ends) == 1 else 0.7)
    names = [("$g_1$", g[0], BLUE), ("$g_2$", g[1], ORANGE), ("sum", total, GREY), ("$d$", ends[0], GREEN)]
    names += [("$g_3$", g[2], GREY), ("$g_4$", g[3], GREY)] if len(g) == 4 else []
    points = torch.stack([torch.zeros(2, dtype=torch.float64), total, *g, *ends])
    low, high = points.amin(0), points.amax(0)
    span = max(float((high - low).max()), 3.2) * 1.25
    middle = (low + high) / 2
    for text, at, color in names:
        if text == "sum" and at.norm() < 0.2:
            continue
        side = at / at.norm().clamp(min=1e-9) * span * 0.055
        if text == "$d$":  # beside its tip, where another gradient may end
            side = 0.5 * side + torch.stack([-side[1], side[0]])
        axes.text(*(at + side).tolist(), text, color=color, ha="center", va="center", fontsize=11)
    axes.set_xlim(float(middle[0] - span / 2), float(middle[0] + span / 2))
    axes.set_ylim(float(middle[1] - span / 2), float(middle[1] + span / 2))
    axes.set_aspect("equal")
    axes.plot(0, 0, "o", color=INK, ms=3)


def _paths(axes, facts: Facts) -> None:
    side = torch.linspace(-2.4, 2.4, 50, dtype=torch.float64)
    y, x = torch.meshgrid(side, side, indexing="ij")
    at = torch.stack([x, y], -1)
    for color, bowl, minimum in zip((BLUE, ORANGE), A, MINIMA):
        loss = ((at - minimum) @ bowl * (at - minimum)).sum(-1) / 2
        top = float(loss.max())
        axes.contour(x, y, loss, levels=[top * (i / 9) ** 2 for i in range(1, 9)], colors=color, linewidths=0.8, alpha=0.6)
        axes.plot(*minimum.tolist(), "*", color=color, ms=11)
    share = torch.linspace(0, 1, 60, dtype=torch.float64).view(-1, 1, 1)
    mixed = (1 - share) * A[0] + share * A[1]
    pareto = torch.linalg.solve(mixed, (1 - share[..., 0]) * (A[0] @ MINIMA[0]) + share[..., 0] * (A[1] @ MINIMA[1]))
    axes.plot(pareto[:, 0], pareto[:, 1], color=GREY, lw=5, alpha=0.5, solid_capstyle="round")
    for start in STARTS:
        points = path(facts, start)
        axes.plot(points[:, 0], points[:, 1], color=GREEN, lw=1.6)
        axes.plot(*points[0].tolist(), "o", mfc="none", color=GREEN, ms=5)
        axes.plot(*points[-1].tolist(), "o", color=GREEN, ms=6)
    axes.set_xlim(-2.4, 2.4)
    axes.set_ylim(-2.4, 2.4)
    axes.set_aspect("equal")


def draw(name: str, facts: Facts, folder: Path) -> None:
    """Writes NAME.svg and, for a dark page, NAME-dark.svg."""
    k = 4 if facts.rows == "four" else 2

    def make() -> mf.Resolver:
        rule = facts.make(k)
        rule.draws = getattr(rule, "rng", None) is not None or any(getattr(part, "rng", None) is not None for part in rule.modules())
        return rule

    colors = {key: INK for key in ("text.color", "axes.edgecolor", "axes.titlecolor", "xtick.color", "ytick.color")}
    with mpl.rc_context({**colors, "svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif", "axes.linewidth": 0.6}):
        figure = Figure(figsize=(8.4, 4.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        _cone(left, facts, make)
        _paths(right, facts)
        for axes in (left, right):
            axes.set_xticks([])
            axes.set_yticks([])
            axes.patch.set_alpha(0)
        figure.patch.set_alpha(0)
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
    light = (folder / f"{name}.svg").read_text()
    (folder / f"{name}-dark.svg").write_text(light.replace(INK, PAPER_INK))
