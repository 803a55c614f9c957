"""ShaSpec: what modalities share, by one encoder, beside what each has of its own."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from mmfast.models.fusion.base import Features, Fusion, mean_of, network, random_subset, task_loss
from mmfast.models.multimodal.junction import Junction
from mmfast.resolvers.names import ResolverLike


class ShaSpec(Fusion):
    """A shared encoder r_i of every modality and one s_i of its own; f_i = r_i + Linear([r_i; s_i]), or the mean of all r where i is missing.

    Training keeps a random subset of what each sample has, its size uniform, and adds alpha times the L1 distance of shared features of
    neighbours in the modalities' circle (r_i and r_i+1, means over samples with both and over elements) and beta times the cross-entropy of
    a linear map that tells from s_i which modality it is. The modalities share an encoder; with a `resolver` a block resolves the gradients
    that they send to its parameters (`block.stats()`).

    After Wang et al., "Multi-modal learning with missing modality via shared-specific feature modelling", CVPR 2023, for vectors. The
    released code takes the shared features of the first modality at hand instead of the mean, and counts the zeros of missing ones in both
    auxiliary losses; here they are left out.

    Args:
        sizes: d_i by name.
        outputs: number of logits, C.
        width: of r_i and s_i.
        alpha, beta: weights of the auxiliary losses.
        resolver: the rule of the block; None adds the gradients.

    Example:
        >>> features = {"image": torch.randn(8, 4), "sound": torch.randn(8, 3)}
        >>> fusion = ShaSpec({"image": 4, "sound": 3}, 10, width=8, resolver="upgrad")
        >>> fusion.loss(features, torch.ones(8, 2, dtype=torch.bool), torch.randint(10, (8,))).backward()
        >>> fusion.block.stats().names
        ('image', 'sound')
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        outputs: int,
        width: int = 128,
        alpha: float = 0.1,
        beta: float = 0.02,
        resolver: ResolverLike | None = None,
    ) -> None:
        super().__init__()
        self.maps = nn.ModuleDict({name: nn.Linear(d, width) for name, d in sizes.items()})
        self.shared = network(width, width, width)
        self.specific = nn.ModuleDict({name: network(width, width, width) for name in sizes})
        self.residual = nn.Linear(2 * width, width)
        self.which = nn.Linear(width, len(sizes))
        self.classifier = nn.Linear(len(sizes) * width, outputs)
        self.alpha, self.beta = alpha, beta
        self.block = None if resolver is None else Junction(tuple(sizes), resolver)

    def parts(self, features: Features) -> tuple[Tensor, Tensor]:
        """Shared and specific features, [B, m, width] each."""
        params = dict(self.shared.named_parameters())
        copies = [None] * len(features) if self.block is None else self.block(list(params.values()))
        shared, specific = [], []
        for (name, f), copy in zip(features.items(), copies, strict=True):
            x = self.maps[name](f).relu()
            shared.append(self.shared(x) if copy is None else functional_call(self.shared, dict(zip(params, copy, strict=True)), (x,)))
            specific.append(self.specific[name](x))
        return torch.stack(shared, 1), torch.stack(specific, 1)

    def forward(self, features: Features, present: Tensor) -> Tensor:
        return self._fused(*self.parts(features), present)

    def loss(self, features: Features, present: Tensor, target: Tensor) -> Tensor:
        r, s = self.parts(features)
        size = torch.rand(len(present), device=present.device) * present.sum(1)  # of n modalities 1 to n are kept
        kept = random_subset(present, size.long() + 1)
        total = task_loss(self._fused(r, s, kept), target)
        apart = (r - r.roll(-1, 1)).abs().mean(2)
        together = kept & kept.roll(-1, 1)
        distances = torch.stack([mean_of(apart[:, i], together[:, i]) for i in range(r.shape[1])]).sum()
        which = -self.which(s).log_softmax(2).diagonal(dim1=1, dim2=2)
        return total + self.alpha * distances + self.beta * mean_of(which, kept)

    def _fused(self, r: Tensor, s: Tensor, present: Tensor) -> Tensor:
        there = present.unsqueeze(2)
        mean = torch.where(there, r, torch.zeros_like(r)).sum(1) / there.sum(1).clamp(min=1)
        fused = torch.where(there, r + self.residual(torch.cat([r, s], 2)), mean.unsqueeze(1))
        return self.classifier(F.relu(fused).flatten(1))
