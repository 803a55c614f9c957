"""weights: from Gramians to the weights of a resolver."""

import torch
from torch import Tensor

from mmfast import contract
from mmfast.backends.choice import choose, functions_of
from mmfast.resolvers.base import Resolver, call_resolver, known_precision
from mmfast.resolvers.chain import bind
from mmfast.resolvers.elementwise import ElementwiseRule
from mmfast.resolvers.names import ResolverLike, instance_of
from mmfast.resolvers.solve import precision_of, present_rows, preserved


def weights(G: Tensor, resolver: ResolverLike, mask: Tensor | None = None, *, preserve_norm: bool = False, backend: str = "auto") -> Tensor:
    """Weights of a resolver for given Gramians.

    Args:
        G: Gramians [..., K, K], any floating dtype; solved in float64, each on its own. The dtype tells how exact the numbers are:
            what could be rounding counts as zero. `gram` gives float64 whatever the gradients are: that of float32 or 16-bit ones belongs
            here as `G.float()`, which is how `resolve` judges it.
        resolver: how conflicts are resolved; see `resolve`.
        mask: bool [K] or [..., K]; False rows are missing: left out of the problem, weight 0. All-zero rows are missing too.
        preserve_norm: scale the weights so that the resolved gradient has the norm of the plain sum.
        backend: as for `gram`.

    Returns:
        float64 [..., K], fresh. A Gramian with a NaN or infinity gives NaN weights. State and random stream of the resolver advance.

    >>> import torch, mmfast as mf
    >>> mf.weights(torch.tensor([[18.0, -22.0], [-22.0, 38.0]]), mf.MGDA())
    tensor([0.6000, 0.4000], dtype=torch.float64)
    """
    contract.check_gramian(G)
    resolver = instance_of(resolver, G.shape[-1])
    if isinstance(resolver, ElementwiseRule):
        resolver(G)  # raises: it needs gradients
    problems, k = G.shape[:-2], G.shape[-1]
    if mask is not None:
        if mask.dtype != torch.bool or mask.shape not in ((k,), (*problems, k)):
            raise ValueError(f"mask is {mask.dtype} {tuple(mask.shape)}, expected torch.bool {(k,)} or {(*problems, k)}")
        mask = mask.contiguous()
    precision = max(known_precision(), precision_of(G.dtype))
    return solve_checked(G.detach().double().contiguous(), resolver, mask, preserve_norm, precision, backend)


def solve_checked(
    G: Tensor, resolver: Resolver, mask: Tensor | None, preserve_norm: bool, precision: float, backend: str = "auto"
) -> Tensor:
    """`weights` for contiguous float64 Gramians of known relative rounding, without its checks."""
    problems, k = G.shape[:-2], G.shape[-1]
    chain = resolver.chain()
    if chain is None:
        resolver.check(k)
        rows = present_rows(G, mask)
        w = call_resolver(resolver, G, rows, precision)
        return preserved(G, rows, w, precision) if preserve_norm else w
    bound = bind(chain, tuple(problems), k, G.device)
    return functions_of(choose(G.device, backend, k), k).weights(G, mask, bound, preserve_norm, precision)
