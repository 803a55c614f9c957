"""What comes in: gradients in one tensor, rules by name, sparse and complex numbers, changes in place; and what is said of what can't."""

import copy
import warnings

import pytest
import torch
from block_model import ByLength
from torch import nn
from torch.nn import functional as F

import mmfast as mf
from mmfast.models import likelihoods
from mmfast.models.vae import VAE

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore::FutureWarning:torch", "ignore:Sparse CSR:UserWarning")
BACKENDS = ["auto", "cpu", "reference"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("per", ["batch", "sample", "batch_sum"])
@pytest.mark.parametrize("layout", ["contiguous", "strided", "last dimension first"])
def test_a_tensor_is_its_rows(per, backend, layout):
    x = torch.randn(3, 5, 14)[..., ::2] if layout == "strided" else torch.randn(3, 5, 7)
    x = x if layout != "last dimension first" else torch.randn(7, 5, 3).permute(2, 1, 0)
    rows, w = list(x), torch.rand(5, 3) if per == "sample" else torch.rand(3)
    mask = torch.tensor([True, False, True])
    for rule in (mf.MGDA(), mf.TrimmedMean(1), mf.Compose(mf.PCGrad(order="fixed"), mf.Mean()), ByLength()):
        for m in (None, mask):
            ours = mf.resolve(x, rule, per, m, preserve_norm=True, backend=backend)
            assert torch.equal(ours, mf.resolve(rows, rule, per, m, preserve_norm=True, backend=backend))
            assert str(mf.explain(x, rule, per, m, backend=backend)) == str(mf.explain(rows, rule, per, m, backend=backend))
    assert torch.equal(mf.gram(x, per, mask=mask, backend=backend), mf.gram(rows, per, mask=mask, backend=backend))
    assert torch.equal(mf.combine(x, w, per, backend=backend), mf.combine(rows, w, per, backend=backend))
    assert torch.equal(mf.resolve(nn.ParameterList(rows), mf.MGDA(), per), mf.resolve(rows, mf.MGDA(), per))


def test_a_tensor_under_transformations_and_compile():
    x, rule, w = torch.randn(4, 3, 10), mf.MGDA(), torch.rand(3)

    def all_three(x):
        return mf.resolve(x, rule), mf.gram(x), mf.combine(x, w)

    expected = [torch.stack(part) for part in zip(*map(all_three, x), strict=True)]
    for got in (
        torch.func.vmap(all_three)(x),
        [torch.stack(p) for p in zip(*map(torch.compile(all_three, fullgraph=True), x), strict=True)],
    ):
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    "grads, error, message",
    [
        (torch.tensor(1.0), ValueError, r"grads is a tensor without dimensions, expected K gradients: a tensor \[K, ...\] or a list"),
        (torch.ones(4097, 2), ValueError, "grads holds 4097 gradients, expected 1 to 4096"),
        (torch.ones(0, 2), ValueError, "grads holds 0 gradients"),
        ({"a": torch.ones(2)}, TypeError, "grads is a dict, expected K gradients"),
        ((torch.ones(2) for _ in range(2)), TypeError, "grads is a generator"),
        (None, TypeError, "grads is a NoneType"),
        ("ab", TypeError, "grads is a str"),
        (torch.ones(2, 3, dtype=torch.int64), TypeError, r"grads\[0\] is torch.int64"),
        (torch.ones(2, 3, dtype=torch.bool), TypeError, r"grads\[0\] is torch.bool"),
        (torch.ones(2, 3).to(torch.float8_e4m3fn), TypeError, r"grads\[0\] is torch.float8_e4m3fn, expected one of torch.float16"),
        ([torch.ones(3), torch.ones(3, dtype=torch.complex64)], TypeError, r"grads\[1\] is torch.complex64, expected torch.float32"),
        ([torch.ones(3, dtype=torch.complex64), torch.ones(3)], TypeError, r"grads\[1\] is torch.float32, expected torch.complex64"),
        ([torch.ones(3, dtype=torch.complex64), torch.ones(2, dtype=torch.complex64)], ValueError, r"grads\[1\] has shape \(2,\)"),
        ([torch.ones(3), torch.ones(4).to_sparse()], ValueError, r"grads\[1\] has shape \(4,\)"),
        ([torch.ones(3).to_sparse(), torch.ones(3).double()], TypeError, r"grads\[1\] is torch.float64"),
        ([torch.ones(3), torch.ones(3, device="meta")], ValueError, r"grads\[1\] is on meta"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_no_list_of_gradients_is_refused(grads, error, message, backend):
    for call in (
        lambda: mf.resolve(grads, mf.MGDA(), backend=backend),
        lambda: mf.resolve(grads, mf.GradDrop(), backend=backend),
        lambda: mf.gram(grads, backend=backend),
        lambda: mf.combine(grads, torch.ones(2), backend=backend),
        lambda: mf.explain(grads, mf.MGDA(), backend=backend),
    ):
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_nested_tensors_are_refused(layout, backend):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about the prototype
        nested = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)], layout=layout, requires_grad=True)
    for call in (
        lambda: mf.resolve([nested.detach()] * 2, mf.MGDA(), backend=backend),
        lambda: mf.resolve(nested, mf.MGDA(), backend=backend),
        lambda: mf.gram([nested] * 2, backend=backend),
        lambda: mf.combine([nested] * 2, torch.ones(2), backend=backend),
        lambda: mf.fork(nested, 2, mf.MGDA()),
        lambda: mf.ImpartialityBlock([nn.Linear(3, 1)], "mgda")(nested),
        lambda: mf.LinearHeads(3, [1, 2], "mgda")(nested),
    ):
        with pytest.raises(TypeError, match="is a nested tensor, .*to_padded_tensor"):
            call()


