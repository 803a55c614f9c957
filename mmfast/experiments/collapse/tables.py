"""The report's tables, as markdown."""

import math
import statistics
from collections.abc import Iterable, Sequence

from mmfast.experiments.collapse import oracle, report
from mmfast.experiments.collapse.report import Difference, Measure, Sheet, Value, Variant, with_cure
from mmfast.experiments.collapse.results import Result
from mmfast.experiments.collapse.settings import CURES, NOISY, SYSTEMS
from mmfast.experiments.prose import row
from mmfast.experiments.published import MISSING, PLUS
from mmfast.experiments.settings import NONE
from mmfast.experiments.tables import p

ELIMINATED = " (eliminated)"
TREATED = [cure for cure in CURES if cure != NONE]


def missing(sheet: Sheet) -> str:
    """Table 1 of the paper on our data: every system, means over missing rates."""
    two = sheet.classes == 2
    measures: dict[str, Measure] = {"ROC": report.mean_of("roc"), "PRC": report.mean_of("prc")}
    measures |= {} if two else {"accuracy": report.mean_of("accuracy")}
    what = "ROC" if two else "accuracy"
    measures |= {f"{what}, all there": report.main_at(0.0), f"{what}, 80 % missing": report.main_at(0.8)}
    if sheet.data == "avMNIST":
        measures["accuracy, images alone"] = report.alone("image")
    heads = ["system", "seeds", *measures, "step", "paper, mortality on MIMIC-IV: ROC", "PRC"]
    lines = [row(*heads), f"|---|--:|{'--:|' * (len(heads) - 2)}"]
    for variant in sheet.plain:
        runs = sheet.runs[variant].values()
        steps = [r.step_us for r in runs if r.step_us is not None]
        step = f"{statistics.median(steps) / 1e3:.1f} ms" if steps else ""
        paper = MISSING.get("ebr" if variant.cure == "ebr" else "" if variant.cure != NONE else variant.system)
        published = [f"{x:.3f}" for x in paper[:2]] if paper else ["", ""]
        lines.append(row(variant.label, len(runs), *(value(sheet.value(variant, m)) for m in measures.values()), step, *published))
    return "\n".join(lines)


def plus(sheet: Sheet) -> str | None:
    """Table 2 of the paper on our data: what a cure adds to a system; None where there is no pair of runs."""
    lines = [
        row("system", "", "base", *(h for cure in TREATED for h in (f"+ {CURES[cure]}", "difference", "p", "")), "paper: + KD", "+ EBR"),
        f"|---|---|--:|{'--:|--:|--:|---|' * len(TREATED)}--:|--:|",
    ]
    before = len(lines)
    for system, title in SYSTEMS.items():
        base = Variant(system)
        if not any(with_cure(base, cure) in sheet.runs for cure in TREATED):
            continue
        for place, what in enumerate(("roc", "prc")):
            measure = report.mean_of(what)
            cells: list[str] = []
            for cure in TREATED:
                d = sheet.difference(base, with_cure(base, cure), measure)
                cells += ["", "", "", ""] if d is None else [f"{d.b:.3f}", difference(d), p(d.p), better(d)]
            paper = [_paper_change(system, cure, place) for cure in TREATED]
            lines.append(row(title, what.upper(), value(sheet.value(base, measure)), *cells, *paper))
    return "\n".join(lines) if len(lines) > before else None


def _paper_change(system: str, cure: str, place: int) -> str:
    a, b = PLUS.get((system, NONE)), PLUS.get((system, cure))
    return "" if a is None or b is None else f"{b[place] - a[place]:+.3f}"


def diagnosis(sheet: Sheet) -> str | None:
    """What early fusion makes of each modality, without cure, distilled and reallocated, and on the planted set what was planted; None without runs of it."""
    variants = [v for v in (with_cure(Variant("early"), cure) for cure in CURES) if v in sheet.runs]
    if not variants:
        return None
    known = _planted(sheet.runs[variants[0]]) if sheet.data in report.DRAWN else {}
    heads = ["", *(["planted"] if known else []), *(v.label for v in variants)]
    heads += [h for v in variants[1:] for h in (f"{CURES[v.cure]} less none", "p", "")]
    lines = [row(*heads), f"|---|{'--:|' * (len(variants) + bool(known))}{'--:|--:|---|' * (len(variants) - 1)}"]
    for name, measure in diagnostics(sheet).items():
        cells = [known.get(name.replace(ELIMINATED, ""), "")] if known else []
        cells += [value(sheet.value(v, measure)) for v in variants]
        for v in variants[1:]:
            d = sheet.difference(variants[0], v, measure)
            cells += ["", "", ""] if d is None else [difference(d), p(d.p), d.verdict]
        lines.append(row(name, *cells))
    return "\n".join(lines)


