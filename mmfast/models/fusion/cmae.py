"""CM-AE: a cross-modal autoencoder, trained to restore all modalities from some; then a classifier of its code."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mmfast.blocks.block import ImpartialityBlock
from mmfast.models.fusion.base import Concat, FusionModel, Inputs, Present, mean_of, network, random_subset, task_loss
from mmfast.models.multimodal.inputs import batch_of
from mmfast.resolvers.names import ResolverLike


class CMAE(FusionModel):
    """An autoencoder that restores every modality from one code, though some are zero on the way in; then a classifier of the code.

    A missing modality is zeros in the place of its features (in Ngiam et al. of its input: encoders are the identity there). First stage,
    "restore": for each sample either all of its n modalities enter or a single one (each of the n + 1 cases is as likely), and the loss is
    the mean squared error of every modality that the sample has, each averaged over its elements, summed over modalities. Second stage,
    after `classify()`: encoders and code are frozen, in eval mode, and the task's loss trains the classifier. The decoders share the code;
    with a `resolver` an impartiality block resolves their gradients there (`decode.stats()`).

    After Ngiam et al., "Multimodal deep learning", ICML 2011, without their layer-wise training; no code is public.

    Args:
        encoders, sizes: as for `FusionModel`.
        decoders: by name, from the code [B, code] to the shape of an input.
        outputs: number of logits, C.
        code: dimensions of the code.
        hidden: width of the layer before it, and of the classifier's.
        resolver: the rule of the block; None adds the gradients.

    Example:
        >>> encoders, decoders = {"image": nn.Linear(9, 4), "sound": nn.Linear(5, 3)}, {"image": nn.Linear(6, 9), "sound": nn.Linear(6, 5)}
        >>> model = CMAE(encoders, decoders, 10, code=6, hidden=16, resolver="pcgrad")
        >>> inputs, target = {"image": torch.randn(8, 9), "sound": torch.randn(8, 5)}, torch.randint(10, (8,))
        >>> model.loss(inputs, target).backward()
        >>> model.decode.stats().names
        ('image', 'sound')
        >>> model.classify().loss(inputs, target).backward()
    """

    def __init__(
        self,
        encoders: Mapping[str, nn.Module],
        decoders: Mapping[str, nn.Module],
        outputs: int,
        code: int = 64,
        hidden: int = 256,
        resolver: ResolverLike | None = None,
        *,
        sizes: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__(encoders, nn.Identity(), sizes)
        if not isinstance(decoders, (Mapping, nn.ModuleDict)) or set(decoders) != set(self.names):
            raise ValueError(f"decoders is not as expected: a dict with a module for each of {', '.join(self.names)}")
        self.fusion = Concat(nn.Sequential(network(sum(self.sizes.values()), hidden, code), nn.ReLU()))
        branches = nn.ModuleDict({name: decoders[name] for name in self.names})
        self.decode = branches if resolver is None else ImpartialityBlock(branches, resolver)
        self.classifier = network(code, hidden, outputs)
        self.classifies = False

    def classify(self) -> "CMAE":
        """Goes on to the second stage: everything but the classifier is frozen; the optimiser may keep all parameters."""
        self.classifies = True
        for part in (self.encoders, self.fusion, self.decode):
            part.requires_grad_(False)
        return self.train(self.training)

    def train(self, mode: bool = True) -> "CMAE":
        super().train(mode)
        if self.classifies:
            for part in (self.encoders, self.fusion, self.decode):
                part.eval()
        return self

    def code(self, inputs: Inputs, present: Present | None = None) -> Tensor:
        """The code [B, code] of what is present."""
        return self.fusion(*self.encode(inputs, present))

    def forward(self, inputs: Inputs, present: Present | None = None) -> Tensor:
        return self.classifier(self.code(inputs, present))

    def loss(self, inputs: Inputs, target: Tensor, present: Present | None = None) -> Tensor:
        """That of the stage: of "restore", in which the target is not looked at, or the task's."""
        if self.classifies:
            return task_loss(self(inputs, present), target)
        features, there = self.encode(inputs, present)
        n = there.sum(1)
        single = torch.rand(len(n), device=n.device) * (n + 1) < n
        kept = random_subset(there, torch.where(single, torch.ones_like(n), n))
        restored = self._decoded(self.fusion({name: f * kept[:, i : i + 1] for i, (name, f) in enumerate(features.items())}, kept))
        errors = []
        for name, x in batch_of(inputs, present, self.names).x.items():
            each = (restored[name] - x).square().flatten(1).mean(1)
            errors.append(mean_of(each, there[:, self.names.index(name)]))
        return torch.stack(errors).sum()

    def _decoded(self, code: Tensor) -> dict[str, Tensor]:
        if isinstance(self.decode, ImpartialityBlock):
            return self.decode(code)  # type: ignore[return-value]
        return {name: decoder(code) for name, decoder in self.decode.items()}

    def get_extra_state(self) -> dict[str, bool]:
        return {"classifies": self.classifies}

    def set_extra_state(self, state: dict[str, bool]) -> None:
        if state["classifies"]:
            self.classify()
