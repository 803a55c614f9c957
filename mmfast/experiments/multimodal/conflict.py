"""How the decoders' gradients relate where they meet, looked at now and then during a training."""

import math

import torch
from torch import Tensor

from mmfast import stats
from mmfast.models.multimodal import MultimodalVAE


class Probe:
    """Looks at one batch through a model's own networks, with a block "p" that adds up: the same look whatever blocks the model has; neither its gradients nor
    the random numbers of its training see it.

    Args:
        vae: the model.
        inputs: the batch.
    """

    def __init__(self, vae: MultimodalVAE, inputs: dict[str, Tensor]) -> None:
        modalities = dict(vae.modalities.items())
        self.twin = MultimodalVAE(modalities, vae.latent, vae.mixture, vae.objective, vae.samples, "p", "sum")  # type: ignore[arg-type]
        self.inputs = inputs

    def look(self) -> list[float]:
        """The share of pairs of decoders whose gradients conflict, mean over the components of z, and the ratio of the largest to the smallest norm, their median.

        Components count whose decoders all send a gradient: SIWAE leaves some without weight. NaN where there is none. To be called where the parameters have no gradients that are still needed: they are set to None.
        """
        devices = [x.device for x in self.inputs.values() if x.is_cuda][:1]
        with torch.random.fork_rng(devices):
            torch.manual_seed(0)  # the same noise at every look
            self.twin.loss(self.inputs).backward()
        self.twin.zero_grad()
        G = torch.stack([block.stats().gram for block in self.twin.blocks["p"].values()])  # type: ignore[union-attr, operator]
        norms = stats.norms(G)
        whole = norms.amin(-1) > 0
        rate, ratio = stats.conflict_rate(G[whole]), norms[whole].amax(-1) / norms[whole].amin(-1)
        return [rate.mean().item(), ratio.quantile(0.5).item()] if whole.any() else [math.nan, math.nan]
