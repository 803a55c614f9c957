"""python -m benchmarks.gpu.summary FOLDER: what gpu.sh left there, against the design's goals, into summary.md and on the screen; of a run that was cut off, what there is."""

import re
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.gpu.lines import Line, read
from benchmarks.targets import Target, geometric_mean

Found = tuple[float, str] | None  # a value, and where


def _rate(lines: list[Line]) -> float | None:
    """Bytes per us that a copy reads and writes."""
    return next((line.path_bytes / line.median_us for line in lines if line.what == "copy" and line.median_us), None)


def _worst(values: list[tuple[float, Line]], lower_is_better: bool) -> Found:
    if not values:
        return None
    value, line = (max if lower_is_better else min)(values, key=lambda pair: pair[0])
    return value, f"{line.what} K={line.k} N={line.n} {line.dtype} {line.path}, worst of {len(values)}"


def _timed(lines: list[Line], section: str, way: str) -> list[tuple[Line, float]]:
    return [(line, line.median_us) for line in lines if line.section == section and line.way == way and line.median_us]


def kernels(lines: list[Line]) -> Found:
    return _worst([(line.kernels, line) for line, _ in _timed(lines, "small", "graph") if line.kernels is not None], True)


def over_empty(lines: list[Line]) -> Found:
    """Microseconds of a call in a graph beyond those of an empty cooperative launch there."""
    empty = [time for line, time in _timed(lines, "ceiling", "graph") if line.what == "empty cooperative launch"]
    return _worst([(time - empty[0], line) for line, time in _timed(lines, "small", "graph")], True) if empty else None


def percent(section: str, bytes_of: Callable[[Line], int]) -> Callable[[list[Line]], Found]:
    """Of the time that the bytes take at the copy rate."""

    def measure(lines: list[Line]) -> Found:
        rate = _rate(lines)
        return (
            _worst([(100 * bytes_of(line) / rate / time, line) for line, time in _timed(lines, section, "cold")], False) if rate else None
        )

    return measure


def step(lines: list[Line]) -> Found:
    timed = _timed(lines, "step", "graph")
    plain = {line.k: time for line, time in timed if line.what == "plain layer"}
    return _worst([(time / plain[line.k], line) for line, time in timed if line.what == "LinearHeads" and line.k in plain], True)


def synchronisations(lines: list[Line]) -> Found:
    """Calls of ours that no graph could capture: what waits for the device cannot be."""
    ours = [line for line in lines if line.way == "graph" and line.section != "ceiling" and line.what != "plain layer"]
    tried = [line for line in ours if line.median_us or line.note]
    failed = [line for line in tried if not line.median_us]
    why = "".join(f"; {line.what}: {line.note}" for line in failed[:1])
    return (len(failed), f"of {len(tried)} captures{why}") if tried else None


def against(who: str) -> Callable[[list[Line]], Found]:
    """Their time relative to ours of the same rule; of two passes without a rule, to MGDA."""

    def measure(lines: list[Line]) -> Found:
        timed = _timed(lines, "rivals", "cold") + _timed(lines, "plain", "cold")
        ours = {(line.what, line.k, line.n): time for line, time in timed if "," not in line.what}
        ratios = []
        for line, time in timed:
            rule, _, whose = line.what.replace("two passes", "MGDA").partition(", ")
            if whose == who and (rule, line.k, line.n) in ours:
                ratios.append(time / ours[rule, line.k, line.n])
        where = f"geometric mean of {len(ratios)} cases, {min(ratios):.3g} to {max(ratios):.3g}" if ratios else ""
        return (geometric_mean(ratios), where) if ratios else None

    return measure


def latency(lines: list[Line]) -> Found:
    return _worst([(time, line) for line, time in _timed(lines, "small", "eager") if line.n == 4096], True)


