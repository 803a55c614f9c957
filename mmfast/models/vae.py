"""The tabular variational autoencoder: one linear head and one likelihood per feature, trained with the ELBO, IWAE or DReG."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from mmfast.blocks import transforms
from mmfast.blocks.linear_heads import LinearHeads
from mmfast.models.dreg import decode_once
from mmfast.models.likelihoods import Joint
from mmfast.precision import wide
from mmfast.resolvers.names import ResolverLike

OBJECTIVES = ("elbo", "iwae", "dreg")


def mlp(sizes: Sequence[int], activation: type[nn.Module]) -> nn.Sequential:
    """Linear layers of these sizes, each with its activation."""
    return nn.Sequential(*(m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), activation())))


def _xavier(module: nn.Module, gain: float) -> None:
    for m in module.modules():
        if isinstance(m, nn.Linear):
            nn.init.xavier_uniform_(m.weight, gain)
            nn.init.constant_(m.bias, 0.01)


def make_heads(in_features: int, sizes: Sequence[int], resolver: ResolverLike | None, bias: bool = True) -> nn.Module:
    """K linear branches in one module: with a block, or as one plain layer that adds up their gradients."""
    return nn.Linear(in_features, sum(sizes), bias) if resolver is None else LinearHeads(in_features, sizes, resolver, bias=bias)


def rules_of(resolvers: Sequence[ResolverLike] | None, blocks: int, of: str) -> list[ResolverLike | None]:
    """A rule for each block, or None for each."""
    if resolvers is None:
        return [None] * blocks
    if isinstance(resolvers, str) or not isinstance(resolvers, Sequence):
        raise TypeError(f"resolvers is {resolvers!r}, expected a list with a rule for each block, such as [mf.PCGrad()]")
    if len(resolvers) != blocks:
        raise ValueError(f"resolvers has {len(resolvers)} rules, expected {blocks}{of}")
    return list(resolvers)


def apply_heads(heads: nn.Module, y: Tensor) -> Tensor:
    """All branches' outputs side by side."""
    return heads.joint(y) if isinstance(heads, LinearHeads) else heads(y)


class Decoder(nn.Module):
    """From z to the outputs of all heads side by side; the block sits where the heads begin."""

    def __init__(self, body: nn.Module, heads: nn.Module) -> None:
        super().__init__()
        self.body, self.heads = body, heads

    def forward(self, z: Tensor) -> Tensor:
        return apply_heads(self.heads, self.body(z))


def _log_prior(z: Tensor) -> Tensor:
    """log N(z; 0, I), summed over the last dimension, up to the constant that prior and posterior share."""
    return -(0.5 * z.square()).sum(-1)


def _log_normal(noise: Tensor, std: Tensor) -> Tensor:
    """log N(z; mean, std), likewise, from (z - mean) / std: float32 rounds z itself, beside whose mean a narrow posterior's noise would be lost."""
    return -(0.5 * noise.square() + std.log()).sum(-1)


