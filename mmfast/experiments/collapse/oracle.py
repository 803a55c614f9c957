"""What the planted set allows: scores of the function that its labels were drawn from, and each modality's part in it."""

from collections.abc import Iterable

import torch

from mmfast.data import modalities
from mmfast.data.planted import Planted


def planted(seed: int) -> dict[str, dict[str, float]]:
    """Of the planted set with this seed: the best there can be.

    Returns:
        By modality: "contribution", the accuracy on the test rows that is lost without what it alone holds; "alone", that of what it holds with the common
        features; "shares", its part in the squared norm of the teacher, which is the gradient outer product of the planted function.
    """
    source, rows = modalities.planted(seed), modalities.load("planted", seed).test
    whole = _accuracy(source, rows.inputs, rows.target, ())
    blocks = dict(zip(source.sources, source.teacher.split([s.width for s in source.sources.values()], 1), strict=True))
    energy = {name: float(block.square().sum()) for name, block in blocks.items()}
    names = list(source.sources)
    return {
        "contribution": {name: whole - _accuracy(source, rows.inputs, rows.target, (name,)) for name in names},
        "alone": {name: _accuracy(source, rows.inputs, rows.target, [other for other in names if other != name]) for name in names},
        "shares": {name: energy[name] / sum(energy.values()) for name in names},
    }


def _accuracy(source: Planted, inputs: dict[str, torch.Tensor], target: torch.Tensor, without: Iterable[str]) -> float:
    """Of the teacher, without the predictive features that these modalities have of their own; what is common others have, too."""
    seen = {name: x.double() for name, x in inputs.items()}
    for name in without:
        own = source.predictive[name][source.common :]
        seen[name] = seen[name] - seen[name] @ own.T @ own
    logits = torch.cat(list(seen.values()), 1) @ source.teacher.T
    return float((logits.argmax(1) == target).double().mean())
