"""What was measured, for a person: tables and a verdict in the terminal, CSV files, and a figure."""

import csv
import math
import statistics
from collections.abc import Iterable
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table as Grid
from torch import Tensor

from mmfast.demo.data import Table, shortened
from mmfast.demo.run import ALONE, OURS, PEER, WITH, WITHOUT, Conflict, Result

NOTES = 12  # about a table, that are shown
MEASURE = {True: "error rate", False: "RMSE / range"}


def medians(result: Result, name: str) -> Tensor:
    """Median over the seeds of each feature's test error, [K]; NaN only where every seed failed."""
    return torch.stack([outcome.errors for outcome in result.outcomes[name]]).nanquantile(0.5, 0)


def seed_means(result: Result, name: str) -> list[float]:
    """Each seed's mean over the features."""
    return [outcome.errors.nanmean().item() for outcome in result.outcomes[name]]


def mean_error(result: Result, name: str) -> float:
    """The median over the seeds of the mean over the features; seeds that diverged are left out."""
    means = [m for m in seed_means(result, name) if not math.isnan(m)]
    return statistics.median(means) if means else math.nan


def change(before: float, after: float) -> float:
    """Relative change; NaN where it has no meaning."""
    return after / before - 1 if before > 0 else math.nan


def _grid(console: Console, title: str, remark: str = "", show_footer: bool = False) -> Grid:
    console.print(f"\n[bold]{title}[/] {remark}", highlight=False)
    return Grid(box=box.SIMPLE_HEAD, header_style="", pad_edge=False, show_footer=show_footer)


def _error(x: float) -> str:
    return "-" if math.isnan(x) else f"{x:.4f}" if x < 100 else f"{x:.2g}"


def _times(x: float) -> str:
    return f"{x:,.0f} x" if x >= 10 else f"{x:.1f} x"


def percent(x: float) -> str:
    """A relative change, with its sign."""
    return "" if math.isnan(x) else f"{100 * x:+.0f} %".replace("-", "\N{MINUS SIGN}")


def verdict(result: Result) -> list[str]:
    """What the errors say, good and bad."""
    before, after = medians(result, WITHOUT), medians(result, WITH)
    means = list(zip(seed_means(result, WITHOUT), seed_means(result, WITH), strict=True))
    failed = sum(math.isnan(a) or math.isnan(b) for a, b in means)
    lines = [f"{failed} of {len(means)} seeds have no result: a training diverged."] if failed else []
    a, b = mean_error(result, WITHOUT), mean_error(result, WITH)
    if math.isnan(a) or math.isnan(b):
        return lines
    change_of_mean = change(a, b)
    word = "lower" if b < a else "higher" if b > a else "no different"
    seeds = f"median of {len(means)} seeds" if len(means) > 1 else "one seed"
    lines.append(
        f"Mean error over the features ({seeds}): {_error(a)} without the block, {_error(b)} with it: {abs(change_of_mean):.0%} {word}."
    )
    if len(means) > 1:
        lines.append(f"The block has the lower mean in {sum(y < x for x, y in means)} of {len(means)} seeds.")
    names = [column.name for column in result.table.columns]
    no_better = [name for name, x, y in zip(names, before, after, strict=True) if not y < x]
    helped = len(names) - len(no_better)
    lines.append(
        f"Better on {helped} of {len(names)} features" + (f", no better on {len(no_better)}: {shortened(no_better)}." if no_better else ".")
    )
    if not b < a and not result.settings.quick:
        lines.append(f"On these data {result.settings.rule} does not pay; another --rule may.")
    return lines


def conflict_summary(result: Result, name: str) -> Conflict:
    """Medians over the training and the seeds."""
    seen = [c for outcome in result.outcomes[name] for c in outcome.conflicts]
    resolved = [c.resolved for c in seen if c.resolved is not None]
    share, cosine, imbalance = (statistics.median(values) for values in zip(*((c.share, c.cosine, c.imbalance) for c in seen), strict=True))
    return Conflict(share, cosine, imbalance, statistics.median(resolved) if resolved else None)


