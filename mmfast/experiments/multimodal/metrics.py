"""How good a multimodal VAE of MNIST-SVHN-Text is: what its z knows of the digit, and whether what it generates shows it."""

from collections.abc import Callable, Iterator
from itertools import combinations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmfast.data.triplets import MODALITIES, Triplets
from mmfast.models.multimodal import MultimodalVAE
from mmfast.models.multimodal.networks import mean

BATCH = 500
LETTERS = dict(zip(MODALITIES, "MST", strict=True))
# every non-empty subset by its letters, "M" to "MST"
SUBSETS = {"".join(LETTERS[m] for m in names): names for size in (1, 2, 3) for names in combinations(MODALITIES, size)}
PENALTY = 1e-4  # on the squared weights of a latent classifier, so that its optimum is finite

Judges = dict[str, Callable[[Tensor], Tensor]]  # of each modality: from its mean to logits


def batches(data: Triplets, device: torch.device, rows: int | None = None) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Inputs and labels of all triplets, or of the first ones, in order; the last batch may be smaller."""
    for part in torch.arange(len(data))[:rows].split(BATCH):
        yield {name: x.to(device) for name, x in data.batch(part).items()}, data.labels[part].to(device)


@torch.no_grad()
def nll(vae: MultimodalVAE, data: Triplets, device: torch.device) -> float:
    """What a checkpoint is chosen by: minus the scaled log p(x | z), mean over triplets and components, from one z of each component."""
    total = 0.0
    for inputs, _ in batches(data, device):
        for subset in vae.components:
            z = vae.sample(inputs, subset)
            for name, modality in vae.modalities.items():
                total -= modality.scale * modality.log_prob(modality.decoder(z), inputs[name]).sum().item()  # type: ignore[union-attr, operator]
    return total / len(data) / len(vae.components)


@torch.no_grad()
def latents(vae: MultimodalVAE, data: Triplets, device: torch.device, rows: int | None = None) -> tuple[Tensor, Tensor]:
    """One z of each subset's posterior, [7, n, latent], and the labels [n]."""
    found = [(torch.stack([vae.sample(x, names)[0] for names in SUBSETS.values()]), labels) for x, labels in batches(data, device, rows)]
    return torch.cat([z for z, _ in found], 1), torch.cat([labels for _, labels in found])


def latent_classifiers(z: Tensor, labels: Tensor) -> Callable[[Tensor], Tensor]:
    """A linear classifier for each subset, fitted to its optimum: mean cross entropy plus 1e-4 times the squared weights, by L-BFGS.

    Args:
        z: [subsets, n, latent].
        labels: int64 [n].

    Returns:
        A function from z [subsets, m, latent] to logits [subsets, m, 10], each subset's by its own classifier.
    """
    subsets, _n, latent = z.shape
    weight = torch.zeros(subsets, latent, 10, device=z.device, requires_grad=True)
    bias = torch.zeros(subsets, 1, 10, device=z.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        logits = torch.baddbmm(bias, z, weight)
        value = F.cross_entropy(logits.flatten(0, 1), labels.repeat(subsets)) * subsets + PENALTY * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)  # type: ignore[arg-type]
    return lambda z: torch.baddbmm(bias, z, weight).detach()


def latent_accuracy(classify: Callable[[Tensor], Tensor], z: Tensor, labels: Tensor) -> Tensor:
    """Share of right answers of each classifier on each subset's z.

    Args:
        classify: see `latent_classifiers`.
        z: [subsets, n, latent].
        labels: int64 [n].

    Returns:
        float64 [i, j]: classifier j on z of subset i.
    """
    rows = [(classify(of.expand(len(z), -1, -1)).argmax(-1) == labels).double().mean(1) for of in z]
    return torch.stack(rows).cpu()


def self_and_cross(accuracy: Tensor) -> tuple[float, float]:
    """Means of the diagonal and of the rest of a square matrix."""
    k = len(accuracy)
    own = accuracy.diagonal().mean().item()
    return own, ((accuracy.sum() - accuracy.trace()) / (k * k - k)).item()


def decide(judge: Callable[[Tensor], Tensor], name: str, vae: MultimodalVAE, z: Tensor) -> Tensor:
    """The digit that a judge sees in the mean of what a modality's decoder makes of z [n, latent]."""
    return judge(mean(name, vae.modalities[name].decoder(z))).argmax(-1)  # type: ignore[operator]


@torch.no_grad()
def coherence(vae: MultimodalVAE, judges: Judges, data: Triplets, device: torch.device) -> dict[str, dict[str, float]]:
    """Of each modality and each subset: the share of triplets whose modality, generated from one z of the subset's posterior, shows their digit.

    Where the modality is in the subset this is reconstruction, elsewhere cross-generation.
    """
    right = {letter: dict.fromkeys(SUBSETS, 0) for letter in LETTERS.values()}
    for inputs, labels in batches(data, device):
        for subset, names in SUBSETS.items():
            z = vae.sample(inputs, names)[0]
            for name, letter in LETTERS.items():
                right[letter][subset] += int((decide(judges[name], name, vae, z) == labels).sum())
    return {letter: {subset: n / len(data) for subset, n in of.items()} for letter, of in right.items()}


@torch.no_grad()
def joint_coherence(vae: MultimodalVAE, judges: Judges, draws: int, device: torch.device) -> float:
    """The share of draws of z from the prior for which all three judges see the same digit."""
    same = 0
    for part in torch.arange(draws).split(BATCH):
        z = torch.randn(len(part), vae.latent, device=device)
        first, *others = [decide(judges[name], name, vae, z) for name in MODALITIES]
        same += int(torch.stack([first == other for other in others]).all(0).sum())
    return same / draws


def log_likelihood(vae: MultimodalVAE, data: Triplets, rows: int, samples: int, device: torch.device) -> float:
    """Mean log p(x) of the first rows, in nats, by importance sampling from the posterior given all modalities."""
    found = [vae.log_likelihood(inputs, samples).double() for inputs, _ in batches(data, device, rows)]
    return torch.cat(found).mean().item()


def freeze(networks: dict[str, nn.Module]) -> Judges:
    """Classifiers as judges: without dropout, and without gradients."""
    return {name: network.eval().requires_grad_(False) for name, network in networks.items()}


def accuracy(judge: Callable[[Tensor], Tensor], name: str, data: Triplets, device: torch.device) -> float:
    """The share of a modality's own inputs whose digit its judge sees."""
    right = [judge(inputs[name]).argmax(-1) == labels for inputs, labels in batches(data, device)]
    return torch.cat(right).double().mean().item()
