"""Random calls of the operators against the float64 reference: any count, shape, strides, dtype, granularity, mask, missing gradient.

MMFAST_FUZZ=2000 pytest tests/test_fuzz.py tries as many examples of each."""

import copy
import os

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import mmfast as mf
from mmfast import ops, resolvers
from mmfast.backends import library, reference

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
RULES = [
    lambda k: resolvers.Sum(),
    lambda k: resolvers.Mean(),
    lambda k: resolvers.Constant([0.5 + i for i in range(k)]),
    lambda k: resolvers.Random(),
    lambda k: resolvers.PCGrad(),
    lambda k: resolvers.MGDA(),
    lambda k: resolvers.UPGrad(),
    lambda k: resolvers.CAGrad(),
    lambda k: resolvers.ConFIG(),
    lambda k: resolvers.NSGD(),
    lambda k: resolvers.GradVac(),
    lambda k: resolvers.GradNorm(alpha=1.0, update_at=1),
    lambda k: resolvers.PCD(),
    lambda k: resolvers.CRMOGM(resolvers.MGDA()),
    lambda k: resolvers.Compose(resolvers.NSGD(), resolvers.PCGrad()),
    lambda k: resolvers.GradDrop(0.25),
    lambda k: resolvers.TrimmedMean(0 if k < 3 else 1),
]
FUZZ = settings(
    max_examples=int(os.environ.get("MMFAST_FUZZ", "300")), deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


class Call:
    """The arguments of one call; its repr says how they were made, not what they hold."""

    def __init__(self, grads, mask, per, how):
        self.grads, self.mask, self.per, self.how = grads, mask, per, how

    def __repr__(self):
        return f"Call({self.how})"


@st.composite
def calls(draw):
    """Gradients of moderate size, made from a drawn seed; some of them None, zero, strided or masked."""
    k = draw(st.one_of(st.integers(1, 9), st.integers(10, 70)))
    dim = draw(st.integers(1, 3))
    shape = [draw(st.integers(0 if draw(st.booleans()) else 1, 12)) for _ in range(dim - 1)]
    shape.append(draw(st.one_of(st.integers(0, 40), st.sampled_from([511, 513, 1025, 4097]))))
    dtype = draw(st.sampled_from(DTYPES))
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    layout = draw(st.sampled_from(["plain", "permuted", "stepped", "expanded", "offset"]))

    def normal(*size):
        return torch.randn(*size, generator=generator).to(dtype)

    grads = []
    for _ in range(k):
        if layout == "permuted":
            grads.append(normal(*shape[::-1]).permute(*reversed(range(dim))))
        elif layout == "stepped":
            grads.append(normal(*shape, 2)[..., 0])
        elif layout == "expanded":
            grads.append(normal(*[1] * (dim - 1), shape[-1]).expand(shape))
        elif layout == "offset":
            grads.append(normal(torch.Size(shape).numel() + 1)[1:].view(shape))
        else:
            grads.append(normal(*shape))
    if draw(st.booleans()):
        grads[draw(st.integers(0, k - 1))] = torch.zeros(shape, dtype=dtype)
    if k > 1 and draw(st.booleans()):
        grads[draw(st.integers(0, k - 1))] = None
    mask = None
    form = draw(st.sampled_from(["none", "none", "row", "sample"]))
    if form != "none":
        size = (k,) if form == "row" else (shape[0], k)
        mask = torch.rand(size, generator=generator) < 0.75
        for i, g in enumerate(grads):
            if g is not None and form == "row" and not mask[i]:
                grads[i] = torch.full_like(g, torch.nan)  # must never be read
    per = draw(st.sampled_from(["batch", "sample", "batch_sum"]))
    if per == "sample" and shape[0] * k * k > 200_000:
        per = "batch_sum"  # thousands of large problems take the reference many minutes
    absent = [i for i, g in enumerate(grads) if g is None]
    return Call(grads, mask, per, f"{k=}, {shape=}, {dtype=}, {seed=}, {layout=}, mask={form}, {absent=}, {per=}")


@FUZZ
@given(calls(), st.integers(0, len(RULES) - 1), st.booleans())
def test_resolve_agrees_with_float64(call, which, norm):
    """The result is its weights' combination in float64; where the problem is well conditioned, weights and result are the reference's."""
    grads, mask, per = call.grads, call.mask, call.per
    k = len(grads)
    present = [g for g in grads if g is not None]
    missing = tuple(i for i, g in enumerate(grads) if g is None)
    rule = RULES[which](k)
    options = {"per": per, "mask": mask, "preserve_norm": norm}
    twin, third = copy.deepcopy(rule), copy.deepcopy(rule)
    exact = [g.double() for g in present]

    out, info = ops.resolve_info(grads, rule, **options)
    assert out.shape == present[0].shape and out.dtype == present[0].dtype and out.is_contiguous()
    if library.available:  # small calls go another way than the operators, to the same bits
        again, again_info = ops.resolve_info(grads, third, **options, backend="cpu")
        torch.testing.assert_close(again, out, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(again_info, info, rtol=0, atol=0, equal_nan=True)
    eps = torch.finfo(present[0].dtype).eps
    if info is None:
        expected, _ = ops.resolve_info(grads, twin, **options, backend="reference")
        torch.testing.assert_close(out, expected, rtol=8 * eps, atol=8 * eps * k)
        return
    w, G = info[..., :k], info[..., k:].unflatten(-1, (k, k))
    exact_G = reference.gram(exact, missing, mask, per)
    size = exact_G.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    rounding = 1e-5 if present[0].dtype != torch.float64 else 1e-13
    assert ((G - exact_G).abs() <= rounding * size.unsqueeze(-1) * size.unsqueeze(-2)).all()
    combined = reference.combine(exact, missing, mask, w, per)
    reach = reference.combine([g.abs() for g in exact], missing, mask, w.abs(), per)
    assert ((out.double() - combined).abs() <= (2 * eps + rounding) * reach + torch.finfo(present[0].dtype).tiny).all()

    there = G.diagonal(dim1=-2, dim2=-1) != 0
    assert (w[~there] == 0).all()

    other, other_info = ops.resolve_info(grads, twin, **options, backend="reference")
    assert other.shape == out.shape and other.dtype == out.dtype
    norms = torch.where(size > 0, size, 1)
    cosines = exact_G / norms.unsqueeze(-1) / norms.unsqueeze(-2) + torch.diag_embed((size == 0).double())
    doubtful = (cosines.abs() < 1e-4) & ~(torch.eye(k, dtype=torch.bool) | ~there.unsqueeze(-1) | ~there.unsqueeze(-2))
    if bool((torch.linalg.eigvalsh(cosines) < 0.02).any() | doubtful.any()):
        return  # rounding of the Gramian may decide differently here
    torch.testing.assert_close(w, other_info[..., :k], rtol=1e-2, atol=1e-3 * float(w.abs().amax()) if w.numel() else 0)


@FUZZ
@given(calls())
def test_gram_and_combine_agree_with_float64(call):
    grads, per = [g for g in call.grads if g is not None], call.per
    exact = [g.double() for g in grads]
    G, exact_G = mf.gram(grads, per), reference.gram(exact, [], None, per)
    size = exact_G.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    rounding = 1e-5 if grads[0].dtype != torch.float64 else 1e-13
    bad = ~size.isfinite()
    close = (G - exact_G).abs() <= rounding * size.unsqueeze(-1) * size.unsqueeze(-2)
    assert (close | bad.unsqueeze(-1) | bad.unsqueeze(-2)).all()
    w = torch.linspace(-1, 1, G.shape[-1], dtype=torch.float64).expand(G.shape[:-1])
    out = mf.combine(grads, w, per)
    combined, reach = reference.combine(exact, [], None, w, per), reference.combine([g.abs() for g in exact], [], None, w.abs(), per)
    allowed = (2 * torch.finfo(grads[0].dtype).eps + rounding) * reach + torch.finfo(grads[0].dtype).tiny
    assert (((out.double() - combined).abs() <= allowed) | reach.isnan()).all()
