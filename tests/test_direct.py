"""The way past torch's dispatcher: it gives the operators' bits, and leaves to them whatever is not plain."""

import copy
import functools
import os
import shutil
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch
from rule_table import RULES
from torch.utils._python_dispatch import TorchDispatchMode

import mmfast as mf
from mmfast import ops
from mmfast.backends import cpu, direct, library
from mmfast.ops.heads import heads as linear_heads

pytestmark = pytest.mark.skipif(direct._direct is None, reason=str(direct.missing_reason))
ROOT = str(Path(__file__).parent.parent)
ELEMENTWISE = {"GradDrop": lambda k: mf.GradDrop(0.25), "TrimmedMean": lambda k: mf.TrimmedMean((k - 1) // 2)}
MAKE = {name: row.make for name, row in RULES.items()} | ELEMENTWISE


def gradients(k=3, shape=(5, 7), dtype=torch.float32):
    return [torch.randn(shape).to(dtype) for _ in range(k)]


def served(grads, resolver=None):
    return direct.resolve(grads, resolver or mf.MGDA(), False, True) is not None


def bits(tensor):
    return None if tensor is None else tensor.contiguous().view(torch.uint8).tolist()


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("name", MAKE)
def test_same_bits_as_the_operators(name, norm):
    """Results, weights, Gramian, state and random stream, over several calls, with and without missing rows."""
    lowest = RULES[name].min_k if name in RULES else 1
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        for k in (lowest, lowest + 4, 20):
            here, there = MAKE[name](k), None
            for call in range(3):
                there = there or copy.deepcopy(here)
                grads = gradients(k, dtype=dtype)
                if call == 1 and k > lowest + 1:
                    grads[1] = None
                first_state = call == 0 and any(rule.state_size(k) for rule in here.chain() or ())
                chain = here.chain()
                if not first_state and (len(chain) == 1 if chain else not norm):
                    assert served(grads, copy.deepcopy(here))
                out, info = ops.resolve_info(grads, here, preserve_norm=norm)
                expected, expected_info = ops.resolve_info(grads, there, preserve_norm=norm, backend="cpu")
                assert bits(out) == bits(expected) and out.dtype == dtype and out.stride() == expected.stride()
                assert bits(info) == bits(expected_info)
                for key, value in here.state_dict().items():
                    assert bits(value) == bits(there.state_dict()[key]), key


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("name", RULES)
def test_same_bits_as_the_operator_of_linear_branches(name, norm):
    """Gradient, weights, Gramian, state and random stream, over several calls."""
    k = max(RULES[name].min_k, 3)
    head_of = torch.repeat_interleave(torch.arange(k), torch.arange(k) % 3 + 1)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        weight = torch.nn.Parameter(torch.randn(len(head_of), 9).to(dtype))
        for shape in ((), (7,), (5, 2)):
            here, there = MAKE[name](k), None
            for call in range(3):
                there = there or copy.deepcopy(here)
                delta = torch.randn(*shape, len(head_of)).to(dtype)
                with torch.no_grad():
                    chain = here.chain()
                    if len(chain) == 1 and (call or not chain[0].state_size(k)):
                        assert direct.heads(delta, weight, head_of, k, copy.deepcopy(here), norm) is not None
                    out, info = linear_heads(delta, weight, head_of, here, k, "batch", None, norm)
                    expected = linear_heads(delta, weight, head_of, there, k, "batch", None, norm, backend="cpu")
                assert bits(out) == bits(expected[0]) and bits(info) == bits(expected[1])
                for key, value in here.state_dict().items():
                    assert bits(value) == bits(there.state_dict()[key]), key


def test_linear_branches_that_are_not_plain_are_left_to_their_operator():
    delta, weight, head_of, rule = torch.randn(4, 5), torch.randn(5, 3), torch.tensor([0, 0, 1, 2, 2]), mf.MGDA()
    assert direct.heads(delta, weight, head_of, 3, rule, False) is not None
    recorded = weight.clone().requires_grad_()
    for change in (
        {"delta": delta.half(), "weight": weight.half()},
        {"delta": delta.double()},
        {"delta": delta.T.contiguous().T},
        {"delta": torch._neg_view(delta)},
        {"delta": delta[:0]},
        {"delta": delta[:, :4]},
        {"delta": torch.tensor(1.0)},
        {"weight": weight.to("meta")},
        {"weight": recorded},
        {"weight": weight[:, :0]},
        {"weight": weight.unsqueeze(0)},
        {"head_of": head_of.int()},
        {"head_of": head_of.flip(0)},
        {"head_of": head_of - 1},
        {"head_of": head_of[:4]},
        {"k": 0},
        {"k": 2},
        {"k": 4},
        {"k": 257},
        {"resolver": mf.Compose(mf.NSGD(), mf.PCGrad())},
        {"resolver": mf.GradDrop()},
        {"resolver": mf.Constant([1.0])},
    ):
        arguments = {"delta": delta, "weight": weight, "head_of": head_of, "k": 3, "resolver": rule, "preserve_norm": False} | change
        assert direct.heads(**arguments) is None, change
    with Seen() as seen:
        linear_heads(delta, weight, head_of, rule, 3, "batch", None, False)
    assert "mmfast.heads.default" in seen.names


@pytest.mark.parametrize("shape", [(1,), (), (4097,), (3, 1, 5), (70_000,)])
@pytest.mark.parametrize("k", [1, 2, 17, 64, 256])
def test_any_size(k, shape):
    grads = gradients(k, shape)
    out, _ = direct.resolve(tuple(grads), mf.IMTLG(), False, False)
    assert torch.equal(out, mf.resolve(grads, mf.IMTLG(), backend="cpu"))


@pytest.mark.parametrize("kind", ["poison", "threads"])
def test_poisoned_outputs_and_threads(kind):
    """Every element is written, and the bits do not depend on the number of threads."""
    code = """
import hashlib, torch, mmfast as mf
from mmfast.backends import direct
torch.set_num_threads(THREADS)
torch.manual_seed(0)
digest = hashlib.sha256()
for k in (2, 5, 40):
    grads = [torch.randn(100_003) for _ in range(k)]
    for rule in (mf.MGDA(), mf.Mean(), mf.GradDrop(), mf.TrimmedMean(0)):
        for part in direct.resolve(grads, rule, False, True):
            digest.update(b"" if part is None else part.numpy().tobytes())
print(digest.hexdigest())
"""
    answers = set()
    for threads, poison in ((1, False), (1, True)) if kind == "poison" else ((1, False), (2, False), (4, False)):
        env = {**os.environ, "PYTHONPATH": ROOT} | ({"MMFAST_POISON": "1"} if poison else {})
        run = subprocess.run(
            [sys.executable, "-c", code.replace("THREADS", str(threads))], env=env, capture_output=True, text=True, check=False
        )
        assert run.returncode == 0, run.stderr
        answers.add(run.stdout)
    assert len(answers) == 1


# What is left to the operators, and whether they can do it
LEFT = {
    "no gradient": (list, False),
    "all missing": (lambda: [None, None], False),
    "257 gradients": (lambda: gradients(257, (2,)), True),
    "not tensors": (lambda: [[1.0], [2.0]], False),
    "a generator": (lambda: (g for g in gradients()), False),
    "two shapes": (lambda: [torch.ones(2), torch.ones(3)], False),
    "as many elements": (lambda: [torch.ones(2, 3), torch.ones(3, 2)], False),
    "two numbers of dimensions": (lambda: [torch.ones(2), torch.ones(2, 1)], False),
    "two dtypes": (lambda: [torch.ones(2), torch.ones(2).double()], False),
    "float16 and bfloat16": (lambda: [torch.ones(2).half(), torch.ones(2).bfloat16()], False),
    "integers": (lambda: [torch.ones(2, dtype=torch.int32)] * 2, False),
    "complex": (lambda: [torch.ones(2, dtype=torch.complex64)] * 2, True),
    "sparse": (lambda: [torch.ones(2).to_sparse()] * 2, True),
    "meta": (lambda: [torch.ones(2, device="meta")] * 2, True),
    "two devices": (lambda: [torch.ones(2), torch.ones(2, device="meta")], False),
    "empty": (lambda: gradients(3, (0, 4)), True),
    "strided": (lambda: [g[:, ::2] for g in gradients()], True),
    "expanded": (lambda: [torch.ones(1).expand(4)] * 2, True),
    "permuted": (lambda: [g.T for g in gradients()], True),
    "negated in place of its sign": (lambda: [torch._neg_view(g) for g in gradients()], True),
    "a zero without memory": (lambda: [torch._efficientzerotensor(4), torch.ones(4)], True),
    "parameters": (lambda: [torch.nn.Parameter(g) for g in gradients()], True),
    "to be differentiated": (lambda: [g.requires_grad_() for g in gradients()], True),
}


@pytest.mark.parametrize("kind", LEFT)
def test_what_is_not_plain_is_left_to_the_operators(kind):
    make, possible = LEFT[kind]
    grads = make()
    if not hasattr(grads, "__len__"):
        assert direct._direct.resolve(grads, 0, [], None, None, False, True, True) is None
        return
    rule = mf.MGDA()
    assert direct.resolve(grads, rule, False, True) is None
    assert direct._direct.elementwise(grads, 0, None) is None
    if not possible:
        with pytest.raises((ValueError, TypeError)):
            mf.resolve(grads, rule)
    elif grads[0].device.type == "cpu":
        plain = [(g.detach().to_dense() + 0).contiguous() for g in grads]
        torch.testing.assert_close(mf.resolve(grads, rule).detach(), mf.resolve(plain, rule, backend="reference"))


def test_gradients_without_recording():
    grads = [g.requires_grad_() for g in gradients()]
    with torch.no_grad():
        assert served(grads)


def test_state_and_streams_that_do_not_fit_are_left():
    """Nothing has changed where a call is declined."""
    grads = gradients()
    rule = mf.GradVac()
    assert direct.resolve(grads, rule, False, True) is None and rule.state is None
    mf.resolve(grads, rule)
    assert served(grads, rule)
    for state in (torch.zeros(1, dtype=torch.float64), rule.state.float(), rule.state.unsqueeze(0), rule.state.to("meta")):
        assert direct._direct.resolve(grads, rule.method, rule.params(), state, None, False, True, True) is None
    pcgrad = mf.PCGrad()
    for rng in (pcgrad.rng.int(), pcgrad.rng[:1], pcgrad.rng.to("meta")):
        assert direct._direct.resolve(grads, pcgrad.method, pcgrad.params(), None, rng, False, True, True) is None
    counter = pcgrad.rng.clone()
    assert direct._direct.resolve([*grads, torch.ones(1)], pcgrad.method, pcgrad.params(), None, pcgrad.rng, False, True, True) is None
    assert torch.equal(pcgrad.rng, counter)
    assert direct._direct.resolve(grads, 9999, [], None, None, False, True, True) is None
    assert direct._direct.resolve(grads, rule.method, [], rule.state, None, False, True, True) is None


def test_wrong_arguments_raise():
    grads = gradients()
    for arguments in (
        (),
        (grads, "rule", [], None, None, False, True, True),
        (grads, 0, ["x"], None, None, False, True, True),
        (grads, 0, (), 0, 0, 0, 0, 0),
    ):
        with pytest.raises(TypeError):
            direct._direct.resolve(*arguments)
    for arguments in ((), (grads, "x", None), (grads, "x", mf.GradDrop().rng)):
        with pytest.raises(TypeError):
            direct._direct.elementwise(*arguments)
    for arguments in ((), (grads[0], grads[0], grads[0], "x", 0, [], None, None, False)):
        with pytest.raises(TypeError):
            direct._direct.heads(*arguments)
    with pytest.raises(TypeError):
        direct._direct.bind()


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning", "ignore:.*torch.jit.trace:FutureWarning")
def test_who_watches_operators_sees_them():
    grads = gradients()
    with Seen() as seen:
        mf.resolve(grads, mf.MGDA())
    assert "mmfast.resolve.default" in seen.names
    with torch.profiler.profile(acc_events=True) as profile:
        mf.resolve(grads, mf.MGDA())
        mf.resolve(grads, mf.GradDrop())
    assert {"mmfast::resolve", "mmfast::graddrop"} <= {event.name for event in profile.events()}
    with torch.device("cpu"):
        assert not served(grads)
    traced = torch.jit.trace(lambda a, b: mf.resolve([a, b], mf.Mean()), (grads[0], grads[1]), check_trace=False)
    assert "mmfast::resolve" in str(traced.graph)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = [mode.from_tensor(g) for g in grads]
        assert not served(fake) and isinstance(mf.resolve(fake, mf.MGDA()), torch._subclasses.FakeTensor)
    assert served(grads)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch.func.jvp's own
def test_inside_transformations():
    def doubled(x):
        assert not served([x, x])
        return 2 * x

    torch.func.vmap(doubled)(torch.ones(3, 4))
    torch.func.grad(lambda x: doubled(x).sum())(torch.ones(4))
    grads = gradients(2, (4,))

    def scaled(x, rule):
        return mf.resolve(grads, rule) * x

    one = torch.ones(4)
    for rule in (mf.MGDA(), mf.TrimmedMean(0)):
        expected = mf.resolve(grads, rule)
        assert torch.equal(torch.func.grad(lambda x, rule: scaled(x, rule).sum())(one, rule), expected)
        assert torch.equal(torch.func.jvp(functools.partial(scaled, rule=rule), (one,), (one,))[1], expected)


def test_errors_are_those_of_the_operators():
    """What is wrong with the gradients is told before what the rule has against their number."""
    for grads in ([], [None, None], [torch.ones(2, device="meta"), torch.ones(2)]):
        for rule in (mf.TrimmedMean(1), mf.Constant([1.0] * 5)):
            said = set()
            for backend in ("auto", "cpu"):
                with pytest.raises(ValueError) as error:
                    mf.resolve(grads, rule, backend=backend)
                said.add(str(error.value))
            assert len(said) == 1
    rule = mf.TrimmedMean(0)
    rule.trim = -1
    with pytest.raises(RuntimeError, match="trim must not be negative"):
        mf.resolve(gradients(), rule)


def test_a_rule_of_ones_own_is_asked():
    class Tripled(mf.TrimmedMean):
        def through(self, functions, grads, missing, mask):
            return 3 * super().through(functions, grads, missing, mask)

    grads = gradients()
    assert torch.equal(mf.resolve(grads, Tripled(1)), 3 * mf.resolve(grads, mf.TrimmedMean(1)))


def test_a_compiled_function_calls_the_operator():
    grads, rule = gradients(), mf.MGDA()
    found = torch.compile(lambda *g: mf.resolve(g, rule), backend="aot_eager", fullgraph=True)(*grads)
    assert bits(found) == bits(mf.resolve(grads, rule))


def test_imported_inside_a_mode():
    """There is no plain tensor to be had then, and the operators serve."""
    code = """
import torch
with torch._subclasses.FakeTensorMode():
    import mmfast as mf
    from mmfast.backends import direct
print(direct.missing_reason)
print(mf.resolve([torch.tensor([-3.0, 1.0, 1.0]), torch.tensor([5.0, 1.0, 1.0])], mf.MGDA()).tolist())
"""
    run = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": ROOT}, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "imported inside a mode" in run.stdout and run.stdout.endswith("[0.0, 1.0, 1.0]\n")


def test_nothing_leaks():
    grads, rule, drop = gradients(), mf.PCGrad(), mf.GradDrop()
    out, info = direct.resolve(grads, rule, False, True)
    freed = [weakref.ref(out), weakref.ref(info), weakref.ref(direct.resolve(grads, drop, False, False)[0])]
    del out, info
    assert [ref() for ref in freed] == [None] * 3
    objects = [*grads, grads, rule.rng, drop.rng, torch.empty_like]

    def counts():
        return [sys.getrefcount(x) for x in objects]

    before, none = counts(), sys.getrefcount(None)
    for _ in range(1000):
        direct.resolve(grads, rule, False, True)
        direct.resolve(grads, drop, False, False)
        direct.resolve([*grads, None], rule, False, False)
        direct.resolve([*grads, torch.ones(1)], rule, False, False)  # declined
    assert counts() == before
    assert abs(sys.getrefcount(None) - none) < 100


def test_other_threads_go_on():
    """The kernels run without Python's lock."""
    grads = gradients(2, (1 << 24,))
    stamps, stop = [], threading.Event()

    def watch():
        while not stop.is_set():
            stamps.append(time.perf_counter())
            time.sleep(0.0005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for _ in range(50):
            start = time.perf_counter()
            assert served(grads)
            took = time.perf_counter() - start
            if any(start + took / 4 < t < start + took * 3 / 4 for t in stamps):
                return
    finally:
        stop.set()
        watcher.join()
    pytest.fail("no other thread ran while gradients of 64 MB were resolved")


def test_without_it_the_operators_serve(tmp_path):
    """A library of its own folder has no _direct beside it; all still works, and the reason is told."""
    shutil.copy(library.PATH, tmp_path / "_C.so")
    code = """
import torch, mmfast as mf
from mmfast.backends import direct
print(direct.missing_reason)
print(mf.backends()["cpu"])
print(mf.resolve([torch.tensor([-3.0, 1.0, 1.0]), torch.tensor([5.0, 1.0, 1.0])], mf.MGDA()).tolist())
"""
    env = {**os.environ, "PYTHONPATH": ROOT, "MMFAST_LIBRARY": str(tmp_path / "_C.so")}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    reason, backend, result = run.stdout.splitlines()
    assert str(tmp_path / "_direct.abi3.so") in reason and library.BUILD_LINE in reason
    assert reason in backend
    assert result == "[0.0, 1.0, 1.0]"
    assert mf.backends()["cpu"] == (True, f"compiled, {cpu.isa()}")
