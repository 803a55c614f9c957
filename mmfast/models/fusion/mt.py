"""MT: one transformer for all modalities, trained on the whole sample and on each modality alone."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mmfast.models.fusion.base import Features, Fusion, task_loss
from mmfast.models.multimodal.junction import Junction
from mmfast.resolvers.names import ResolverLike


class MT(Fusion):
    """A transformer over a token of each modality and one of the class, in which attention masks hide what is missing.

    Training is a problem of m + 1 tasks with one head: the whole sample, and each modality alone, of the samples that have it; the sum of
    their cross-entropies. The tasks share the transformer's parameters; with a `resolver` a block resolves the gradients there
    (`block.stats()`, its branches "full" and the modalities' names), while tokens and head add theirs.

    After Ma et al., "Are multimodal transformers robust to missing modality?", CVPR 2022, of which no code is public: the tokens are
    features instead of patches and words, and their search for the layers of fusion is left out. Deterministic without dropout.

    Args:
        sizes: d_i by name.
        outputs: number of logits, C.
        width: of the tokens.
        layers, heads: of the transformer.
        dropout: in it.
        resolver: the rule of the block; None adds the gradients.

    Example:
        >>> features = {"image": torch.randn(8, 4), "sound": torch.randn(8, 3)}
        >>> fusion = MT({"image": 4, "sound": 3}, 10, width=8, layers=2, heads=2, resolver="imtlg")
        >>> fusion.loss(features, torch.ones(8, 2, dtype=torch.bool), torch.randint(10, (8,))).backward()
        >>> fusion.block.stats().names
        ('full', 'image', 'sound')
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        outputs: int,
        width: int = 128,
        layers: int = 4,
        heads: int = 4,
        dropout: float = 0.0,
        resolver: ResolverLike | None = None,
    ) -> None:
        super().__init__()
        self.tokens = nn.ModuleDict({name: nn.Linear(d, width) for name, d in sizes.items()})
        self.kinds = nn.Parameter(0.02 * torch.randn(len(sizes), width))
        self.class_token = nn.Parameter(0.02 * torch.randn(width))
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout, batch_first=True)
        self.trunk = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, outputs)
        self.block = None if resolver is None else Junction(("full", *sizes), resolver)

    def forward(self, features: Features, present: Tensor) -> Tensor:
        return self._logits(self._tokens(features), present, None)

    def loss(self, features: Features, present: Tensor, target: Tensor) -> Tensor:
        tokens, m = self._tokens(features), present.shape[1]
        alone = [present & torch.eye(m, dtype=torch.bool, device=present.device)[i] for i in range(m)]
        params = dict(self.trunk.named_parameters())
        copies = [None] * (m + 1) if self.block is None else self.block(list(params.values()))
        total = tokens.new_zeros(())
        for seen, copy in zip([present, *alone], copies, strict=True):
            own = None if copy is None else dict(zip(params, copy, strict=True))
            total = total + task_loss(self._logits(tokens, seen, own), target, None if seen is present else seen.any(1))
        return total

    def _tokens(self, features: Features) -> Tensor:
        """[B, 1 + m, width], the class token first."""
        each = torch.stack([self.tokens[name](f) for name, f in features.items()], 1) + self.kinds
        return torch.cat([self.class_token.expand(len(each), 1, -1), each], 1)

    def _logits(self, tokens: Tensor, seen: Tensor, params: dict[str, Tensor] | None) -> Tensor:
        hidden = torch.cat([seen.new_zeros(len(seen), 1), ~seen], 1)  # the class token is never hidden
        options = {"src_key_padding_mask": hidden}
        done = self.trunk(tokens, **options) if params is None else functional_call(self.trunk, params, (tokens,), options)
        return self.head(done[:, 0])
