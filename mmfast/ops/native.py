"""Loads the compiled extension, says why when it can't, and gives its operators their fakes."""

from pathlib import Path

import torch

from mmfast.ops import contract

BUILD_LINE = "MMFAST_BUILD=cpu pip install --no-build-isolation -e ."


def _load() -> str | None:
    """Loads mmfast/_C.so; returns None, or the reason why it is not there."""
    path = Path(__file__).parent.parent / "_C.so"
    if not path.exists():
        return f"mmfast/_C.so was not built; build it with: {BUILD_LINE}"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"mmfast/_C.so does not load with torch {torch.__version__}: {error}; build it again with: {BUILD_LINE}"
    return None


missing_reason = _load()
available = missing_reason is None

if available:
    gram = torch.ops.mmfast.gram.default
    combine = torch.ops.mmfast.combine.default
    weights = torch.ops.mmfast.weights.default
    resolve = torch.ops.mmfast.resolve.default
    graddrop = torch.ops.mmfast.graddrop.default
    trimmed_mean = torch.ops.mmfast.trimmed_mean.default

    def _problems(grads, per):
        contract.check_grads(grads)
        return (grads[0].shape[0],) if per == 1 else ()

    # new_empty, as the kernels do: a permuted input must not hand its strides on
    @torch.library.register_fake("mmfast::gram")
    def _(grads, missing, mask, per):
        k = len(grads) + len(missing)
        return grads[0].new_empty((*_problems(grads, per), k, k), dtype=torch.float64)

    @torch.library.register_fake("mmfast::combine")
    def _(grads, missing, mask, w, per):
        contract.check_grads(grads)
        return grads[0].new_empty(grads[0].shape)

    @torch.library.register_fake("mmfast::weights")
    def _(gram, mask, steps, params, state, rng, preserve_norm):
        return gram.new_empty(gram.shape[:-1]), gram.new_empty((0,) if state is None else state.shape)

    @torch.library.register_fake("mmfast::resolve")
    def _(grads, missing, mask, steps, params, state, rng, per, preserve_norm, with_gram):
        k = len(grads) + len(missing)
        kept = 0 if state is None else state.shape[-1]
        info = grads[0].new_empty((*_problems(grads, per), k + k * k + kept), dtype=torch.float64)
        return grads[0].new_empty(grads[0].shape), info

    @torch.library.register_fake("mmfast::graddrop")
    def _(grads, missing, mask, leak, rng):
        contract.check_grads(grads)
        return grads[0].new_empty(grads[0].shape)

    @torch.library.register_fake("mmfast::trimmed_mean")
    def _(grads, missing, mask, trim):
        contract.check_grads(grads)
        return grads[0].new_empty(grads[0].shape)
