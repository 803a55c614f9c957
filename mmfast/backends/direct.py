"""The CPU kernels on plain tensors past torch's dispatcher (csrc/direct.cpp), which takes longer than small gradients do, most of all with cold caches."""

import ctypes
import sysconfig
from collections.abc import Sequence
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from mmfast.backends import library
from mmfast.resolvers.base import Hold, Resolver, Rule
from mmfast.resolvers.elementwise import GradDrop, TrimmedMean

# Where one of them says yes, the dispatcher must be asked: there are modes (torch.set_default_device is one), a profiler, a trace, a transformation.
OBSERVERS = (
    "_C._len_torch_dispatch_stack",
    "_C._is_torch_function_mode_enabled",
    "autograd._profiler_enabled",
    "_C._get_tracing_state",
    "_C._functorch.peek_interpreter_stack",
)


def load() -> tuple[Any, str | None]:
    """(the module beside the library, None), or (None, why it can't be used)."""
    path = library.PATH.with_name("_direct.abi3.so")
    if not library.available:
        return None, library.missing_reason
    if library.ASKED != "auto":
        return None, f"MMFAST_BACKEND={library.ASKED} asks for the operators"
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        return None, f"{path} needs a Python with a global lock"
    if not path.exists():
        return (
            None,
            f"{path} does not exist, mmfast was built without Python's development files; build it again with: {library.BUILD_LINE}",
        )
    try:
        loader = ExtensionFileLoader("mmfast._direct", str(path))
        spec = spec_from_loader("mmfast._direct", loader)
        assert spec
        module = module_from_spec(spec)
        entry = ctypes.CDLL(str(library.PATH)).mmfast_cpu_entry
        entry.restype = ctypes.c_void_p
        doubles = torch.zeros(0, dtype=torch.float64, device="cpu")
        if type(doubles) is not Tensor:
            raise RuntimeError("mmfast was imported inside a mode that replaces tensors")
        observers = tuple(attrgetter(name)(torch) for name in OBSERVERS)
        module.bind(entry(), Tensor, torch.nn.Parameter, torch.empty_like, doubles.new_empty, torch.is_grad_enabled, observers)
    except Exception as error:  # noqa: BLE001 - another library, or a torch that has changed: the operators serve, and backends() tells why
        return None, f"{path} does not load with torch {torch.__version__}: {error}"
    return module, None


_direct, missing_reason = load()


def resolve(
    grads: Sequence[Tensor | None], resolver: Resolver, preserve_norm: bool, with_info: bool
) -> tuple[Tensor, Tensor | None] | None:
    """(result, info or None) of one problem, as the operators give them, bit for bit; None, with nothing done, where they must be asked.

    It serves contiguous CPU tensors that are no more than that, a rule that is no chain (but for `every`), and calls that none of the OBSERVERS is there to see.
    """
    if _direct is None or torch.compiler.is_compiling() or not _suits(resolver, len(grads)):
        return None
    chain, kind = resolver.chain(), type(resolver)
    if chain is not None:
        problem = _problem(chain)
        if problem is None:
            return None
        with_gram = with_info or preserve_norm or chain[0].needs_gram
        return _direct.resolve(grads, *problem, preserve_norm, with_gram, with_info)
    if preserve_norm or kind not in (GradDrop, TrimmedMean):
        return None
    argument = (resolver.leaks, resolver._buffers["rng"]) if kind is GradDrop else (resolver.trim, None)
    out = _direct.elementwise(grads, *argument)
    return None if out is None else (out, None)


def heads(delta: Tensor, weight: Tensor, head_of: Tensor, k: int, resolver: Resolver, preserve_norm: bool) -> tuple[Tensor, Tensor] | None:
    """(resolved gradient, info) of linear branches as their operator gives them for one problem without a mask; None where it must be asked."""
    if _direct is None or torch.compiler.is_compiling() or not _suits(resolver, k):
        return None
    chain = resolver.chain()
    problem = None if chain is None else _problem(chain)
    if problem is None:
        return None
    found = _direct.heads(delta, weight, head_of, k, *problem, preserve_norm)
    return None if found is None else (delta @ found[0], found[1])


def log_prob(raw: Tensor, x: Tensor, seen: Tensor | None, features: Tensor, w: Tensor, slopes: bool) -> tuple[Tensor, Tensor | None] | None:
    """(log-likelihoods, their derivatives or None) as their operator gives them; None where it must be asked."""
    if _direct is None or torch.compiler.is_compiling():
        return None
    return _direct.log_prob(raw, x, seen, features, w, slopes)


def log_prob_backward(grad: Tensor, slopes: Tensor, features: Tensor) -> Tensor | None:
    """The gradient of the outputs as its operator gives it; None where it must be asked."""
    if _direct is None or torch.compiler.is_compiling():
        return None
    return _direct.log_prob_backward(grad, slopes, features)


def _suits(resolver: Resolver, k: int) -> bool:
    """Whether the resolver serves k gradients; where not, something else may be wrong that is to be told first."""
    try:
        resolver.check(k)
    except ValueError:
        return False
    return True


def _problem(chain: list[Rule]) -> tuple[int | tuple[int, ...], list[float], Tensor | None, Tensor | None] | None:
    """Steps, parameters, state and random stream of one rule, alone or with the step that holds its weights; None where there is more to join."""
    rule = chain[0]
    state, rng = rule._buffers["state"], rule._buffers["rng"]
    if len(chain) == 1:
        return rule.method, rule.params(), state, rng
    hold = chain[1]
    if len(chain) > 2 or not isinstance(hold, Hold) or state is not None:
        return None
    params, more = rule.params(), hold.params()
    return (rule.method, len(params), hold.method, len(more)), params + more, hold._buffers["state"], rng