on_floor, on_path = percent("on chip", lambda line: line.floor_bytes), percent("beyond", lambda line: line.path_bytes)
GOALS = [
    Target("K N e <= 2 MB: launches", "small", 1, 1, "", kernels, True),
    Target("K N e <= 2 MB: over an empty cooperative launch", "small", 3, 3, "µs", over_empty, True),
    Target("16 to 29 MB: share of the (K+1) N e floor at the copy rate", "on chip", 70, 90, "%", on_floor),
    Target("beyond: share of the copy rate on the path's bytes", "beyond", 90, 95, "%", on_path),
    Target("training step under a CUDA graph / without a block", "step", 1.05, 1.02, "x", step, True),
    Target("host synchronisations: calls that no graph captures", "", 0, 0, "", synchronisations, True),
]
OTHERS: list[tuple[str, Callable[[list[Line]], Found], str]] = [
    ("TorchJD / ours", against("TorchJD"), "x"),
    ("torch.compile of two passes without a solver / MGDA of ours", against("torch.compile"), "x"),
    ("Triton / CUDA", against("Triton"), "x"),
    ("plain torch / ours", against("plain torch"), "x"),
    ("K = 3, N = 4096, from an idle GPU, Python included", latency, "µs"),
]


def _cell(value: float | None, unit: str) -> str:
    return "" if value is None else f"{value:.3g} {unit}".rstrip()


def goals(lines: list[Line]) -> list[str]:
    predicted = [line.predicted() for line in lines]
    rows = ["| goal | measured | prediction | must | aim | verdict | where |", "|---|---|---|---|---|---|---|"]
    for goal in GOALS:
        value, where = goal.measure(lines) or (None, "not measured")
        expected = goal.measure(predicted)
        verdict = "" if value is None else goal.verdict(value)
        cells = (
            _cell(value, goal.unit),
            _cell(expected[0] if expected else None, goal.unit),
            _cell(goal.must, goal.unit),
            _cell(goal.aim, goal.unit),
        )
        rows.append(f"| {goal.name} | {' | '.join(cells)} | {verdict} | {where} |")
    return rows


def others(lines: list[Line]) -> list[str]:
    rows = ["| beside | measured | where |", "|---|---|---|"]
    for name, measure, unit in OTHERS:
        value, where = measure(lines) or (None, "not measured")
        rows.append(f"| {name} | {_cell(value, unit)} | {where} |")
    return rows


def last_word(output: str) -> str:
    """The line of a step's output that says how it ended."""
    lines = [line.strip("= ") for line in output.splitlines() if line.strip("= ")]
    told = [line for line in lines if re.search(r"\d+ (passed|failed|error)", line)]
    return (told or lines or ["nothing"])[-1][:120].replace("|", "/")


def steps(folder: Path) -> list[str]:
    """Of steps.tsv (step, exit status, seconds, limit) and of visit.log, where each step has its heading."""
    rows = ["| step | seconds | limit | ended | its last word |", "|---|---|---|---|---|"]
    log, table = folder / "visit.log", folder / "steps.tsv"
    parts = re.split(r"^##### (\w+)$", log.read_text(errors="replace"), flags=re.MULTILINE) if log.exists() else []
    output = dict(zip(parts[1::2], parts[2::2], strict=True))
    ends = [line.split("\t") for line in table.read_text().splitlines()] if table.exists() else []
    for name, status, seconds, limit in ends:
        ended = {"0": "well", "124": "CUT OFF", "137": "CUT OFF"}.get(status, f"with status {status}")
        rows.append(f"| {name} | {seconds} | {limit} | {ended} | {last_word(output.get(name, ''))} |")
    return rows


def main(folder: Path) -> int:
    path = folder / "gpu.csv"
    lines, env = read(path) if path.exists() else ([], {})
    rate = _rate(lines)
    head = f"{env.get('gpu', 'no GPU was timed')}, torch {env.get('torch', '?')}, mmfast {env.get('commit', '?')}, {env.get('date', '?')}"
    copied = f"Copy rate, read and written: {rate / 1e6:.3g} TB/s." if rate else "The copy rate was not measured."
    wrong = [f"* {line.section}: {line.what} K={line.k} N={line.n} {line.dtype} {line.path}: {line.note}" for line in lines if line.note]
    notes = ["## No number", "", *wrong, ""] if wrong else []
    text = "\n".join(
        ["# On a GPU", "", head, "", copied, "", "## Steps", "", *steps(folder), "", *notes]
        + ["## Beside others", "", *others(lines), "", "## Goals", "", *goals(lines)]
    )
    (folder / "summary.md").write_text(text + "\n")
    print(text)
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m benchmarks.gpu.summary FOLDER")
    sys.exit(main(Path(sys.argv[1])))
