"""What torch.func, torch.compile and torch.export make of a block: a resolved gradient hides from differentiation, for it has none."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

# no torch.func.grad over a function of autograd is traced before torch 2.11; where the graph breaks inside jacrev(grad), torch gives zeros before 2.12
GRAD_IN_A_GRAPH = TorchVersion(torch.__version__) >= "2.11"
BREAKS_INSIDE_GRAD = TorchVersion(torch.__version__) >= "2.12"


def active() -> bool:
    """Whether a transformation of torch.func is on its way; torch.compile looks at these itself."""
    return torch._C._are_functorch_transforms_active() and not torch.compiler.is_compiling()


def alone() -> bool:
    """Whether neither torch.compile nor torch.export nor a transformation of torch.func is at work: one question in place of several."""
    return not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or exporting())


def exporting() -> bool:
    """Whether torch.export is at work; torch.compiler.is_exporting() says so under torch.compile, too, before torch 2.13."""
    return getattr(torch.compiler, "_is_exporting_flag", False)


def _around() -> tuple[str, ...]:
    """The transformations of torch.func that are on their way, the outermost first."""
    return tuple(level.key().name for level in torch._C._functorch.get_interpreter_stack() or ())


# torch.compile asks once, as it guards the answer; torch.compiler.assume_constant_result says the same after an import that takes seconds
_around._dynamo_marked_constant = True  # type: ignore[attr-defined]


def differentiating() -> bool:
    """Whether torch.func, or forward mode, differentiates what is computed now."""
    if torch.autograd.forward_ad._current_level >= 0:
        return True
    return (torch.compiler.is_compiling() or active()) and any(level in ("Grad", "Jvp") for level in _around())


def wants_gradient(x: Tensor) -> bool:
    """Whether a gradient may flow back to x; in a traced torch.func.grad no tensor says so that is differentiated itself."""
    return torch.is_grad_enabled() and (x.requires_grad or torch.compiler.is_compiling() and "Grad" in _around())


def tracked(x: Tensor) -> Tensor:
    """x where it wants a gradient, behind an operation where it does not say so: torch.compile leaves a function of autograd out that takes only such tensors."""
    return x.view_as(x) if torch.compiler.is_compiling() and not x.requires_grad else x


def refuse_compiled(y: Tensor, what: str) -> None:
    """Called where a block starts: raises where torch.compile would trace the plain sum of the gradients, or differentiate the resolved one."""
    if not torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    around = _around()
    levels = [level for level in around if level in ("Grad", "Jvp")]
    if levels and not GRAD_IN_A_GRAPH or len(levels) > 1 and not BREAKS_INSIDE_GRAD:
        _end_of_tracing(what, len(levels))
    if len(levels) > 1:
        raise no_second_derivative(what)
    if "Vmap" in around and (y.requires_grad or "Grad" in around or torch._C._functorch.is_batchedtensor(y)):
        raise RuntimeError(
            "a block inside vmap can't be compiled: its gradients would be summed, not resolved; leave the vmap out of torch.compile "
            "(without fullgraph=True the graph breaks here), or call it under torch.no_grad() where no gradient is wanted"
        )


def _end_of_tracing(what: str, levels: int) -> None:
    if levels > 1:
        raise no_second_derivative(what)
    raise RuntimeError(
        f"torch.func differentiates {what} inside torch.compile, which torch {torch.__version__} can't trace; expected torch 2.11 or later, or torch.func "
        "outside of torch.compile"
    )


# called while torch.compile traces: what it raises is no break in the graph
_end_of_tracing._dynamo_marked_constant = True  # type: ignore[attr-defined]


def refuse_group(what: str) -> None:
    """Called where a block with group= starts: raises inside torch.func, which may call it any number of times on each rank."""
    if active() or torch.compiler.is_compiling() and _around():
        raise RuntimeError(
            f"{what} with group= can't be inside a transformation of torch.func; leave group=None there, or transform outside"
        )


def no_second_derivative(what: str) -> RuntimeError:
    return RuntimeError(
        f"the resolved gradient of {what} has no gradient of its own, but this backward pass was asked to be differentiable "
        "(create_graph=True, or a second derivative by torch.func); differentiate once, or leave it out of the part that is differentiated twice"
    )


def plain_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """function.apply without binding defaults, of which there are none: that takes longer than a small resolve. For eager torch alone."""
    return super(torch.autograd.Function, function).apply  # type: ignore[misc,no-any-return]


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """function.apply(*args), where nothing traces or transforms it without binding defaults."""
    return (function.apply if active() or torch.compiler.is_compiling() else plain_apply(function))(*args)


class Opaque(torch.autograd.Function):
    """call(*tensors) out of sight of every transformation but vmap; its derivative, where one is asked for, raises."""

    generate_vmap_rule = True

    @staticmethod
    def forward(call: Callable[..., Tensor], what: str, *tensors: Tensor | None) -> Tensor:  # type: ignore[override]
        return call(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.what = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:  # type: ignore[override]
        raise no_second_derivative(ctx.what)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> None:  # type: ignore[override]
        raise no_second_derivative(ctx.what)
