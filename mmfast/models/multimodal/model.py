"""The multimodal VAEs of Javaloy et al. (ICML 2022): MVAE, MMVAE and MoPoE, trained with ELBO, IWAE or SIWAE and the paper's blocks."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mmfast.models.multimodal.bound import OBJECTIVES, Densities, bound
from mmfast.models.multimodal.inputs import Batch, batch_of, check_part
from mmfast.models.multimodal.junction import Factory, Junction, rule_of
from mmfast.models.multimodal.mixture import (
    MIXTURES,
    Draws,
    Posterior,
    components_of,
    log_expert,
    log_mean_exp,
    log_prior,
    products,
    valid_components,
)
from mmfast.models.multimodal.modality import Modality
from mmfast.precision import LOW, wide

AT_ONCE = 4096  # latents that log_likelihood decodes at once, or as many as a training step if those are more


def _check_number(what: str, number: int) -> None:
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise ValueError(f"{what} is {number!r}, expected a whole number, 1 at least")


class MultimodalVAE(nn.Module):
    """A variational autoencoder of several modalities, any of which may be missing, with impartiality blocks where they meet.

    The posterior is a mixture with equal weights; each of its components is the product of the Gaussian experts of a subset of the modalities. The loss is minus
    a bound of log p(x) under a prior N(0, I), from `samples` draws of each component; the posterior's parameters are detached within log q ("sticking the landing").
    Decoders see the draws of all components in one call. Noise comes from torch's global generator, and with its seed every number is repeated.

    A sample has the components whose modalities are all present for it, so that MoPoE is the mixture over the subsets of what is there, each once. With nothing
    present the posterior is the prior and the sample adds 0 to the loss. What an absent cell holds is never read: an encoder and a likelihood see a present row
    of the batch in its place (ones where there is none), whose results are left out; a batch norm counts it. A modality that is not in `inputs` costs nothing.

    Javaloy, Meghdadi, Valera, "Mitigating modality collapse in multimodal VAEs via impartial optimization", ICML 2022. MVAE: Wu and Goodman, NeurIPS 2018; MMVAE: Shi et al.,
    NeurIPS 2019; MoPoE: Sutter et al., ICLR 2021.

    Args:
        modalities: D modalities by name.
        latent: dimensions of z.
        mixture: "poe" (MVAE: one component, the product of all experts and of the prior), "moe" (MMVAE: a component for each modality) or "mopoe" (MoPoE: one for
            each non-empty subset).
        objective: "elbo" (the mean over components and samples), "iwae" (the mean over samples within the logarithm) or "siwae" (that over components, too).
        samples: of z from each component, K; with one "iwae" is "elbo".
        blocks: which blocks resolve conflicts, any of the letters "p" (one for each component: the gradients that the D decoders send to its z), "q" (one for each
            component: those that the components' densities send to its z) and "s" (one for each decoder: its parameters' gradients from the components; decodes
            component by component). At "q" and "s" the one component of "poe" meets no other. They lie in `vae.blocks[letter][name]`, with `stats()`; their rules' states are in the `state_dict`.
        resolver: makes the rule of each block, a function without arguments or a rule's class or name; only with blocks.

    Raises:
        TypeError, ValueError: an argument is not as described.

    Example:
        >>> class Encoder(nn.Linear):
        ...     def forward(self, x):
        ...         mean, std = super().forward(x).chunk(2, -1)
        ...         return mean, nn.functional.softplus(std) + 1e-6
        >>> log_prob = lambda raw, x: torch.distributions.Laplace(raw, 0.75).log_prob(x).sum(-1)
        >>> modalities = {name: Modality(Encoder(n, 4), nn.Linear(2, n), log_prob) for name, n in {"image": 9, "text": 5}.items()}
        >>> vae = MultimodalVAE(modalities, 2, "mopoe", "siwae", samples=3, blocks="pq", resolver=mf.PCGrad)
        >>> vae.loss({"image": torch.randn(8, 9), "text": torch.randn(8, 5)}, present={"text": torch.rand(8) > 0.5}).backward()
        >>> vae.blocks["p"]["image+text"].stats().names
        ('image', 'text')
    """

    def __init__(
        self,
        modalities: Mapping[str, Modality],
        latent: int,
        mixture: str = "moe",
        objective: str = "elbo",
        samples: int = 1,
        blocks: str = "",
        resolver: Factory | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(modalities, Mapping) or not modalities or not all(isinstance(m, Modality) for m in modalities.values()):
            raise TypeError("modalities is not as expected: a dict from names to Modality, one at least")
        for name in modalities:
            check_part("modalities", name, ".+")
        for what, value, known in (("mixture", mixture, MIXTURES), ("objective", objective, OBJECTIVES)):
            if value not in known:
                raise ValueError(f"{what} is {value!r}, expected one of {', '.join(known)}")
        _check_number("latent", latent)
        _check_number("samples", samples)
        if not isinstance(blocks, str):
            raise TypeError(f"blocks is {blocks!r}, expected a string of the letters p, q and s, such as 'pq', or '' for none")
        if not set(blocks) <= set("pqs") or len(set(blocks)) < len(blocks):
            raise ValueError(f"blocks is {blocks!r}, expected some of the letters p, q and s, such as 'pq', or '' for none")
        if not blocks and resolver is not None:
            raise ValueError(
                "resolver is given, but blocks is '': nothing would be resolved; expected blocks='p', 'pq' or 'pqs', or no resolver"
            )
        if "s" in blocks:
            for name, modality in modalities.items():
                if not isinstance(modality.decoder, nn.Module):
                    raise TypeError(
                        f"the decoder of {name!r} is a {type(modality.decoder).__name__}, expected an nn.Module for blocks with 's'"
                    )
        self.modalities = nn.ModuleDict(modalities)
        self.names = tuple(modalities)
        self.latent, self.mixture, self.objective, self.samples = latent, mixture, objective, samples
        self.components = components_of(self.names, mixture)
        parts = ["+".join(subset) for subset in self.components]
        owners = {"p": (parts, self.names), "q": (parts, parts), "s": (self.names, parts)}
        self.blocks = nn.ModuleDict(
            {
                letter: nn.ModuleDict({owner: Junction(owners[letter][1], rule_of(resolver)) for owner in owners[letter][0]})
                for letter in "pqs"
                if letter in blocks
            }
        )

    def loss(self, inputs: Mapping[str, Tensor], present: Mapping[str, Tensor] | None = None) -> Tensor:
        """Minus the bound of log p(x), constants included, each log-probability times its scale; summed over the batch.

        Args:
            inputs: x [B, *] of each modality; one that is left out is missing for all.
            present: bool [B] of each modality that is missing for some; what an absent cell holds is never read.

        Returns:
            A scalar, in float32 at least. Its gradient passes through the blocks.

        Raises:
            TypeError, ValueError: an argument is not as described, or an encoder or log_prob gives another shape than a `Modality` should.
        """
        q = self._encode(inputs, present)
        return self._loss(self._densities(q, q.draw(self.samples)), q.valid)

    def terms(self, inputs: Mapping[str, Tensor], present: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The loss as terms for `mmfast.find_blocks`: scalars by name, each linear in one density, whose sum has the loss's gradient.

        One for each modality given, under its name: where these meet blocks "p" can stand; one for each component's density, under names such as
        "q(image+text)": blocks "q"; and "prior". Their values are no parts of the loss's.

        Raises:
            TypeError, ValueError: as `loss`.
            RuntimeError: in inference mode, where nothing has a gradient.
        """
        if torch.is_inference_mode_enabled():
            raise RuntimeError("terms are made of gradients, which inference mode has none of; call it outside of torch.inference_mode()")
        q = self._encode(inputs, present)
        each = self._densities(q, q.draw(self.samples), apart=True)
        experts = {f"q({'+'.join(subset)})": part for subset, part in zip(q.components, each.log_q, strict=True)}
        parts = {**each.log_x, "prior": each.log_z, **experts}
        with torch.enable_grad():
            leaves = {name: part.detach().requires_grad_() for name, part in parts.items()}
            loss = self._loss(
                Densities({name: leaves[name] for name in each.log_x}, leaves["prior"], tuple(leaves[name] for name in experts)), q.valid
            )
            slopes = torch.autograd.grad(loss, list(leaves.values()))
        return {name: (slope * part).sum() for slope, (name, part) in zip(slopes, parts.items(), strict=True)}

    def posterior(
        self, inputs: Mapping[str, Tensor], subset: Iterable[str] | None = None, present: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, [B, latent], of the product of a subset's experts, with the prior's for "poe"; that of a modality that is missing is left out.

        Args:
            inputs, present: as for `loss`; modalities outside the subset are not looked at.
            subset: names of modalities, one of them at least in inputs; None for all.
        """
        batch, experts, _ = self._experts(inputs, present, subset)
        mean, std = products(experts, [batch.names], batch.present, self.mixture == "poe")
        return mean[0], std[0]

    def sample(
        self,
        inputs: Mapping[str, Tensor],
        subset: Iterable[str] | None = None,
        samples: int = 1,
        present: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Draws z [samples, B, latent] from the posterior given a subset of modalities: that of `posterior`, but for "moe", which has no products: each z is from the
        expert of one modality of the subset, taken at random among those present."""
        _check_number("samples", samples)
        if self.mixture != "moe":
            mean, std = self.posterior(inputs, subset, present)
        else:
            q = self._encode(inputs, present, subset)
            chances = torch.ones_like(q.mean[..., 0]) if q.valid is None else q.valid.to(q.mean.dtype)  # [S, B]
            taken = torch.multinomial(chances.T, samples, replacement=True).T.unsqueeze(-1).expand(-1, -1, self.latent)
            mean, std = (t.gather(0, taken) for t in (q.mean, q.std))
        return mean + std * torch.randn(samples, *mean.shape[-2:], device=mean.device, dtype=mean.dtype)

    @torch.no_grad()
    def log_likelihood(self, inputs: Mapping[str, Tensor], samples: int = 1000, present: Mapping[str, Tensor] | None = None) -> Tensor:
        """log p(x), [B], of the modalities that are present, estimated by importance sampling from the posterior given all of them.

        Scales are left out. Each of the S components gives the same number of draws, samples / S or the next whole number; memory does not grow with it.

        Args:
            inputs, present: as for `loss`.
            samples: number of draws for each x.
        """
        _check_number("samples", samples)
        q = self._encode(inputs, present)
        s, rows = q.mean.shape[:2]
        each = -(-samples // s)
        at_once = max(self.samples, AT_ONCE // max(1, s * rows))
        sums = torch.full_like(q.mean[..., 0], -torch.inf)
        for begin in range(0, each, at_once):
            log_w = self._densities(q, q.draw(min(at_once, each - begin))).log_weights(q.valid, {})
            sums = torch.logaddexp(sums, log_w.logsumexp(1))
        return log_mean_exp(sums, q.valid, (0,)) - math.log(each)

    def _modality(self, name: str) -> Modality:
        return cast(Modality, self.modalities[name])

    def _experts(
        self, inputs: Mapping[str, Tensor], present: Mapping[str, Tensor] | None, subset: Iterable[str] | None = None
    ) -> tuple[Batch, dict[str, tuple[Tensor, Tensor]], dict[str, torch.dtype]]:
        batch = batch_of(inputs, present, self.names, subset)
        given = {name: self._modality(name).expert(x, self.latent, name) for name, x in batch.x.items()}
        low = {name: mean.dtype for name, (mean, _) in given.items() if mean.dtype in LOW}
        return batch, {name: (wide(mean), wide(std)) for name, (mean, std) in given.items()}, low

    def _encode(self, inputs: Mapping[str, Tensor], present: Mapping[str, Tensor] | None, subset: Iterable[str] | None = None) -> Posterior:
        batch, experts, low = self._experts(inputs, present, subset)
        components = components_of(batch.names, self.mixture)
        mean, std = products(experts, components, batch.present, self.mixture == "poe")
        valid = None if batch.present is None or self.mixture == "poe" else valid_components(components, batch.present)
        return Posterior(batch, components, mean, std, valid, low)

    def _loss(self, densities: Densities, valid: Tensor | None) -> Tensor:
        scales = {name: self._modality(name).scale for name in densities.log_x}
        return -bound(densities.log_weights(valid, scales), valid, self.objective).sum()

    def _densities(self, q: Posterior, draws: Draws, apart: bool = False) -> Densities:
        """At the draws, through the blocks; `apart` evaluates the components' densities one by one, so that each has a graph of its own."""
        z = draws.z
        zs = z.unbind(0) if apart or "p" in self.blocks or "q" in self.blocks else ()
        own = self._own_components(q)
        to_decoders = self._to_places(z, zs, "p", own, [self.names.index(name) for name in q.batch.names])
        log_x = {name: self._decode(name, of, q) for name, of in zip(q.batch.names, to_decoders, strict=True)}
        to_experts = self._to_places(z, zs, "q", own, own)
        mean, std = q.mean.detach(), q.std.detach().unsqueeze(1)  # std [S', 1, B, latent]
        away = (mean.unsqueeze(1) - mean).unsqueeze(2) + draws.away.detach().unsqueeze(1)  # z_s less the mean of s', [S, S', K, B, latent]
        if apart:
            log_q = tuple(log_expert(*of).unsqueeze(1) for of in zip(to_experts, away.unbind(1), std, strict=True))
        else:
            log_q = (log_expert(torch.stack(to_experts, 1) if "q" in self.blocks else z.unsqueeze(1), away, std),)
        return Densities(log_x, log_prior(z), log_q)

    def _own_components(self, q: Posterior) -> list[int]:
        """Which of the model's components those of a batch are; the one of "poe" is the product of whatever is given."""
        return [0] if self.mixture == "poe" else [self.components.index(subset) for subset in q.components]

    def _to_places(self, z: Tensor, zs: tuple[Tensor, ...], letter: str, own: Sequence[int], places: Sequence[int]) -> list[Tensor]:
        """z [S, K, B, latent] for each of several places, by way of each component's block where it has one; where zs is given, from it."""
        if letter in self.blocks:
            blocks = list(cast(nn.ModuleDict, self.blocks[letter]).values())
            aliases = [blocks[s](of) for s, of in zip(own, zs, strict=True)]
            return [torch.stack([of[place] for of in aliases]) for place in places]
        return [torch.stack(zs) if zs else z for _ in places]

    def _decode(self, name: str, z: Tensor, q: Posterior) -> Tensor:
        """log p(x_d | z), [S, K, B], zero where x_d is absent."""
        modality, x = self._modality(name), q.batch.x[name]
        z = z.to(q.low.get(name, z.dtype))
        if "s" in self.blocks:
            decoder = cast(nn.Module, modality.decoder)
            params = dict(decoder.named_parameters())
            copies = cast(nn.ModuleDict, self.blocks["s"])[name](list(params.values()))
            of_components = [
                modality.judge(functional_call(decoder, dict(zip(params, copies[s], strict=True)), (of,)), x, of.shape[:-1], name)
                for s, of in zip(self._own_components(q), z, strict=True)
            ]
            log_x = torch.stack(of_components)
        else:
            log_x = modality.judge(modality.decoder(z), x, z.shape[:-1], name)
        if q.batch.present is None:
            return log_x
        return torch.where(q.batch.present[name], log_x, torch.zeros_like(log_x))

    def extra_repr(self) -> str:
        return f"latent={self.latent}, mixture={self.mixture!r}, objective={self.objective!r}, samples={self.samples}"
