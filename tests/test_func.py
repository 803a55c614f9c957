"""torch.func, copies and export: vmap is per="sample", a block is differentiated once, an exported model has no trace of it."""

import copy
import pickle

import pytest
import torch
from block_model import B, H, K, Model, gradients, total
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp
from torch.utils._pytree import tree_map

import mmfast as mf
from mmfast.backends import library
from mmfast.ops.heads import heads as linear_heads

# torch.func itself uses what torch calls deprecated
derived = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore::FutureWarning:torch")
MAPPED = [
    mf.MGDA(),
    mf.UPGrad(),
    mf.CAGrad(),
    mf.IMTLG(),
    mf.PCGrad(order="fixed"),
    mf.Mean(),
    mf.Compose(mf.Mean(), mf.MGDA()),
    mf.TrimmedMean(1),
]
KEPT = [mf.PCGrad, mf.Random, mf.GradVac, mf.GradNorm, mf.GradDrop, lambda: mf.Compose(mf.NSGD(), mf.MGDA())]
BACKENDS = [pytest.param("auto", marks=pytest.mark.skipif(not library.available, reason="nothing compiled")), "reference"]
REFUSED = "vmap can't map a rule that keeps state or draws random numbers"
ONCE = "has no gradient of its own"


class Shortest(mf.Resolver):
    def forward(self, G, mask=None):
        squares = torch.where(mask, G.diagonal(dim1=-2, dim2=-1), torch.inf)
        return nn.functional.one_hot(squares.argmin(-1), G.shape[-1]).double()


class Heads(nn.Module):
    """As `Model`, with linear branches in one module."""

    def __init__(self, resolver=None, **kwargs):
        super().__init__()
        self.shared = nn.Linear(4, H, dtype=torch.float64)
        self.block = mf.LinearHeads(H, [2] * K, resolver or mf.MGDA(), **kwargs).double()

    def forward(self, x, mask=None):
        return self.block(self.shared(x).tanh(), mask)


def grads(k=3, shape=(5, 4, 3), dtype=torch.float32):
    return [torch.randn(shape).to(dtype) for _ in range(k)]


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


