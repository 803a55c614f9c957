"""The classifiers that judge what is generated: trained once for a data set and size, then taken from the folder of the grid."""

import hashlib
import json
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from mmfast.data import triplets
from mmfast.data.triplets import MODALITIES
from mmfast.experiments.checkpoint import write_checkpoint
from mmfast.experiments.grid import Tick
from mmfast.experiments.multimodal import metrics
from mmfast.experiments.multimodal.settings import Size
from mmfast.models.multimodal.classifiers import classifier

BATCH = 128
LEARNING_RATE = 1e-3


def ready(
    folder: Path, data: str, size: Size, device: torch.device, tick: Tick = lambda epoch, remark: None
) -> tuple[metrics.Judges, dict[str, float]]:
    """The judges of a data set and their accuracy on its test triplets; trained if the folder doesn't hold them yet.

    Args:
        folder: of the grid.
        data: name of the data set.
        size: says on how many images they learn and how long.
        device: where they are to be.
        tick: called after each epoch.

    Raises:
        DataError: the data set can't be had.
    """
    path = folder / "judges" / f"{_digest(data, size)}.pt"
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        networks = {name: classifier(name).to(device) for name in MODALITIES}
        if not path.exists():
            accuracy = _train(networks, data, size, device, tick)
            write_checkpoint(path, {"networks": {name: n.state_dict() for name, n in networks.items()}, "accuracy": accuracy})
    saved = torch.load(path, map_location=device)
    for name, network in networks.items():
        network.load_state_dict(saved["networks"][name])
    return metrics.freeze(networks), saved["accuracy"]


def _digest(data: str, size: Size) -> str:
    """A file's name: they depend on this alone, not on the rest of the size."""
    what = [data, size.judge_most, size.judge_epochs, size.test_most, size.test_repeats]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:12]


def _train(networks: dict[str, nn.Module], data: str, size: Size, device: torch.device, tick: Tick) -> dict[str, float]:
    """Trains them side by side on images of the training part, paired once, and returns their accuracy on the test part."""
    train = triplets.load(data, "train", 0, size.judge_most, 1)
    test = triplets.load(data, "test", 0, size.test_most, size.test_repeats)
    optimizer = torch.optim.Adam([p for network in networks.values() for p in network.parameters()], LEARNING_RATE, fused=True)
    for epoch in range(size.judge_epochs):
        for index in torch.randperm(len(train)).split(BATCH):
            labels, inputs = train.labels[index].to(device), train.batch(index)
            optimizer.zero_grad()
            losses = [F.cross_entropy(network(inputs[name].to(device)), labels) for name, network in networks.items()]
            torch.stack(losses).sum().backward()
            optimizer.step()
        tick(epoch + 1, "")
    return {name: metrics.accuracy(judge, name, test, device) for name, judge in metrics.freeze(networks).items()}
