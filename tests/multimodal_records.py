"""Made-up records of runs of multimodal VAEs."""

from dataclasses import asdict

from mmfast.experiments.multimodal.metrics import SUBSETS
from mmfast.experiments.multimodal.results import Result, Scores
from mmfast.experiments.multimodal.settings import SIZES, Settings


def scores(own=0.7, cross=0.5, coherence=0.6):
    matrix = [[own if i == j else cross for j in range(7)] for i in range(7)]
    return Scores(matrix, own, cross, {d: dict.fromkeys(SUBSETS, coherence) for d in "MST"}, 0.25, -1234.5)


def result(
    rule="none", seed=0, test=(0.7, 0.5, 0.6), validation=None, blocks=None, model="mmvae", objective="elbo", size="small", **changes
):
    """A run with these self and cross accuracies and coherence, on validation the same where nothing else is said; None for one that diverged."""
    blocks = ("" if rule == "none" else "p") if blocks is None else blocks
    made = Settings(model, objective, blocks, rule, seed, "MNIST-SVHN*-Text", size, 3)
    both = [None if s is None else scores(*s) for s in (validation or test, test)]
    rest = {"judges": {"mnist": 0.98, "svhn": 0.9, "text": 1.0}, "conflict": [[0.0, 0.2, 30.0], [9.0, 0.4, 10.0]], "step_us": 9e4}
    return Result(made, 3, 3, [3.0, 2.0, 1.0], *both, **{**rest, "evaluation_s": 20.0, "size": asdict(SIZES[size]), **changes})