def show_columns(console: Console, table: Table) -> None:
    """What was done about a table, then its columns with their kinds."""
    for note in table.notes[:NOTES]:
        console.print(f"[yellow]note:[/] {escape(note)}", highlight=False, soft_wrap=True)
    if len(table.notes) > NOTES:
        console.print(f"[yellow]note:[/] and {len(table.notes) - NOTES} more such columns", highlight=False)
    grid = _grid(console, f"{escape(table.name)}: {len(table.x):,} rows, {len(table.columns)} features")
    for heading, justify in (("feature", "left"), ("kind", "left"), ("values", "left"), ("missing", "right")):
        grid.add_column(heading, justify=justify)  # type: ignore[arg-type]
    for i, column in enumerate(table.columns):
        x = table.x[:, i]
        seen = x[~x.isnan()]
        shown = ", ".join(column.labels[:6]) + (", ..." if len(column.labels) > 6 else "")
        values = shown if column.labels else f"{seen.min():.6g} to {seen.max():.6g}"
        missing = 1 - len(seen) / len(x)
        grid.add_row(escape(column.name), column.kind, escape(values), f"{missing:.1%}" if missing else "")
    console.print(grid)


def show(console: Console, result: Result) -> None:
    """Everything measured, as tables, with what it means in words."""
    _show_errors(console, result)
    _show_conflict(console, result)
    _show_speed(console, result)
    console.print("\n[bold]What to try next[/]")
    for line in next_steps(result):
        _say(console, line)


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False)


def trained(result: Result) -> list[str]:
    """What was trained, for somebody who sees it for the first time."""
    k, seeds = len(result.table.columns), len(result.outcomes[WITH])
    model = f"An autoencoder (a VAE) squeezes each row into {(k + 1) // 2} numbers and predicts the {k} features from them."
    model += f" Most of the network is shared; each feature has a small head and a loss of its own, so {k} losses pull at the shared part at once."
    twice = f"It was trained twice{f' on each of {seeds} seeds' if seeds > 1 else ''}, from the same first weights on the same batches: once as usual, where"
    twice += f" the {k} gradients are added up, and once with a block ({result.settings.rule}), which weighs them against each other first."
    return [model, twice, "Errors are on rows that it never saw: the share of wrong classes, or for numbers RMSE / range; 0 is perfect."]


def _show_errors(console: Console, result: Result) -> None:
    before, after = medians(result, WITHOUT), medians(result, WITH)
    grid = _grid(console, "1. What got better, what got worse", show_footer=True)
    for line in trained(result):
        _say(console, line)
    means = [mean_error(result, name) for name in (WITHOUT, WITH)]
    grid.add_column("feature", "mean", footer_style="bold", no_wrap=True)
    grid.add_column("kind")
    grid.add_column("without", _error(means[0]), justify="right", footer_style="bold")
    grid.add_column(f"with {result.settings.rule}", _error(means[1]), justify="right", footer_style="bold")
    grid.add_column("change", percent(change(*means)), justify="right", footer_style="bold")
    for column, a, b in zip(result.table.columns, before.tolist(), after.tolist(), strict=True):
        colour = "green" if b < a else "red" if b > a else "dim"
        grid.add_row(escape(column.name), column.kind, _error(a), _error(b), f"[{colour}]{percent(change(a, b))}[/]")
    console.print(grid)
    for line in verdict(result):
        _say(console, line)


def explanation(result: Result) -> list[str]:
    """What the numbers of the conflict mean, and why the first need not fall."""
    plain, ours = (conflict_summary(result, name) for name in (WITHOUT, WITH))
    word = "fell" if ours.share < plain.share else "rose" if ours.share > plain.share else "stayed the same"
    lines = ["In conflict: the share of pairs of features whose gradients point apart (a negative cosine; -1 is head-on)."]
    lines += ["  A step that helps one of such a pair harms the other."]
    lines += [
        f"  With the block it {word}: {plain.share:.0%} without, {ours.share:.0%} with. It need not fall, even where the block works: a block does"
    ]
    lines[-1] += (
        " not change what the features want, only what the shared part is told. What all agree on is learnt first; what is left is what they"
    )
    lines[-1] += (
        " disagree on, and at the best compromise the gradients cancel, so some must point apart. Judge a block by the errors above."
    )
    lines += ["Norm ratio: how many times longer the longest gradient is than the shortest."]
    lines += [
        f"  In the plain sum a gradient {plain.imbalance:,.0f} times as long has {plain.imbalance:,.0f} times the say, however little it matters to you."
    ]
    if ours.resolved is None:
        return [*lines, f"  {result.settings.rule} decides number by number and has no weights, so there is no ratio after it."]
    lines += [f"  The block's weights bring it from {_times(ours.imbalance)} to {_times(ours.resolved)}"]
    lines[-1] += "." if ours.resolved < ours.imbalance else f": {result.settings.rule} settles directions, it does not even out lengths."
    return lines