def _planted(seeds: Iterable[int]) -> dict[str, str]:
    """By the name of a line, mean over the seeds."""
    found = [oracle.planted(seed) for seed in seeds]
    titles = {"contribution": "contribution of {}", "shares": "share of {} in the gradients", "alone": "{} alone"}
    return {
        title.format(name): f"{statistics.mean(of[what][name] for of in found):.3f}"
        for what, title in titles.items()
        for name in found[0][what]
    }


def diagnostics(sheet: Sheet) -> dict[str, Measure]:
    """What is measured of early fusion, by what the table calls it."""
    names, gone = list(sheet.any.contribution), sheet.eliminated
    marked = {name: name + ELIMINATED if name == gone else name for name in names}
    measures: dict[str, Measure] = {
        f"participation, of {len(names)}": report.looked("participation"),
        "participation of the gradients' directions": report.looked("directions"),
    }
    measures |= {f"contribution of {marked[name]}": report.contribution(name) for name in names}
    measures |= {f"share of {marked[name]} in the gradients": report.looked("shares", name) for name in names}
    measures |= {f"{marked[name]} alone": report.alone(name) for name in names}
    measures |= {f"effective rank: {name}": report.looked("effective_rank", name) for name in (*names, "fused")}
    return measures


def rules(sheet: Sheet) -> str | None:
    """What a rule in a system's block changes; None where there is no pair of runs."""
    lines = [row("system", "rule", "", "without", "with", "difference", "p", ""), "|---|---|---|--:|--:|--:|--:|---|"]
    before = len(lines)
    for variant in sorted((v for v in sheet.runs if v.rule != NONE), key=lambda v: v.order):
        base = Variant(variant.system, variant.cure)
        for what in ("roc", "prc"):
            d = sheet.difference(base, variant, report.mean_of(what))
            if d is not None:
                lines.append(row(base.label, variant.rule, what.upper(), f"{d.a:.3f}", f"{d.b:.3f}", difference(d), p(d.p), better(d)))
    return "\n".join(lines) if len(lines) > before else None


def noise(sheet: Sheet) -> str | None:
    """Early fusion with noise in one modality; None where there are no such runs."""
    levels = sorted({v.noise for v in sheet.runs if v.system == "early" and v.rule == NONE})
    if len(levels) < 2:
        return None
    lines = [row("noise in " + NOISY[sheet.data], *(f"{level:g}" for level in levels)), f"|---|{'--:|' * len(levels)}"]
    for cure in CURES:
        variants = [Variant("early", cure, noise=level) for level in levels]
        cells = [value(sheet.value(v, report.main)) for v in variants]
        made = [list(sheet.runs.get(v, {}).values()) for v in variants]
        remarks: list[list[str]] = [[] for _ in made]
        for what in (_weight, _seeds):  # said where levels differ in it: then they are not to be compared as they are
            said = [what(of) if of else "" for of in made]
            if len({s for s in said if s}) > 1:
                remarks = [[*before, s] for before, s in zip(remarks, said, strict=True)]
        cells = [f"{cell} ({', '.join(of)})" if cell and of else cell for cell, of in zip(cells, remarks, strict=True)]
        if any(cells):
            lines.append(row(with_cure(Variant("early"), cure).label, *cells))
    return "\n".join(lines)


def _weight(runs: Sequence[Result]) -> str:
    return f"weight {runs[0].settings.weight:g}"


def _seeds(runs: Sequence[Result]) -> str:
    return f"{len(runs)} seed{'' if len(runs) == 1 else 's'}"


def value(found: Value | None) -> str:
    """A mean and its interval."""
    if found is None:
        return ""
    span = "" if math.isnan(found.low) else f" [{found.low:.3f}, {found.high:.3f}]"
    return f"{found.mean:.3f}{span}"


def difference(d: Difference) -> str:
    """Its mean and its interval."""
    span = "" if math.isnan(d.low) else f" [{d.low:+.3f}, {d.high:+.3f}]"
    return f"{d.mean:+.3f}{span}"


def better(d: Difference) -> str:
    """The verdict on a score."""
    return {"higher": "better", "lower": "worse"}.get(d.verdict, "")
