"""HI-VAE: a mixture over s, a Gaussian z given s, and heads that are linear in both."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from mmfast import contract
from mmfast.models.likelihoods import Bernoulli, Categorical, Joint, LogNormal, Normal, Poisson
from mmfast.models.vae import apply_heads, make_heads, rules_of
from mmfast.precision import wide
from mmfast.resolvers.names import ResolverLike

_INIT = 0.05  # standard deviation of the first weights


class _Factored(nn.Module):
    """A head's weight as the product of a map from z to y_d, of size y, and a map from y_d to what the head puts out."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask, persistent=False)  # [outputs, K * y], 1 where an output reads a y

    def forward(self, outer: Tensor, inner: Tensor) -> Tensor:
        return (outer * self.mask) @ inner

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        outer, inner = weight.new_empty(self.mask.shape), weight.new_empty(self.mask.shape[1], weight.shape[1])
        return nn.init.normal_(outer, std=_INIT), nn.init.normal_(inner, std=_INIT)


class HIVAE(nn.Module):
    """HI-VAE (Nazabal, Olmos, Ghahramani, Valera, Pattern Recognition 2020) with the two blocks of Javaloy et al. (ICML 2022).

    q(s | x) is categorical, relaxed by the Gumbel softmax with a falling temperature; q(z | x, s) and p(z | s) are Gaussian. Head d puts out
    W_d [y_d, s] for its first parameter (y_d linear in z) and a function of s alone for the others; a class's first logit is zero. Both maps are linear,
    so the two blocks, at z and at s, are `LinearHeads`.

    Args:
        joint: the likelihoods of the K features, `mmfast.models.likelihoods.Joint` of Normal, LogNormal, Poisson, Bernoulli and Categorical; for columns prepared
            with positive="log1p".
        latent: dimensions of z.
        y_size: dimensions of each y_d.
        components: of the mixture, the size of s.
        resolvers: a list with the rules of the blocks at z and at s; None trains without blocks.

    Raises:
        TypeError, ValueError: joint has another likelihood, or resolvers is not as described.
    """

    free: Tensor  # [outputs], 0 where a logit is fixed to zero
    _numeric: Tensor  # real, positive and count features
    _classes: Tensor
    _offsets: Tensor  # of each class feature among the codes

    def __init__(
        self, joint: Joint, latent: int = 10, y_size: int = 5, components: int = 10, resolvers: Sequence[ResolverLike] | None = None
    ) -> None:
        super().__init__()
        self.joint, self.components, self.tau = joint, components, 1.0
        kinds = (Normal, LogNormal, Poisson, (Bernoulli, Categorical))
        places = [
            torch.tensor([i for i, part in enumerate(joint.likelihoods) if isinstance(part, kind)], dtype=torch.long) for kind in kinds
        ]
        if sum(map(len, places)) < len(joint.sizes):
            other = [part for part in joint.likelihoods if not isinstance(part, (*kinds[:3], *kinds[3]))]
            names = "Normal, LogNormal, Poisson, Bernoulli and Categorical"
            raise TypeError(f"joint has {contract.shortened(other)}; the inputs of HI-VAE are defined for {names} alone")
        self._counts = [len(p) for p in places[:3]]
        self.register_buffer("_numeric", torch.cat(places[:3]), persistent=False)
        self.register_buffer("_classes", places[3], persistent=False)
        classes = [part.classes if isinstance(part, Categorical) else 2 for part in (joint.likelihoods[i] for i in places[3])]
        self._codes = sum(classes)
        self.register_buffer("_offsets", torch.tensor([0, *classes]).cumsum(0)[:-1], persistent=False)
        width = sum(self._counts) + self._codes
        self.to_s = nn.Linear(width, components)
        self.to_mean, self.to_log_std = nn.Linear(width + components, latent), nn.Linear(width + components, latent)
        self.prior = nn.Linear(components, latent)
        z_rule, s_rule = rules_of(resolvers, 2, ", for the blocks at z and at s")
        self.z_heads = make_heads(latent, joint.sizes, z_rule)
        self.s_heads = make_heads(components, joint.sizes, s_rule, bias=False)
        for m in (self.to_s, self.to_mean, self.to_log_std, self.prior, self.z_heads, self.s_heads):
            nn.init.normal_(m.weight, std=_INIT)  # type: ignore[arg-type]
            if m.bias is not None:
                nn.init.constant_(m.bias, 0.01)  # type: ignore[arg-type]
        reads, free = [], []
        for part, size in zip(joint.likelihoods, joint.sizes, strict=True):
            logits = isinstance(part, Categorical)
            reads.append(torch.ones(size, y_size) if logits else torch.cat([torch.ones(1, y_size), torch.zeros(size - 1, y_size)]))
            free.append(torch.tensor([0.0] + [1.0] * (size - 1)) if logits else torch.ones(size))
        self.register_buffer("free", torch.cat(free), persistent=False)
        parametrize.register_parametrization(self.z_heads, "weight", _Factored(torch.block_diag(*reads)), unsafe=True)

    def inputs(self, x: Tensor, seen: Tensor) -> Tensor:
        """What the encoder sees, [rows, inputs]: standardised numbers, log(1 + count), classes one-hot, zeros where a cell is missing."""
        self.joint.check_rows(x, seen)
        there = seen != 0
        real, positive, count = torch.where(there, x, 1)[:, self._numeric].split(self._counts, 1)
        w = self.joint.w[self._numeric].split(self._counts)
        numbers = torch.cat([w[0] * real, w[1] * positive.log(), count.log1p()], 1) * there[:, self._numeric]
        places = torch.where(there, x, 0)[:, self._classes].long() + self._offsets
        codes = torch.zeros_like(numbers[:, :1]).repeat(1, self._codes).scatter_(1, places, there[:, self._classes].to(numbers.dtype))
        return torch.cat([numbers, codes], 1).to(x.dtype)

    def set_epoch(self, epoch: int) -> None:
        """Lowers the temperature of the relaxation: from 1 by 0.01 per epoch, down to 0.001."""
        self.tau = max(1e-3, 1 - 0.01 * epoch)

    def decode(self, z: Tensor, s: Tensor) -> Tensor:
        """All heads' outputs side by side."""
        with parametrize.cached():  # the product of the factors once, though the heads look at their weight several times
            return (apply_heads(self.z_heads, self._low(z)) + apply_heads(self.s_heads, self._low(s))) * self.free

    def _low(self, x: Tensor) -> Tensor:
        """x as the layers take it, which may be of 16 bits."""
        return x.to(self.prior.weight.dtype)

    def loss(self, x: Tensor, seen: Tensor) -> Tensor:
        """Minus the evidence lower bound, one sample of s and z (the divergence of s is exact), summed over the batch, in float32 at least; missing cells are left
        out.

        Args:
            x: [rows, K] as `mmfast.data.prepare.prepare` gives it; what a missing cell holds is not read.
            seen: [rows, K], 1 where a cell was observed.
        """
        h = self.inputs(x, seen)
        log_q_s = wide(self.to_s(h)).log_softmax(-1)
        s = F.gumbel_softmax(log_q_s, self.tau)
        hs = torch.cat([h, s.to(h.dtype)], -1)
        mean, log_std = wide(self.to_mean(hs)), wide(self.to_log_std(hs))
        noise = torch.randn_like(mean)
        z = mean + log_std.exp() * noise
        log_x = self.joint.log_prob(self.decode(z, s), x, seen).sum()
        kl_z = (0.5 * ((z - wide(self.prior(self._low(s)))).square() - noise.square()) - log_std).sum()
        kl_s = (log_q_s.exp() * log_q_s).sum() + len(x) * math.log(self.components)  # exact: at the relaxed s it would be biased
        return kl_z + kl_s - log_x

    @torch.no_grad()
    def reconstruct(self, x: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Predictions [rows, K], and log-likelihoods [rows, K], 0 where a cell is missing, at the likeliest s and the mean of z."""
        h = self.inputs(x, seen)
        s = F.one_hot(self.to_s(h).argmax(-1), self.components).to(h.dtype)
        raw = self.decode(self.to_mean(torch.cat([h, s], -1)), s)
        return self.joint.predict(raw), self.joint.log_prob(raw, x, seen)
