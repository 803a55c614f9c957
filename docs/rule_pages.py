"""The pages of the rules, written into docs/rules/ when the site is built: signature, formula, figure, properties, cost, and where not to use it."""

import inspect
import math
import re
import sys
from pathlib import Path

import torch
from torch import Tensor

import mmfast as mf

DOCS = Path(__file__).parent
for needed in (DOCS, DOCS.parent, DOCS.parent / "tests"):
    if str(needed) not in sys.path:
        sys.path.insert(0, str(needed))

from rule_facts import FACTS, FAMILIES, Facts
from rule_figures import draw, resolved
from rule_table import RULES, Row

from benchmarks.rows import RESULTS, read

PROBLEMS = 12  # of each number of gradients
YES, NO = "yes", "no"


def rules() -> list[str]:
    """The names of the rules that mmfast has."""
    found = [getattr(mf, name) for name in mf.__all__]
    return [
        rule.__name__ for rule in found if inspect.isclass(rule) and issubclass(rule, mf.Resolver) and rule not in (mf.Resolver, mf.Rule)
    ]


def check() -> None:
    """Raises where a rule has no entry in rule_facts.py, or an entry no rule."""
    missing, strange = set(rules()) - set(FACTS), set(FACTS) - set(rules())
    if missing or strange:
        raise KeyError(
            f"docs/rule_facts.py lacks {sorted(missing)} and has {sorted(strange)}, which are no rules; expected one entry for each"
        )


def first_line(name: str) -> str:
    """The first paragraph of a rule's docstring without its paper, as the cell of a table."""
    text = " ".join((getattr(mf, name).__doc__ or "").split("\n\n")[0].split())
    return re.sub(r" \((?=[^()]*\d{4})[^()]*\)", "", text).rstrip(".").replace("|", "\\|")


# ---- what is measured


def _problems(k: int) -> list[Tensor]:
    """Gradients of 5 elements, most of which conflict, of lengths up to a hundredfold apart."""
    made = torch.Generator().manual_seed(k)
    return [
        torch.randn(k, 5, generator=made, dtype=torch.float64) * 10 ** (2 * torch.rand(k, 1, generator=made, dtype=torch.float64) - 1)
        for _ in range(PROBLEMS)
    ]


def _first(facts: Facts, J: Tensor) -> Tensor:
    """What a fresh rule, with the same draws each time, makes of J at its first call."""
    torch.default_generator.manual_seed(1)  # torch.manual_seed takes milliseconds
    return resolved(facts, facts.make(len(J)), J)


def _same_direction(a: Tensor, b: Tensor) -> bool:
    return bool(torch.nn.functional.cosine_similarity(a, b, dim=0) > 1 - 1e-6)


def measured(facts: Facts) -> dict[str, str]:
    """Properties of a rule's first call on random problems, and what the rule keeps."""
    counts = (5, 6) if facts.rows == "four" else (2, 3, 5)
    harmless, powers, lengths, permuted, stationary = [], [], [], [], []
    for k in counts:
        for J in _problems(k):
            d = _first(facts, J)
            harmless.append(bool(((J @ d) / (J.norm(dim=1) * d.norm().clamp(min=1e-300)) > -1e-6).all()))
            powers.append(math.log(float(_first(facts, 100 * J).norm() / d.norm())) / math.log(100))
            longer = J.clone()
            longer[0] *= 10
            lengths.append(_same_direction(_first(facts, longer), d))
            permuted.append(bool(torch.allclose(_first(facts, J.flip(0)), d, rtol=1e-5, atol=1e-8 * float(d.norm()))))
            J[-1] = -J[:-1].mean(0)  # now no direction helps all
            stationary.append(bool(_first(facts, J).norm() < 1e-3 * J.norm(dim=1).mean()))
    rule = facts.make(counts[0])
    draws = any(getattr(part, "rng", None) is not None for part in rule.modules())
    return {
        "harms no gradient (gᵢᵀd ≥ 0)": _verdict(harmless),
        "all gradients times c": _law(powers),
        "one gradient times 10: the same direction": _verdict(lengths),
        "another order of the gradients: the same result": "in distribution" if draws else _verdict(permuted),
        "zero where no direction helps all": _verdict(stationary),
        "draws random numbers": YES if draws else NO,
        "keeps state from call to call": YES if rule.keeps_state(counts[0]) else NO,
    }