def plain(g):
    return None if g is None else torch.view_as_real(g.resolve_conj()) if g.is_complex() else g.to_dense()


UNUSUAL = {
    "sparse": lambda: [torch.randn(4, 6).relu().to_sparse() for _ in range(3)],
    "sparse rows": lambda: [torch.sparse_coo_tensor([[1, 1, 3]], torch.randn(3, 6), (4, 6), check_invariants=True) for _ in range(3)],
    "sparse and dense": lambda: [torch.randn(4, 6), torch.randn(4, 6).relu().to_sparse(), None, torch.randn(4, 6).to_sparse_csr()],
    "sparse half": lambda: [torch.randn(4, 6).half().to_sparse() for _ in range(2)],
    "oneDNN": lambda: [torch.randn(4, 6).to_mkldnn(), torch.randn(4, 6)],
    "complex": lambda: [torch.randn(4, 6, dtype=torch.complex64) for _ in range(3)],
    "complex, one missing": lambda: [None, *torch.randn(2, 4, 6, dtype=torch.complex128).mT.contiguous().mT],
    "conjugated": lambda: [torch.randn(4, 6, dtype=torch.complex64).conj() for _ in range(2)],
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("per", ["batch", "sample", "batch_sum"])
@pytest.mark.parametrize("kind", UNUSUAL)
def test_sparse_as_dense_and_complex_as_pairs(kind, per, backend):
    grads = UNUSUAL[kind]()
    k, there = len(grads), [g for g in grads if g is not None]
    dense = [plain(g) for g in grads]
    is_complex, expected_dtype = there[0].is_complex(), there[0].dtype

    def same(got, wanted):
        assert got.dtype == (expected_dtype if is_complex else wanted.dtype) and got.layout == torch.strided
        assert torch.equal(torch.view_as_real(got) if is_complex else got, wanted)

    for make in (mf.MGDA, lambda: mf.GradVac(), ByLength, lambda: mf.TrimmedMean(0), lambda: mf.CRMOGM("upgrad")):
        ours = make()
        theirs = copy.deepcopy(ours)
        for m in (None, torch.tensor([False] + [True] * (k - 1)), torch.rand(4, k) < 0.7):
            if per != "sample" or not any(step.state_size(k) for step in ours.chain() or ()):
                same(mf.resolve(grads, ours, per, m, backend=backend), mf.resolve(dense, theirs, per, m, backend=backend))
        assert not str(ours.state_dict()).count("grad_fn")
    assert torch.equal(mf.gram(there, per, backend=backend), mf.gram([plain(g) for g in there], per, backend=backend))
    w = torch.rand(4, len(there)) if per == "sample" else torch.rand(len(there))
    same(mf.combine(there, w, per, backend=backend), mf.combine([plain(g) for g in there], w, per, backend=backend))
    mf.explain(grads, mf.MGDA(), per, backend=backend)


def test_complex_problems_keep_the_dimensions_they_have():
    """The pair that stands for a number is no batch."""
    numbers = [torch.tensor(1 + 2j), torch.tensor(3 - 1j)]
    assert mf.resolve(numbers, mf.Sum()) == 4 + 1j
    with pytest.raises(ValueError, match="leading batch dimension"):
        mf.gram(numbers, "sample")
    with pytest.raises(ValueError, match=r"mask has shape \(2, 2\), expected \(2,\)"):
        mf.resolve(numbers, mf.Sum(), mask=torch.ones(2, 2, dtype=torch.bool))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_gradient_flows_back_through_the_operators(backend):
    x = torch.randn(3, 10, requires_grad=True)
    for rule in (mf.MGDA(), mf.GradVac(), mf.TrimmedMean(1), ByLength()):
        for grads in (x, list(x), [g[::2] for g in x]):
            if not isinstance(rule, mf.GradVac) or grads is x:
                assert not mf.resolve(grads, rule, preserve_norm=True, backend=backend).requires_grad
        assert all(not value.requires_grad for value in rule.state_dict().values())
    assert not mf.gram(x, backend=backend).requires_grad
    assert not mf.combine(x, torch.ones(3, requires_grad=True), backend=backend).requires_grad


@pytest.mark.parametrize("dense_too", [False, True])
@pytest.mark.parametrize("per", ["batch", "sample"])
@pytest.mark.parametrize("make", [mf.MGDA, mf.GradDrop, ByLength])
def test_sparse_gradients_of_a_shared_table(make, per, dense_too):
    def through(sparse):
        torch.manual_seed(1)
        table = torch.randn(10, 3, requires_grad=True)
        a, b, c = mf.fork(table, 3, make(), per=per)
        one, two = torch.tensor([1, 2, 2]), torch.tensor([2, 3])
        loss = F.embedding(one, a, sparse=sparse).sum() + F.embedding(two, b, sparse=sparse).square().sum()
        (loss + c.pow(3).sum() if dense_too else loss).backward()
        return table.grad

    assert through(True).layout == torch.strided and torch.equal(through(True), through(False))


@pytest.mark.parametrize("local", [None, [1.0, 2.0]])
@pytest.mark.parametrize("how", ["eager", "compiled", "torch.func"])
def test_complex_block(how, local):
    torch.manual_seed(2)
    branches = [nn.Linear(3, 2, dtype=torch.complex128) for _ in range(2)]
    block = mf.ImpartialityBlock(branches, mf.UPGrad, local=local, preserve_norm=False)
    y = torch.randn(4, 3, dtype=torch.complex128, requires_grad=True)
    beta = local or [1.0, 1.0]
    apart = [
        torch.autograd.grad(b * m(y).abs().square().sum() * (i + 1), y)[0] for i, (b, m) in enumerate(zip(beta, branches, strict=True))
    ]

    def loss(y):
        return sum((i + 1) * out.abs().square().sum() for i, out in enumerate(block(y)))

    if how == "torch.func":
        got = torch.func.grad(loss)(y.detach())
    else:
        (torch.compile(loss, backend="aot_eager", fullgraph=True) if how == "compiled" else loss)(y).backward()
        got = y.grad
    torch.testing.assert_close(got, mf.resolve(apart, mf.UPGrad()))
    with pytest.raises(TypeError, match="y is torch.complex128, .* ImpartialityBlock over complex"):
        mf.LinearHeads(3, [1, 2], mf.MGDA)(y)


G = torch.tensor([[2.0, -1.0], [-1.0, 3.0]])
TAKES_A_RULE = {
    "resolve": lambda rule: mf.resolve(torch.randn(2, 6), rule),
    "resolve, reference": lambda rule: mf.resolve(torch.randn(2, 6), rule, backend="reference"),
    "weights": lambda rule: mf.weights(G, rule),
    "explain": lambda rule: str(mf.explain(torch.randn(2, 6), rule)),
    "fork": lambda rule: mf.fork(torch.randn(6, requires_grad=True), 2, rule)[0],
    "ImpartialityBlock": lambda rule: repr(mf.ImpartialityBlock([nn.Linear(3, 1), nn.Linear(3, 2)], rule)),
    "LinearHeads": lambda rule: repr(mf.LinearHeads(3, [1, 2], rule)),
    "Compose": lambda rule: repr(mf.Compose(mf.Mean, rule)),
    "CRMOGM": lambda rule: repr(mf.CRMOGM(rule)),
}
ONE_CALL = ("resolve", "resolve, reference", "weights", "explain", "fork")  # they make the rule anew each time


@pytest.mark.parametrize("name", TAKES_A_RULE)
def test_names_and_classes_everywhere(name):
    call = TAKES_A_RULE[name]

    def seeded(rule):
        torch.manual_seed(3)
        return call(rule)

    for names in (("mgda", "M-G_DA", mf.MGDA, mf.MGDA()), ("cagrad", mf.CAGrad, mf.CAGrad())):
        first, *others = [seeded(rule) for rule in names]
        for other in others:
            assert torch.equal(first, other) if isinstance(first, torch.Tensor) else first == other
    call(ByLength)
    call("pcgrad")
    for rule, error, message in (
        ("mgad", ValueError, "there is no resolver 'mgad'; did you mean MGDA"),
        ("quux", ValueError, "there is no resolver 'quux'; expected one of .*MGDA.*UPGrad"),
        ("krum", TypeError, r"resolver is the name 'krum', and Krum needs arguments; expected an instance: mf\.Krum\(n_byzantine\)"),
        (
            mf.Constant,
            TypeError,
            r"resolver is the class Constant, and Constant needs arguments; expected an instance: mf\.Constant\(weights\)",
        ),
        (mf.Resolver, TypeError, "resolver is the class Resolver, expected an instance of mmfast.Resolver"),
        (nn.Linear, TypeError, "resolver is the class Linear"),
        (3, TypeError, "resolver is a int"),
        (None, TypeError, "resolver is a NoneType"),
    ):
        with pytest.raises(error, match=message):
            call(rule)
    for rule in ("gradvac", mf.GradVac):
        if name in ONE_CALL:
            with pytest.raises(ValueError, match=r"keeps state from call to call; expected an instance made once, such as mf\.GradVac\(\)"):
                call(rule)
        else:
            call(rule)


def test_resolver_by_name_says_what_it_needs():
    with pytest.raises(TypeError, match=r"TrimmedMean needs arguments; expected an instance: mf\.TrimmedMean\(trim\)"):
        mf.resolver("trimmedmean")
    assert mf.resolver("trimmed-mean", trim=1).trim == 1
    with pytest.raises(ValueError, match="Compose: no resolver was given"):
        mf.resolve(torch.randn(2, 3), "compose")


def test_long_lists_are_not_printed():
    sizes, weights = list(range(1000, 1300)), [1.0] * 299 + [-5.0]
    for call in (
        lambda: mf.LinearHeads(4, sizes, "mgda"),
        lambda: mf.UPGrad(weights),
        lambda: mf.ImpartialityBlock([nn.Linear(2, 1)] * 300, "mgda"),
        lambda: mf.resolve(torch.ones(5000, 4), "mgda"),
        lambda: mf.gram([torch.ones(i) for i in sizes[:250]]),
        lambda: mf.Constant([float("nan")] * 300),
    ):
        with pytest.raises(ValueError) as found:
            call()
        assert len(str(found.value)) < 150, found.value
    with pytest.raises(ValueError, match=r"out_features is \[1000, 1001, 1002, 1003, \.\.\. \(300 in all\)\], expected 1 to 256 sizes"):
        mf.LinearHeads(4, sizes, "mgda")
    with pytest.raises(TypeError, match="out_features is 3.5, expected a list"):
        mf.LinearHeads(4, 3.5, "mgda")


def test_reference_models_take_names():
    joint = likelihoods.Joint([likelihoods.Normal(), likelihoods.Bernoulli()])
    assert isinstance(VAE(joint, 4, 2, ["mgda"]).decoder.heads.resolver, mf.MGDA)


def test_complex_weights_are_refused():
    for grads in ([torch.randn(3)] * 2, [torch.randn(3, dtype=torch.complex64)] * 2):
        with pytest.raises(TypeError, match="w is torch.complex64, expected a floating-point tensor"):
            mf.combine(grads, torch.ones(2, dtype=torch.complex64))


def test_a_rule_of_ones_own_may_have_a_degree():
    class Own(mf.Resolver):
        def __init__(self):
            super().__init__()
            self.degree = 2

    assert mf.CRMOGM(Own()).degree == 2 and mf.CRMOGM("mgda").degree == 0


def test_resolver_takes_a_name():
    with pytest.raises(TypeError, match="name is the class MGDA, expected a str"):
        mf.resolver(mf.MGDA)
