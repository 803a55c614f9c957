"""Temporary."""
import torch
from mmfast import ops
import mmfast.ops.reference


def resolve_info(grads, resolver, *, k, missing=(), per="batch", mask=None, preserve_norm=False):
    it = iter(grads)
    full = [torch.zeros_like(grads[0]) if i in missing else next(it) for i in range(k)]
    J = torch.stack(full)
    if per == "batch":
        R = J.reshape(k, -1).double()
        G = R @ R.mT
    elif per == "batch_sum":
        R = J.sum(1).reshape(k, -1).double()
        G = R @ R.mT
    else:
        R = J.reshape(k, J.shape[1], -1).double().transpose(0, 1)
        G = R @ R.mT
    if not hasattr(resolver, "chain"):
        d = G.diagonal(dim1=-2, dim2=-1)
        active = d != 0 if mask is None else mask & (d != 0)
        w = torch.where(active, resolver(G, mask), 0)
        if preserve_norm:
            w = w * ops.reference._norm_factor(G.reshape(-1, k, k), active.reshape(-1, k), w.reshape(-1, k)).view(*w.shape[:-1], 1)
    else:
        w = ops.weights(G, resolver, mask, preserve_norm=preserve_norm, backend="auto" if hasattr(resolver, "method") else "reference")
    ww = (w.T.reshape(k, -1, *[1] * (J.dim() - 2)) if per == "sample" else w.reshape(k, *[1] * (J.dim() - 1))).to(J.dtype)
    out = (J * ww).sum(0)
    return out, torch.cat([w, G.flatten(-2)], -1)
