"""What every section does with a case: calls side by side, after the gate, and a line for the terminal."""

from dataclasses import dataclass, field

from benchmarks import report
from benchmarks.rows import Row
from benchmarks.timing import Call, Timing, side_by_side


@dataclass
class Run:
    """What this run measures, and what it has measured so far."""

    quick: bool
    rules: list[str]
    rows: list[Row] = field(default_factory=list)

    @property
    def budget(self) -> float:
        """Seconds for each call of a case."""
        return 0.05 if self.quick else 0.15

    @property
    def wrong(self) -> list[Row]:
        return [r for r in self.rows if r.verdict == "wrong"]


def line(rows: list[Row]) -> str:
    """One case, for the terminal."""
    first = rows[0]
    cells = []
    for r in rows:
        value = f"{report.number(r.median_us)} µs" if r.median_us else r.verdict
        ratio = f" {report.number(r.ratio_to_ours)}x" if r.ratio_to_ours and r.provider != "ours" else ""
        memory = f" {report.number(r.peak_mb)} MB" if r.peak_mb else ""
        share = f" {r.percent_of_roofline:.0f}% of roofline" if r.percent_of_roofline else ""
        cells.append(f"{r.provider} {value}{ratio}{memory}{share}")
    what = first.rule or first.dtype
    return f"{first.section:9} {what:12} K={first.k:<3} N={first.n:<9} " + "   ".join(cells)


def compare(run: Run, rows: dict[str, Row], calls: dict[str, Call], right: bool, error: float, budgets: float = 1) -> dict[str, Timing]:
    """Times the calls of one case side by side and fills their rows; a red gate leaves our row alone, without a time.

    Calls of many milliseconds need more than one budget for enough samples.
    """
    rows["ours"].error = error
    if not right:
        rows["ours"].verdict = "wrong"
        rows, calls = {"ours": rows["ours"]}, {}
    timings = side_by_side(calls, run.budget * budgets) if calls else {}
    for p, row in rows.items():
        if p in timings:
            row.timed(timings[p]).ratio_to_ours = timings[p].median / timings["ours"].median
    run.rows += rows.values()
    return timings