def _law(powers: list[float]) -> str:
    """What c times the gradients makes of d, from the powers of c that were found."""
    power = sum(powers) / len(powers)
    if max(powers) - min(powers) > 1e-3:
        return "no such law"
    return "the same d" if abs(power) < 1e-3 else "d times c" if abs(power - 1) < 1e-3 else f"d times c^{power:.2g}"


def _verdict(found: list[bool]) -> str:
    share = sum(found) / len(found)
    return YES if share == 1 else NO if share == 0 else f"in {sum(found)} of {len(found)}"


def _promises(name: str, row: Row, seen: dict[str, str]) -> None:
    """Raises where what was measured is not what the tests' table promises."""
    promised = {"harms no gradient (gᵢᵀd ≥ 0)": row.nonconflicting, "another order of the gradients: the same result": row.equivariant}
    for what, yes in promised.items():
        if yes and seen[what] not in (YES, "in distribution"):
            raise AssertionError(f"{name}: tests/rule_table.py promises '{what}', but measured was '{seen[what]}'")


def tested(name: str) -> list[tuple[str, Row]]:
    """The rows of the tests' table for a rule."""
    return [(label, row) for label, row in RULES.items() if type(row.make(max(row.min_k, 4))).__name__ == name]


def _tests(name: str, facts: Facts) -> str:
    rows = tested(name)
    parts = [f"`{facts.tests}` holds it to its formula."]
    if rows:
        labels = ", ".join(f"`[{label}]`" for label, _ in rows)
        parts.append(
            f"Of `tests/rule_table.py`, held to the laws of `tests/test_rules.py` (scale, order, missing rows, numbers that are not finite): {labels}."
        )
        if any(row.residual for _, row in rows):
            parts.append("Its weights are held to the rule's own optimality conditions, which are written without its code.")
        if any(row.torchjd for _, row in rows):
            parts.append("TorchJD's is compared with it.")
    return " ".join(parts)


# ---- what it costs


def _newest() -> Path:
    return max(RESULTS.glob("*.csv"), key=lambda path: path.name)


def _time(us: float) -> str:
    return f"{us:.3g} µs" if us < 1000 else f"{us / 1000:.3g} ms"


def cost(name: str) -> str:
    """The rule's rows of the newest benchmark record, as a table."""
    rows, env = read(_newest())
    grid = {(row.k, row.n, row.provider): row for row in rows if row.section == "grid" and row.rule == name and row.median_us}
    ks, ns = (sorted({key[i] for key in grid if key[2] == "ours"}) for i in (0, 1))
    if not ks:
        return "The benchmark has no row of this rule."
    lines = ["| K | " + " | ".join(f"N = {n:,}" for n in ns) + " |", "|--:" * (len(ns) + 1) + "|"]
    for k in ks:
        cells = []
        for n in ns:
            ours, theirs = grid.get((k, n, "ours")), grid.get((k, n, "torchjd"))
            ratio = f" ({theirs.ratio_to_ours:.3g}x)" if theirs is not None and theirs.ratio_to_ours else ""
            cells.append(f"{_time(ours.median_us)}{ratio}" if ours is not None and ours.median_us else "")
        lines.append(f"| {k} | " + " | ".join(cells) + " |")
    return (
        "`mf.resolve` of K gradients of N float32, median of a call; in brackets how many times as long TorchJD takes.\n\n"
        + "\n".join(lines)
        + f"\n\n{env['cpu']}, {env['threads']} threads, torch {env['torch']}, mmfast {env['mmfast']} at {env['commit']}, {env['date']}: the newest record in "
        "`benchmarks/results`."
    )


# ---- pages

_LEFT = {
    "two": "Left: two gradients g₁ and g₂, their plain sum (grey), and what the rule makes of them at its first call, d. In the shaded cone neither is harmed.",
    "four": "Left: two gradients g₁ and g₂, their mean g₃, and a corrupted g₄ of minus three times the mean; the sum of all (grey), and what the rule makes of them, d. "
    "In the shaded cone neither g₁ nor g₂ is harmed.",
    "batches": "Left: two gradients g₁ and g₂, their plain sum (grey), and d for twelve draws of three noisy batches, at the first call. In the shaded cone neither is harmed.",
}


