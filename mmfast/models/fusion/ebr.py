"""Explicit basis reallocation (EBR): all modalities in one latent space that does not tell them apart."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmfast.models.fusion.base import Features, FusionModel, Inputs, Present, mean_of, network
from mmfast.models.multimodal.junction import Junction
from mmfast.precision import Keeping
from mmfast.resolvers.names import ResolverLike


class _Reversed(torch.autograd.Function):
    """The identity, whose gradient is multiplied by minus a weight."""

    @staticmethod
    def forward(x: Tensor, weight: float) -> Tensor:  # type: ignore[override]
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.weight = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return -ctx.weight * grad, None


def reverse(x: Tensor, weight: float = 1.0) -> Tensor:
    """Gradient reversal (Ganin and Lempitsky, ICML 2015): x itself, whose gradient is minus weight times what comes back.

    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> reverse(x, 0.5).sum().backward()
        >>> x.grad
        tensor([-0.5000, -0.5000])
    """
    return _Reversed.apply(x, weight)


def two_layers(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Linear, ReLU, Linear, with Kaiming's normal weights of the outgoing side and no bias at first."""
    made = network(inputs, hidden, outputs)
    for m in made:
        if isinstance(m, nn.Linear):
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(m.bias)
    return made


class EBR(Keeping, FusionModel):
    """Explicit basis reallocation around a user's encoders and what fuses their features.

    With features f_i: factors g_i = h_i(f_i) in one latent space, inverse mechanisms back, f~_i = h_i^-1(g_i), and the fusion acts on f~.
    Training adds L_md, the cross-entropy of a discriminator that tells from g_i which modality it is of, averaged over what is present. The
    discriminator minimises it; encoders and h_i minimise L_sem - weight * L_md, by a gradient that is reversed on its way; h_i^-1 and the
    fusion minimise L_sem alone, the fusion's own loss. So the loss's value, L_sem + L_md, is not what all minimise; `losses` has the parts.

    L_md is on until the task's validation score starts to drop: tell the score after each epoch by `after_epoch`. A missing modality has
    another's factors in its place, f~_i = h_i^-1(g_j), with the first j that is present in the order of similarity to i that
    `fit_substitutes` finds on validation data; before that in the order of the encoders. That is so in training, too, for the fusion must
    have something. Where nothing is present all f~_i are zero.

    At the factors the gradients of L_sem and the reversed ones of L_md meet; with a `resolver` a block resolves their conflict there, all
    g_i as one problem (`block.stats()`, its branches "task" and "modality").

    Chaudhuri, Dutta, Bui, Georgescu, "A closer look at multimodal representation collapse", ICML 2025. No code of theirs is public: layer
    sizes and first weights follow a re-implementation of the text, `patience` and the substitution in training are ours. Deterministic.

    Args:
        encoders, fusion, sizes: as for `FusionModel`; `sizes` also gives the width of f~_i.
        latent: dimensions of the factors.
        hidden: width of h_i, h_i^-1 and the discriminator, of two layers each.
        weight: lambda, on the reversed gradient.
        resolver: the rule of the block; None adds the two gradients.
        patience: for how many epochs in a row the score must be below the best one before L_md stops.
        alternate: epochs in each phase where phases without and with L_md alternate, the first without; 0 for L_md from the beginning.
        reconstruction: weight of the mean square of f~_i - f_i, of what is present; 0 leaves it out, as the paper does.

    Raises:
        TypeError, ValueError: an argument is not as described.

    Example:
        >>> from mmfast.models.fusion import Concat
        >>> model = EBR({"image": nn.Linear(9, 4), "sound": nn.Linear(5, 3)}, Concat(nn.Linear(7, 10)), 8, 16, resolver="pcgrad")
        >>> inputs, present = {"image": torch.randn(8, 9), "sound": torch.randn(8, 5)}, {"sound": torch.rand(8) > 0.5}
        >>> model.loss(inputs, torch.randint(10, (8,)), present).backward()
        >>> model.fit_substitutes([(inputs, present)]).shape, model.after_epoch(0.8), model.after_epoch(0.7)
        (torch.Size([2, 2]), True, False)
        >>> model({"sound": inputs["sound"]}).shape
        torch.Size([8, 10])
    """

    always = True
    similarity: Tensor  # [m, m], mean cosine of the factors of two modalities
    order: Tensor  # [m, m], each modality, then its substitutes from the first choice to the last

    def __init__(
        self,
        encoders: Mapping[str, nn.Module],
        fusion: nn.Module,
        latent: int = 512,
        hidden: int = 1024,
        weight: float = 1.0,
        *,
        resolver: ResolverLike | None = None,
        patience: int = 1,
        alternate: int = 0,
        reconstruction: float = 0.0,
        sizes: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__(encoders, fusion, sizes)
        for what, number, least in (("latent", latent, 1), ("hidden", hidden, 1), ("patience", patience, 1), ("alternate", alternate, 0)):
            if not isinstance(number, int) or number < least:
                raise ValueError(f"{what} is {number!r}, expected a whole number, {least} at least")
        for what, value in (("weight", weight), ("reconstruction", reconstruction)):
            if not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise ValueError(f"{what} is {value!r}, expected a number, 0 at least")
        m = len(self.names)
        self.weight, self.patience, self.alternate, self.reconstruction = float(weight), patience, alternate, float(reconstruction)
        self.factors = nn.ModuleDict({name: two_layers(self.sizes[name], hidden, latent) for name in self.names})
        self.mechanisms = nn.ModuleDict({name: two_layers(latent, hidden, self.sizes[name]) for name in self.names})
        self.discriminator = two_layers(latent, hidden, m)
        self.block = None if resolver is None else Junction(("task", "modality"), resolver)
        self.register_buffer("similarity", torch.eye(m, dtype=torch.float64))
        self.register_buffer("order", torch.tensor([[i, *(j for j in range(m) if j != i)] for i in range(m)]))
        self._epoch, self._best, self._below = 0, -math.inf, 0

    @property
    def active(self) -> bool:
        """Whether the loss has L_md in the present epoch."""
        stopped = self._below >= self.patience
        return not stopped and (self.alternate == 0 or self._epoch // self.alternate % 2 == 1)

    def after_epoch(self, score: float) -> bool:
        """Takes the task's validation score (more is better) at the end of an epoch; True where the next one has L_md.

        Epochs without L_md, of a phase that alternates, count for the best score, too. Once L_md has stopped it stays off.

        Raises:
            ValueError: the score is not a number.
        """
        score = float(score)
        if math.isnan(score):
            raise ValueError("score is nan, expected the task's validation score, more is better")
        if self._below < self.patience:
            self._below = self._below + 1 if score < self._best else 0
            self._best = max(score, self._best)
        self._epoch += 1
        return self.active

    def latents(self, inputs: Inputs, present: Present | None = None) -> tuple[Features, Tensor]:
        """Factors g_i [B, latent] of every modality, of no meaning where it is absent, and bool [B, m], where it is present."""
        features, there = self.encode(inputs, present)
        return self._factors(features), there

    def forward(self, inputs: Inputs, present: Present | None = None) -> Tensor:
        factors, there = self.latents(inputs, present)
        return self.fusion(*self._back(list(factors.values()), there))

    def losses(self, inputs: Inputs, target: Tensor, present: Present | None = None) -> dict[str, Tensor]:
        """The parts of the loss, scalars: "task", "modality" where L_md is on, "reconstruction" (times its weight) where it has one."""
        features, there = self.encode(inputs, present)
        to_task = to_discriminator = list(self._factors(features).values())
        if self.block is not None and self.active:
            to_task, to_discriminator = (list(of) for of in self.block(to_task))
        back, of_any = self._back(to_task, there)
        parts = {"task": self.fusion_loss(back, of_any, target)}
        if self.active:
            guesses = self.discriminator(reverse(torch.stack(to_discriminator, 1), self.weight))  # [B, m, m]
            parts["modality"] = mean_of(-guesses.log_softmax(2).diagonal(dim1=1, dim2=2), there)
        if self.reconstruction:
            errors = torch.stack([(back[name] - features[name]).square().mean(1) for name in self.names], 1)
            parts["reconstruction"] = self.reconstruction * mean_of(errors, there)
        return parts

    def loss(self, inputs: Inputs, target: Tensor, present: Present | None = None) -> Tensor:
        return torch.stack(list(self.losses(inputs, target, present).values())).sum()

    @torch.no_grad()
    def fit_substitutes(self, batches: Iterable[tuple[Inputs, Present | None]]) -> Tensor:
        """Finds which modality stands for which: that with the most similar factors, by their mean cosine over samples that have both.

        Args:
            batches: of validation data, (inputs, present) each; networks are put into eval mode for them.

        Returns:
            The similarity [m, m], float64; NaN of a pair that no sample has, which comes last. Kept in the `state_dict`, with the order.

        Raises:
            TypeError: an entry of batches is no pair.
        """
        was_training = self.training
        self.eval()
        sums, counts = torch.zeros_like(self.similarity), torch.zeros_like(self.similarity)
        for batch in batches:
            if not isinstance(batch, (tuple, list)) or len(batch) != 2:
                raise TypeError(f"batches holds a {type(batch).__name__}, expected pairs (inputs, present)")
            inputs, present = batch
            factors, there = self.latents(inputs, present)
            seen = there.double()
            g = F.normalize(torch.stack(list(factors.values()), 1).double(), dim=2) * seen.unsqueeze(2)
            sums += torch.einsum("bil,bjl->ij", g, g)
            counts += seen.T @ seen
        self.train(was_training)
        self.similarity.copy_(sums / counts)
        ranked = self.similarity.nan_to_num(nan=-2.0).fill_diagonal_(2.0)
        self.order.copy_(ranked.argsort(dim=1, descending=True, stable=True))
        return self.similarity.clone()

    def _factors(self, features: Features) -> Features:
        return {name: self.factors[name](f) for name, f in features.items()}

    def _back(self, factors: list[Tensor], there: Tensor) -> tuple[Features, Tensor]:
        """f~_i of every modality, with substitutes for the missing, and bool [B, m], where the sample has anything."""
        stacked, rows, any_there = torch.stack(factors, 1), torch.arange(len(there), device=there.device), there.any(1)
        back = {}
        for name, choices in zip(self.names, self.order, strict=True):
            first = there[:, choices].to(torch.uint8).argmax(1)  # the first that is present, of the order of choice
            f = self.mechanisms[name](stacked[rows, choices[first]])
            back[name] = torch.where(any_there.unsqueeze(1), f, torch.zeros_like(f))
        return back, any_there.unsqueeze(1).expand_as(there)

    def get_extra_state(self) -> dict[str, float]:
        return {"epoch": self._epoch, "best": self._best, "below": self._below}

    def set_extra_state(self, state: dict[str, float]) -> None:
        self._epoch, self._best, self._below = int(state["epoch"]), state["best"], int(state["below"])

    def extra_repr(self) -> str:
        return f"weight={self.weight:g}, patience={self.patience}, alternate={self.alternate}, reconstruction={self.reconstruction:g}"
