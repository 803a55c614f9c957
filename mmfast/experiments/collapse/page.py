"""What the report says: prose that is filled from the numbers. No sentence is here without the condition under which it is true."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from mmfast.experiments.collapse import report, tables
from mmfast.experiments.collapse.report import Difference, Measure, Sheet, Variant, with_cure
from mmfast.experiments.collapse.results import Result
from mmfast.experiments.collapse.settings import CURABLE, CURES, SYSTEMS, WEIGHT
from mmfast.experiments.prose import fill, listed
from mmfast.experiments.settings import NONE

LEGEND = """Means over seeds with 90 % bootstrap intervals (of up to five seeds over all resamples); p of the corrected paired t-test, two-sided (not corrected on the planted set, whose
rows are other ones for each seed); "better", "worse", "higher", "lower": p below .1, else no difference is shown. ROC and PRC: areas under the ROC curve and average precision, of more
than two classes the mean over the classes against the rest; means over the missing rates 0, 20, 40, 60 and 80 %. Nothing is corrected for the number of
comparisons: where nothing differs, one in ten says all the same that something does. EBR's weight is chosen on validation among those that the record has for its seeds. The paper's
numbers are of MIMIC-IV, another data set: they are here to show what it reports, not to be compared; it gives EBR with missing modalities without a fusion, so every row with EBR has that
number."""


def markdown(found: Sequence[Result]) -> str:
    """All tables, data set by data set, and what the numbers say of the paper's claims."""
    parts = [_made(found), LEGEND]
    for sheet in report.sheets(found):
        parts += [f"## {sheet.data}", _heading(sheet), "### With modalities missing", tables.missing(sheet)]
        for title, made in (
            ("What the cures add", tables.plus(sheet)),
            ("Inside early fusion", tables.diagnosis(sheet)),
            ("Rules", tables.rules(sheet)),
            ("Noise", tables.noise(sheet)),
        ):
            parts += [f"### {title}", made] if made else []
        if said := claims(sheet):
            parts += ["### Beside the paper", "\n".join(f"* {line}" for line in said)]
    return "\n\n".join(parts)


def _made(found: Sequence[Result]) -> str:
    text = f"{len(found)} run{' is' if len(found) == 1 else 's are'} recorded."
    if cut_off := sum(r.best_epoch is None for r in found):
        text += f" {cut_off} had no epoch with a finite validation score."
    return text


def _heading(sheet: Sheet) -> str:
    r = sheet.any
    weights = {
        CURES[cure]: sorted({x.settings.weight for v, runs in sheet.runs.items() if v.cure == cure for x in runs.values()})
        for cure in WEIGHT
        if cure != NONE
    }
    said = "; ".join(f"weight of {name} {listed([f'{w:g}' for w in of])}" for name, of in weights.items() if of)
    return (
        f"{r.rows['train']:,} training, {r.rows['valid']:,} validation and {r.rows['test']:,} test rows, {sheet.classes} classes, {sheet.epochs} epochs of the last "
        f"stage, batches of {sheet.batch}{'; ' + said if said else ''}."
    )


def claims(sheet: Sheet) -> list[str]:
    """The paper's claims, each with what the numbers of this data set say of it."""
    said: list[str] = []
    for what in ("roc", "prc"):
        measure, name = report.mean_of(what), what.upper()
        for cure in ("kd", "ebr"):
            said += _of_systems(
                sheet, f"{CURES[cure]} raises {name}", measure, [(Variant(s), with_cure(Variant(s), cure)) for s in CURABLE]
            )
        pairs = [(with_cure(Variant(s), "kd"), with_cure(Variant(s), "ebr")) for s in CURABLE]
        said += _of_systems(sheet, f"EBR raises {name} above KD's", measure, pairs)
    said += _best(sheet)
    for cure in ("kd", "ebr"):
        for text, measure, up in _inside(sheet):
            d = sheet.difference(Variant("early"), with_cure(Variant("early"), cure), measure)
            if d is not None:
                harms = "; it still does harm" if text.startswith("raises the contribution") and d.b <= 0 else ""
                said.append(f"In early fusion {CURES[cure]} {text}: {_judged(d, up)}{harms}.")
    return said


def _inside(sheet: Sheet) -> Iterator[tuple[str, Measure, bool]]:
    """What a cure is to do to early fusion, the number that tells, and whether it is to go up. Not only the eliminated modality is looked at, but all that contribute
    less than the first: where it is noise that is left out, that is no reallocation."""
    yield "lowers participation (polysemanticity)", report.looked("participation"), False
    yield "lowers the participation of the gradients' directions", report.looked("directions"), False
    for name in sheet.ranked[:-1]:
        called = name + (tables.ELIMINATED if name == sheet.eliminated else "")
        yield f"raises the contribution of {called}", report.contribution(name), True
        yield f"raises the share of {called} in the gradients", report.looked("shares", name), True
        yield f"raises what {called} comes to alone", report.alone(name), True
    yield "raises the effective rank of the fused features", report.looked("effective_rank", "fused"), True


def _of_systems(sheet: Sheet, claim: str, measure: Measure, pairs: Sequence[tuple[Variant, Variant]]) -> list[str]:
    found = {SYSTEMS[a.system]: d for a, b in pairs if (d := sheet.difference(a, b, measure)) is not None}
    if not found:
        return []
    groups = {word: [name for name, d in found.items() if d.verdict == word] for word in ("higher", "lower", "")}
    parts = [
        f"{title} in {len(names)} of {len(found)} ({listed([f'{name} {found[name].mean:+.3f}' for name in names])})"
        for title, names in (("shown", groups["higher"]), ("the opposite", groups["lower"]), ("no difference shown", groups[""]))
        if names
    ]
    return [f"{claim}: {', '.join(parts)}."]


def _best(sheet: Sheet) -> list[str]:
    """Whether the best system with modalities missing has EBR, as in the paper's table."""
    scored = {v: found.mean for v in sheet.plain if (found := sheet.value(v, report.mean_of("roc"))) is not None}
    treated = [v for v in scored if v.cure == "ebr"]
    if not treated or len(scored) == len(treated):
        return []
    best, of_ebr = max(scored, key=scored.__getitem__), max(treated, key=scored.__getitem__)
    text = f"EBR is best with modalities missing: the highest mean ROC has {best.label} ({scored[best]:.3f})"
    if best == of_ebr:
        return [f"{text}; reproduced, by the means."]
    d = sheet.difference(best, of_ebr, report.mean_of("roc"))
    return [f"{text}, the highest with EBR {of_ebr.label} ({scored[of_ebr]:.3f}): not reproduced{'' if d is None else f', {_span(d)}'}."]


def _judged(d: Difference, up: bool) -> str:
    wanted, other = ("higher", "lower") if up else ("lower", "higher")
    word = {wanted: "reproduced", other: "not reproduced, the opposite is shown"}.get(d.verdict, "not reproduced, no difference is shown")
    return f"{word}, {d.a:.3f} to {d.b:.3f}, {_span(d)}"


def _span(d: Difference) -> str:
    seeds = f"{d.seeds} seed{'' if d.seeds == 1 else 's'}"
    return f"{tables.difference(d)}{'' if d.p is None or math.isnan(d.p) else f', p {tables.p(d.p)}'}, {seeds}"


def write(path: Path, found: Sequence[Result]) -> None:
    """Puts the report between the lines that ask for it, wherever there are any.

    Raises:
        SettingsError: the file has no such lines.
    """
    fill(path, "collapse", {"page": lambda: markdown(found)})