def page(name: str, facts: Facts, seen: dict[str, str]) -> str:
    """A rule's page, in Markdown."""
    formula = ", \\\\\n".join(re.split(r"[,;]?\s*\\qquad\s*", facts.formula))  # a line for each part: pages may be narrow
    for _, row in tested(name):
        if repr(row.make(4)) == repr(facts.make(4)):
            _promises(name, row, seen)
    drawn = repr(facts.make(4 if facts.rows == "four" else 2))
    draws = " Where it draws, twelve draws are shown." if seen["draws random numbers"] == YES and facts.rows != "batches" else ""
    table = "\n".join(f"| {what} | {value} |" for what, value in seen.items())
    members = "\n   :members: see" if hasattr(getattr(mf, name), "see") else ""
    where = f"\n\nPaper: <{facts.paper}>." if facts.paper else ""
    return f"""# {name}

```{{eval-rst}}
.. autoclass:: mmfast.{name}{members}
```

## Formula

$$
\\begin{{gathered}}
{formula}
\\end{{gathered}}
$$

gᵢ are the K gradients, the rows of J; G = J Jᵀ their Gramian, D their lengths on the diagonal, C = D⁻¹ G D⁻¹ their cosines; w the weights, p preferences; d = Jᵀ w the result.{where}

## On two losses

```{{image}} {name}.svg
:class: only-light
:alt: {name}: what it makes of two gradients, and its paths on two losses
```

```{{image}} {name}-dark.svg
:class: only-dark
:alt: {name}: what it makes of two gradients, and its paths on two losses
```

{_LEFT[facts.rows]}{draws} Right: 300 steps of plain descent, x ← x − {facts.step} d, from four points (circles) to dots; contours and minima (stars) of the two losses; grey, the points where neither
can be bettered without harm to the other. Drawn by `{drawn}`.

## Properties

| at the first call, on {PROBLEMS * (2 if facts.rows == "four" else 3)} random problems | |
|---|---|
{table}

K = {"5 and 6" if facts.rows == "four" else "2, 3 and 5"} random gradients of 5 elements, of lengths up to a hundredfold apart, measured on `{facts.make(5)!r}` when this page was built. {_tests(name, facts)}

## Cost

{cost(name)}

## When not to use it

{facts.avoid}
"""


def index(seen: dict[str, dict[str, str]]) -> str:
    """The page that names all rules, and compares what holds of them."""
    parts = [
        (
            "# The rules\n\nEach page has the rule's formula, its picture on two losses, its properties, cost and paper. Every function that takes a rule takes an instance, "
            'a class or a name: `mf.MGDA()`, `mf.MGDA`, `"mgda"`. [Which rule?](../which_rule.md) helps to choose one; [your own](../recipes.md#a-rule-of-your-own) is a class '
            "with one method.\n"
        )
    ]
    for family, members in FAMILIES.items():
        parts.append(f"\n## {family}\n\n| rule | what it does |\n|---|---|\n")
        parts += [f"| [{name}]({name}.md) | {first_line(name)} |\n" for name in members]
        parts.append("\n```{toctree}\n:hidden:\n\n" + "\n".join(members) + "\n```\n")
    parts.append("\n## What holds\n\nMeasured when this page was built, as each rule's page says.\n\n")
    heads = list(next(iter(seen.values())))
    parts.append("| rule | " + " | ".join(heads) + " |\n" + "|---" * (len(heads) + 1) + "|\n")
    parts += [f"| [{name}]({name}.md) | " + " | ".join(found.values()) + " |\n" for name, found in seen.items()]
    return "".join(parts)


def write(folder: Path = DOCS / "rules") -> None:
    """All pages and figures."""
    check()
    folder.mkdir(exist_ok=True)
    torch.set_num_threads(1)
    seen = {name: measured(facts) for name, facts in FACTS.items()}
    for name, facts in FACTS.items():
        draw(name, facts, folder)
        (folder / f"{name}.md").write_text(page(name, facts, seen[name]))
    (folder / "index.md").write_text(index(seen))


if __name__ == "__main__":
    write()