def _show_conflict(console: Console, result: Result) -> None:
    grid = _grid(console, "2. What conflicted", "(where the features meet; medians over the training)")
    for heading in ("", "in conflict", "mean cosine of those", "norm ratio", "after the block"):
        grid.add_column(heading, justify="right" if heading else "left")
    for name in (WITHOUT, WITH):
        c = conflict_summary(result, name)
        grid.add_row(name, f"{c.share:.0%}", f"{c.cosine:.3f}", _times(c.imbalance), "" if c.resolved is None else _times(c.resolved))
    console.print(grid)
    for line in explanation(result):
        _say(console, line)


def price(result: Result) -> list[str]:
    """What the block costs, and how TorchJD compares."""
    at = {(s.label, s.rule): s.per_second for s in reversed(result.speeds)}  # of several ways of one library, the first
    base, ours = at[ALONE, ""], at[OURS, result.settings.rule]
    lines = [f"A step with the block takes {base / ours:.2f} of the time of one without."] if base and ours else []
    rival = result.rival
    if rival is None:
        missing = [s.reason for s in result.speeds if s.label == PEER and s.per_second is None]
        return lines + [f"TorchJD, the best known library for such rules, is {reason}; the demo then trains it too." for reason in missing]
    theirs, mine = (outcome.errors.nanmean().item() for outcome in (rival.theirs, rival.ours))
    lines.append(f"{rival.rule} by TorchJD, in the block's place, against mmfast's, one training each (seed {rival.ours.seed}):")
    lines.append(f"  mean error {_error(theirs)} against {_error(mine)}: one rule, two solvers; of one seed a difference says little.")
    if (there := at[PEER, rival.rule]) and (here := at[OURS, rival.rule]):
        lines.append(
            f"  its step takes {here / there:.2f} of the time of mmfast's; its mtl_backward makes a gradient of all shared parameters for each loss."
        )
    return lines


def _show_speed(console: Console, result: Result) -> None:
    grid = _grid(console, "3. What it costs", "(training steps per second, in turns)")
    for heading, justify in (("block", "left"), ("rule", "left"), ("steps / s", "right"), ("a step's time", "right"), ("", "left")):
        grid.add_column(heading, justify=justify)  # type: ignore[arg-type]
    base, top = result.speeds[0].per_second or 1.0, max(s.per_second or 0.0 for s in result.speeds)
    for s in result.speeds:
        if s.per_second is None:
            grid.add_row(s.label, s.rule, "-", "", f"[dim]{escape(s.reason)}[/]", style="dim")
        else:
            bar = f"[cyan]{'█' * max(1, round(20 * s.per_second / top))}[/]"
            grid.add_row(s.label, s.rule, f"{s.per_second:,.0f}", f"{base / s.per_second:.2f} x", f"{bar} {escape(s.reason)}")
    console.print(grid)
    for line in price(result):
        _say(console, line)


def next_steps(result: Result) -> list[str]:
    """Commands for what one wants to know next."""
    other = "upgrad" if result.settings.rule != "UPGrad" else "gradnorm"
    lines = [f"Another rule:    mmfast demo --rule {other}", "Your own table:  mmfast demo --data FILE.csv"]
    return [
        *lines,
        "Your own model:  mf.attach([model.image_head, model.text_head], mf.UPGrad()) puts a block in, mf.Monitor shows its conflicts",
    ]


def _write(path: Path, header: list[str], rows: Iterable[Iterable[object]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as f:
        writer = csv.writer(f)
        writer.writerow(header)
        writer.writerows(rows)
    return path


def write_csv(result: Result, folder: Path) -> list[Path]:
    """The numbers as three CSV files: errors, conflict, speed."""
    pairs = list(zip(result.outcomes[WITHOUT], result.outcomes[WITH], strict=True))
    errors = [
        (column.name, column.kind, MEASURE[column.discrete], a.seed, a.errors[i].item(), b.errors[i].item())
        for i, column in enumerate(result.table.columns)
        for a, b in pairs
    ]
    conflicts = [
        (name, outcome.seed, step, c.share, c.cosine, c.imbalance, c.resolved)
        for name, outcomes in result.outcomes.items()
        for outcome in outcomes
        for step, c in zip(outcome.steps, outcome.conflicts, strict=True)
    ]
    return [
        _write(folder / "errors.csv", ["feature", "kind", "measure", "seed", "without_block", "with_block"], errors),
        _write(
            folder / "conflict.csv",
            ["model", "seed", "step", "share_in_conflict", "mean_conflicting_cosine", "norm_ratio", "norm_ratio_after"],
            conflicts,
        ),
        _write(
            folder / "speed.csv",
            ["block", "rule", "steps_per_second", "remark"],
            [(s.label, s.rule, s.per_second, s.reason) for s in result.speeds],
        ),
    ]