class VAE(nn.Module):
    """The variational autoencoder of the tabular experiments of Javaloy et al. (ICML 2022), section 1.4 of whose code it follows.

    Standard normal prior; three layers on either side; the impartiality block where the decoder meets its heads. DReG goes back twice through its decoder, once
    to train it and once to train the encoder: two blocks, each with a resolver of its own.

    Args:
        joint: the likelihoods of the K features, `mmfast.models.likelihoods.Joint`.
        hidden: width of the layers, and of the representation that the heads share.
        latent: dimensions of z.
        resolvers: a list with the rule of the block, for DReG with the rules of its two; None trains without a block.
        objective: "elbo" (one sample, see `samples`), "iwae" (Burda et al., 2016) or "dreg" (Tucker et al., 2019).
        samples: of z per row, S; 1 for the ELBO.

    Raises:
        TypeError, ValueError: an argument is not as described, or the number of samples or of rules does not suit the objective.
    """

    def __init__(
        self,
        joint: Joint,
        hidden: int,
        latent: int,
        resolvers: Sequence[ResolverLike] | None = None,
        objective: str = "elbo",
        samples: int = 1,
    ) -> None:
        super().__init__()
        if objective not in OBJECTIVES:
            raise ValueError(f"objective is {objective!r}, expected one of {', '.join(OBJECTIVES)}")
        if samples < 1 or (objective == "elbo" and samples != 1):
            raise ValueError(f"samples is {samples}, expected {'1 for the ELBO' if objective == 'elbo' else 'at least 1'}")
        blocks = 2 if objective == "dreg" else 1
        rules = rules_of(resolvers, blocks, f" for {objective!r}")
        if not isinstance(joint, Joint):
            raise TypeError(f"joint is a {type(joint).__name__}, expected a Joint, such as Joint([Normal(), Categorical(3)])")
        k = len(joint.sizes)
        self.joint, self.objective, self.samples = joint, objective, samples
        self.encoder = nn.Sequential(nn.Dropout(0.1), nn.BatchNorm1d(k), *mlp([k, hidden, hidden, hidden], nn.Tanh))
        self.mean, self.std = nn.Linear(hidden, latent), nn.Linear(hidden, latent)
        body = mlp([latent, hidden, hidden, hidden], nn.ReLU)
        decoders = [Decoder(body, make_heads(hidden, joint.sizes, rule)) for rule in rules]
        self.decoder = decoders[0]
        for part, gain in ((self.encoder, 5 / 3), (body, 2**0.5), (self.mean, 1.0), (self.std, 1.0)):
            _xavier(part, gain)
        heads = self.decoder.heads
        for weight in heads.weight.split(joint.sizes):  # type: ignore[operator]
            nn.init.xavier_uniform_(weight)  # its bound depends on the size of a head, not of all
        nn.init.constant_(heads.bias, 0.01)  # type: ignore[arg-type]
        if objective == "dreg":  # decodes a second time, with the same parameters
            self.through = decoders[1]
            self._tie()

    def posterior(self, x: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of q(z | x), [rows, latent], in float32 at least; missing cells enter as zero."""
        self.joint.check_rows(x, seen)
        h = self.encoder(torch.where(seen != 0, x, 0))
        return wide(self.mean(h)), F.softplus(wide(self.std(h))) + 1e-6

    def loss(self, x: Tensor, seen: Tensor) -> Tensor:
        """Minus the bound on the log-likelihood (for DReG the IWAE's, with DReG's gradient), summed over the batch, in float32 at least; missing cells are left out.

        Args:
            x: [rows, K] as `mmfast.data.prepare.prepare` gives it; what a missing cell holds is not read.
            seen: [rows, K], 1 where a cell was observed.
        """
        mean, std = self.posterior(x, seen)
        noise = torch.randn(self.samples, *mean.shape, device=mean.device, dtype=mean.dtype)
        z = mean + std * noise
        low = z.to(self.mean.weight.dtype)  # what a decoder of 16 bits takes
        if self.objective != "dreg":
            log_x = self._log_likelihood(self.decoder(low), x, seen)
            log_w = log_x + _log_prior(z) - _log_normal(noise, std)
            return -self._bound(log_w)
        log_x, log_x_through = self._decodes(low, x, seen)
        fixed = std.detach()
        log_w = log_x_through + _log_prior(z) - _log_normal(noise + (z - z.detach()) / fixed, fixed)  # a function of z alone
        weight = log_w.detach().softmax(0)
        surrogate = -(weight * log_x + weight.square() * log_w).sum()
        return surrogate - (surrogate + self._bound(log_w)).detach()  # of its gradient, and of the value of what it trains

    def _bound(self, log_w: Tensor) -> Tensor:
        """That of Burda et al. from log-weights [samples, rows], or the ELBO, summed over the rows."""
        if self.objective == "elbo":
            return log_w.mean(0).sum()
        return (log_w.logsumexp(0) - math.log(self.samples)).sum()

    def _tie(self) -> None:
        """The second decoder's heads have the first one's parameters: `load_state_dict(assign=True)` and `to_empty` give each its own."""
        heads, through = self.decoder.heads, self.through.heads
        if through.weight is not heads.weight or through.bias is not heads.bias:
            through.weight, through.bias = heads.weight, heads.bias

    def _decodes(self, z: Tensor, x: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """DReG's log p(x | z), whose gradient goes to the decoder alone, and the same whose gradient goes to z alone."""
        self._tie()
        if torch.compiler.is_compiling() or transforms.active():  # no transformation sees a backward pass inside of a backward pass
            return self._decode_twice(z, x, seen)
        heads = self.decoder.heads, self.through.heads
        return decode_once(self.decoder.body, heads, apply_heads, lambda raw: self._log_likelihood(raw, x, seen), z)

    def _decode_twice(self, z: Tensor, x: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        frozen = {name: p.detach() for name, p in self.through.named_parameters()}
        raws = self.decoder(z.detach()), functional_call(self.through, frozen, (z,))
        return self._log_likelihood(raws[0], x, seen), self._log_likelihood(raws[1], x, seen)

    def _log_likelihood(self, raw: Tensor, x: Tensor, seen: Tensor) -> Tensor:
        """Of the observed cells of each row, [samples, rows]."""
        return self.joint.log_prob(raw, x, seen).sum(-1)

    @torch.no_grad()
    def reconstruct(self, x: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Predictions [rows, K], and log-likelihoods [rows, K], 0 where a cell is missing, at z = the posterior's mean."""
        was_training = self.training
        self.eval()
        raw = self.decoder(self.posterior(x, seen)[0].to(self.mean.weight.dtype))
        self.train(was_training)
        return self.joint.predict(raw), self.joint.log_prob(raw, x, seen)
