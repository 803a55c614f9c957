"""The runs of Tables 5 and 9, in two stages: the second takes the rules that were best in the first."""

import math
import statistics
from collections.abc import Iterable, Sequence

from mmfast.experiments.multimodal.results import Result
from mmfast.experiments.multimodal.settings import Settings, settings
from mmfast.experiments.settings import NONE


def first_stage(
    models: Sequence[str], objectives: Sequence[str], rules: Sequence[str], seeds: int, data: str | None, size: str, epochs: int | None
) -> list[Settings]:
    """Every model with every objective, without blocks and with each rule on "p", seed by seed, so that a grid that is stopped early has whole columns."""
    made = [
        settings(model, objective, rule, None, seed, data, size, epochs)
        for seed in range(seeds)
        for model in models
        for objective in objectives
        for rule in rules
    ]
    return list(dict.fromkeys(made))  # a rule may have been named in two ways


def second_stage(first: Sequence[Settings], found: Iterable[Result], blocks: Sequence[str]) -> list[Settings]:
    """The runs with more blocks, each model and objective with the rule that was best on "p".

    None for MVAE: it has one component, and there is nothing to resolve where one gradient arrives. None where a run of the first stage failed.
    """
    done = {result.settings: result for result in found}
    made: list[Settings] = []
    for cell in dict.fromkeys((run.model, run.objective) for run in first if run.model != "mvae"):
        runs = [run for run in first if (run.model, run.objective) == cell and run.rule != NONE]
        if not runs or not all(run in done for run in runs):
            continue
        rule = max(dict.fromkeys(run.rule for run in runs), key=lambda rule: score(done[run] for run in runs if run.rule == rule))
        made += [
            settings(run.model, run.objective, rule, more, run.seed, run.data, run.size, run.epochs)
            for more in blocks
            for run in runs
            if run.rule == rule and more != "p"
        ]
    return sorted(made, key=lambda run: run.seed)


def score(results: Iterable[Result]) -> float:
    """What a rule and its blocks are chosen by: the mean over seeds of self plus cross latent accuracy on the validation triplets; a run without a finite epoch
    makes it the worst."""
    return statistics.mean(-math.inf if r.validation is None else r.validation.self_accuracy + r.validation.cross_accuracy for r in results)
