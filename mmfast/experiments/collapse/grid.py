"""The runs of the experiments on representation collapse."""

from collections.abc import Sequence

from mmfast.experiments.collapse.settings import CURABLE, CURES, NOISY, SMIL_DATA, SYSTEMS, WITH_BLOCK, Settings, settings
from mmfast.experiments.settings import NONE

NOISES = (0.5, 1.0, 2.0)


def runs(
    data: Sequence[str],
    systems: Sequence[str],
    cures: Sequence[str],
    rules: Sequence[str],
    noises: Sequence[float],
    seeds: int,
    epochs: int | None = None,
    weight: float | None = None,
    full: bool = False,
) -> list[Settings]:
    """Every system alone, those that take a cure with each, those that have a block with each rule, and early fusion with noise; seed by seed, so that a grid
    that is stopped early has whole columns.

    Raises:
        SettingsError: an unknown name, or nothing is left of what was asked for.
    """
    made: list[Settings] = []
    for seed in range(seeds):
        for name in data:
            for system in systems:
                for cure in cures:
                    for rule in rules:
                        if _suits(name, system, cure, rule):
                            made.append(settings(name, system, cure, rule, seed, epochs, weight=_weight(cure, weight), full=full))
            if name in NOISY and "early" in systems and NONE in (rule.lower() for rule in rules):
                for noise in noises:
                    for cure in cures:
                        if noise:
                            made.append(
                                settings(name, "early", cure, NONE, seed, epochs, noise=noise, weight=_weight(cure, weight), full=full)
                            )
    if not made:
        settings(data[0], systems[0], cures[0], rules[0])  # says why
    return list(dict.fromkeys(made))  # a rule may have been named in two ways


def _weight(cure: str, weight: float | None) -> float | None:
    return None if cure == NONE else weight


def _suits(data: str, system: str, cure: str, rule: str) -> bool:
    """Whether a cell of the grid exists; `settings` says what is wrong with a name."""
    if system not in SYSTEMS or cure not in CURES:
        return True
    if system == "smil" and data not in SMIL_DATA:
        return False
    if cure != NONE and system not in CURABLE:
        return False
    return rule.lower() == NONE or cure == "ebr" or system in WITH_BLOCK