def loop(f, *args):
    """f for each index of the first dimension."""
    return tree_map(lambda *parts: torch.stack(parts), *(f(*parts) for parts in zip(*args, strict=True)))


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", [*MAPPED, Shortest()], ids=repr)
def test_vmap_is_per_sample(rule, backend, norm):
    g = grads()
    found = torch.vmap(lambda *g: mf.resolve(list(g), rule, preserve_norm=norm, backend=backend))(*g)
    expected = mf.resolve(g, rule, per="sample", preserve_norm=norm, backend=backend)
    if backend == "auto" and not norm:
        assert torch.equal(found, expected)
    else:
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("backend", BACKENDS)
def test_vmap_of_the_parts(backend, dtype):
    g, w = grads(dtype=dtype), torch.rand(5, 3)
    G = torch.vmap(lambda *g: mf.gram(g, backend=backend))(*g)
    torch.testing.assert_close(
        G, mf.gram(g, "sample", backend=backend), rtol=1e-5, atol=1e-6
    )  # plain torch adds batches up in another order
    assert torch.equal(
        torch.vmap(lambda *g: mf.combine(g[:-1], g[-1], backend=backend))(*g, w), mf.combine(g, w, "sample", backend=backend)
    )
    W = torch.vmap(lambda G: mf.weights(G, mf.MGDA(), backend=backend))(G)
    close(W, mf.weights(G, mf.MGDA(), backend=backend))
    assert W.dtype == torch.float64 and G.shape == (5, 3, 3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("per", ["batch", "sample", "batch_sum"])
@pytest.mark.parametrize("rule", [mf.MGDA(), mf.TrimmedMean(1)], ids=repr)
@pytest.mark.parametrize("masked", ["", "rows", "samples"])
def test_vmap_is_a_loop_over_calls(rule, per, backend, masked):
    """Granularity and mask of the mapped call are its own; a hidden NaN stays hidden; one gradient is missing."""
    g = grads(dtype=torch.float64)
    mask = torch.rand((5, 4) if masked == "rows" else (5, 4, 4)) < 0.6
    mask[..., 0] = True
    if masked:
        for i, place in enumerate((0, 2, 3)):
            m = mask[..., place].reshape(5, -1, 1)
            g[i] = torch.where(m, g[i], torch.nan)

    def one(a, b, c, m):
        return mf.resolve([a, None, b, c], rule, per, m if masked else None, backend=backend)

    expected = loop(one, *g, mask)
    assert expected.isfinite().all()
    close(torch.vmap(one)(*g, mask), expected)
    if not isinstance(rule, mf.TrimmedMean):
        G = torch.vmap(lambda *g: mf.gram(g[:3], per, mask=g[3][..., [0, 2, 3]] if masked else None, backend=backend))(*g, mask)
        close(G, loop(lambda *g: mf.gram(g[:3], per, mask=g[3][..., [0, 2, 3]] if masked else None, backend=backend), *g, mask))


def test_vmap_over_other_dimensions():
    a, b, fixed = torch.randn(4, 5, 3), torch.randn(4, 3, 5), torch.randn(4, 3)
    call = lambda a, b, c: mf.resolve([a, b, c], mf.UPGrad())
    found = torch.vmap(call, in_dims=(1, 2, None), out_dims=1)(a, b, fixed)
    expected = mf.resolve([a.movedim(1, 0), b.movedim(2, 0), fixed.expand(5, 4, 3)], mf.UPGrad(), per="sample")
    assert torch.equal(found.movedim(1, 0), expected)
    assert torch.equal(torch.vmap(lambda m: call(fixed, -fixed, fixed * m))(torch.ones(2)), torch.stack([call(fixed, -fixed, fixed)] * 2))


def test_vmap_of_weights_with_masks():
    G, mask = mf.gram(grads(shape=(6, 9), dtype=torch.float64), "sample").view(2, 3, 3, 3), torch.rand(2, 3, 3) < 0.7
    rule = mf.MGDA()
    expected = mf.weights(G, rule, mask)
    close(torch.vmap(lambda G, m: mf.weights(G, rule, m))(G, mask), expected)
    close(torch.vmap(lambda G, m: mf.weights(G, rule, m), in_dims=1, out_dims=1)(G, mask), expected)
    rows = mask[:, 0]
    close(torch.vmap(lambda G, m: mf.weights(G, rule, m))(G, rows), mf.weights(G, rule, rows.unsqueeze(1).expand(2, 3, 3)))
    close(torch.vmap(lambda m: mf.weights(G[0], rule, m))(rows), loop(lambda m: mf.weights(G[0], rule, m), rows))


def test_nested_vmap():
    g = grads(shape=(2, 5, 4, 3))
    call = lambda *g: mf.resolve(list(g), mf.MGDA())
    expected = mf.resolve([x.flatten(0, 1) for x in g], mf.MGDA(), per="sample").view(2, 5, 4, 3)
    assert torch.equal(torch.vmap(torch.vmap(call))(*g), expected)


@pytest.mark.parametrize("per", ["batch", "sample", "batch_sum"])
def test_vmap_over_nothing(per):
    g, w = torch.randn(0, 3, 5, 4), torch.randn(*((0, 5, 3) if per == "sample" else (0, 3)))
    infos = (0, 5) if per == "sample" else (0,)
    assert torch.vmap(lambda g: mf.gram(list(g), per))(g).shape == (*infos, 3, 3)
    assert torch.vmap(lambda g, w: mf.combine(list(g), w, per))(g, w).shape == (0, 5, 4)
    for rule in (mf.MGDA(), mf.TrimmedMean(1)):
        assert torch.vmap(lambda g, rule=rule: mf.resolve(list(g), rule, per))(g).shape == (0, 5, 4)
    head_of = torch.tensor([0, 0, 1, 2])
    for weight in (torch.randn(4, 7), torch.randn(0, 4, 7)):
        call = lambda d, W: linear_heads(d, W, head_of, mf.MGDA(), 3, per, None, True)
        out, info = torch.vmap(call, (0, None if weight.dim() == 2 else 0))(torch.randn(0, 5, 4), weight)
        assert out.shape == (0, 5, 7) and info.shape == (*infos, 12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("make", KEPT)
def test_vmap_of_a_rule_that_keeps_something_is_refused(make, backend):
    rule = make()
    g = grads()
    with pytest.raises(RuntimeError, match=REFUSED):
        torch.vmap(lambda *g: mf.resolve(list(g), rule, backend=backend))(*g)
    assert all(b is None or not b.is_floating_point() or (b == 0).all() for b in rule.buffers())  # nothing has advanced
    assert all(r[1] == 0 for name, r in rule.named_buffers() if name.endswith("rng"))


MODELS = [lambda **k: Model(mf.MGDA(), **k), lambda **k: Heads(**k)]


def loss(model, params, x):
    return total(functional_call(model, params, (x,)))


@pytest.mark.parametrize("make", MODELS, ids=["block", "heads"])
@pytest.mark.parametrize("local", [None, [1.0, 2.0, 3.0]])
def test_func_grad_equals_backward(make, local):
    model, x = make(local=local), torch.randn(B, 4, dtype=torch.float64)
    expected, stats = gradients(model, x), model.block.stats()
    params = dict(model.named_parameters())
    found = grad(loss, argnums=1)(model, params, x)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert torch.equal(model.block.stats().gram, stats.gram)
    outputs, pull = vjp(lambda p: functional_call(model, p, (x,)), params)
    (again,) = pull(grad(total)(outputs))
    assert all(torch.equal(again[name], expected[name]) for name in expected)


@pytest.mark.parametrize("rule", [mf.PCGrad, mf.GradVac, mf.GradNorm])
@pytest.mark.parametrize("make", [Model, Heads])
def test_state_and_random_stream_advance_under_func_grad(make, rule):
    model, x = make(rule()), torch.randn(B, 4, dtype=torch.float64)
    twin = copy.deepcopy(model)
    for scale in (1.0, -2.0, 0.5):
        expected = gradients(twin, scale * x)
        found = grad(loss, argnums=1)(model, dict(model.named_parameters()), scale * x)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(torch.equal(a, b) for a, b in zip(model.block.resolver.buffers(), twin.block.resolver.buffers(), strict=True))


@pytest.mark.parametrize("make", MODELS, ids=["block", "heads"])
def test_gradients_of_each_sample(make):
    """vmap(grad) gives each sample the gradient of a training step on it alone."""
    model, x = make(local=[1.0, 2.0, 3.0]), torch.randn(B, 4, dtype=torch.float64)
    params = dict(model.named_parameters())
    one = lambda x: grad(loss, argnums=1)(model, params, x.unsqueeze(0))
    expected = loop(one, x)
    found = torch.vmap(one)(x)
    for name in params:
        close(found[name], expected[name])
    assert model.block.stats().weights.shape == (B, K)
    model.zero_grad()
    torch.vmap(lambda x: loss(model, params, x.unsqueeze(0)))(x).sum().backward()
    for name, p in params.items():
        close(p.grad, expected[name].sum(0))


@pytest.mark.parametrize("make", MODELS, ids=["block", "heads"])
@pytest.mark.parametrize("per", ["batch", "sample", "batch_sum"])
def test_ensembles(make, per):
    models, x = [make(per=per) for _ in range(3)], torch.randn(B, 4, dtype=torch.float64)
    params, buffers = stack_module_state(models)
    one = lambda p, b: total(functional_call(models[0], (p, b), (x,)))
    found = torch.vmap(grad(one))({name: p.detach() for name, p in params.items()}, buffers)
    for i, model in enumerate(models):
        for name, expected in gradients(model, x).items():
            close(found[name][i], expected)


@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize("per", ["batch", "sample", "batch_sum"])
@pytest.mark.parametrize("make", [Model, Heads], ids=["block", "heads"])
def test_masks_of_mapped_models(make, per, rows):
    """A mask of each problem, or one for all; samples may have further dimensions."""
    model = make(mf.UPGrad(), per=per, local=[1.0, 2.0, 3.0])
    params = dict(model.named_parameters())
    one = lambda x, m: grad(lambda p: total(functional_call(model, p, (x, m))))(params)["shared.weight"]
    for x in (torch.randn(4, B, 4, dtype=torch.float64), torch.randn(4, B, 2, 4, dtype=torch.float64)):
        mask = torch.rand((4, K) if rows else (4, B, K)) < 0.6
        close(torch.vmap(one)(x, mask), loop(one, x, mask))
        close(torch.vmap(one, (0, None))(x, mask[0]), loop(lambda x, mask=mask: one(x, mask[0]), x))
        close(torch.vmap(one, (None, 0))(x[0], mask), loop(lambda m, x=x: one(x[0], m), mask))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("per", ["batch", "sample", "batch_sum"])
def test_a_mask_of_mapped_heads_hides_samples(per, backend):
    delta, weight, head_of = (
        torch.randn(2, 3, 5, 4, dtype=torch.float64),
        torch.randn(4, 7, dtype=torch.float64),
        torch.tensor([0, 0, 1, 2]),
    )
    mask = torch.rand(2, 5, 3) < 0.6
    delta = torch.where(mask[..., head_of].unsqueeze(1), delta, torch.nan).movedim(1, 2)  # [2, 5, 3, 4]
    call = lambda d, m: linear_heads(d, weight, head_of, mf.MGDA(), 3, per, m, True, backend)
    for found, expected in zip(torch.vmap(call, (1, 2))(delta.movedim(0, 1), mask.movedim(0, 2)), loop(call, delta, mask), strict=True):
        assert expected.isfinite().all()
        close(found, expected)


@derived
@pytest.mark.parametrize("make", MODELS, ids=["block", "heads"])
def test_forward_mode_passes(make):
    model, x, t = make(local=[1.0, 2.0, 3.0]), *torch.randn(2, B, 4, dtype=torch.float64)
    params = {name: p.detach() for name, p in model.named_parameters()}
    tangents = {name: torch.randn_like(p) for name, p in params.items()}
    _, found = jvp(lambda p, x: torch.cat(functional_call(model, p, (x,)), -1), (params, x), (tangents, t))
    e = 1e-6
    ends = [
        torch.cat(functional_call(model, {name: p + s * tangents[name] for name, p in params.items()}, (x + s * t,)), -1) for s in (e, -e)
    ]
    torch.testing.assert_close(found, ((ends[0] - ends[1]) / (2 * e)).detach(), rtol=1e-7, atol=1e-8)


@derived
@pytest.mark.parametrize("make", MODELS, ids=["block", "heads"])
@pytest.mark.parametrize(
    "twice", [hessian, lambda f: grad(lambda x: grad(f)(x).sum()), lambda f: jacfwd(grad(f)), lambda f: jacrev(jacfwd(f))]
)
def test_second_derivatives_are_refused(make, twice):
    model, x = make(), torch.randn(B, 4, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=ONCE):
        twice(lambda x: total(model(x)))(x)
    with pytest.raises(RuntimeError, match=ONCE):
        grad(lambda x: total(model(x)))(x).sum().backward()


@pytest.mark.parametrize("make", MODELS, ids=["block", "heads"])
def test_missing_branches_and_masks_under_func_grad(make):
    model, x, mask = make(), torch.randn(B, 4, dtype=torch.float64), torch.tensor([True, True, False])
    for used, m in (((0, 2), None), ((0, 1, 2), mask)):
        expected = gradients(model, x, used, lambda x, m=m: model(x, m))
        params = dict(model.named_parameters())
        found = grad(lambda p, used=used, m=m: total(functional_call(model, p, (x, m)), used))(params)
        assert all(torch.equal(found[name], expected.get(name, torch.zeros_like(p))) for name, p in params.items())


@pytest.mark.parametrize("make", MODELS, ids=["block", "heads"])
def test_copies_and_data_parallel(make):
    model, x = make(local=[1.0, 2.0, 3.0]), torch.randn(B, 4, dtype=torch.float64)
    expected = gradients(model, x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), nn.DataParallel(model)):
        found = gradients(other, x)
        assert all(torch.equal(found[name], expected[name.removeprefix("module.")]) for name in found) and found.keys()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning:torch")
@pytest.mark.parametrize("make", [*MODELS, lambda **k: Model(mf.PCGrad(), **k), lambda **k: Heads(mf.GradVac(), **k)])
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("local", [None, [1.0, 2.0, 3.0]])
def test_export_leaves_no_trace_of_the_block(make, local, strict):
    model, x = make(local=local).eval(), torch.randn(B, 4, dtype=torch.float64)
    program = torch.export.export(model, (x,), strict=strict)
    calls = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert calls and not [c for c in calls if "mmfast" in c or "autograd" in c or "set_grad" in c], calls
    assert not [i for i in program.graph_signature.lifted_tensor_constants if "_info" in i]
    assert all(torch.equal(a, b) for a, b in zip(program.module()(x), model(x), strict=True))
