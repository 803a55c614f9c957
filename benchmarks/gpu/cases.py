"""What is timed: the operators by the CUDA kernels and by Triton, the same by others, a training step."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

import mmfast as mf
from benchmarks import tabular
from benchmarks.gpu.device import Device, Make
from benchmarks.providers import jacobian
from benchmarks.timing import Call
from mmfast import ops
from mmfast.backends import choice


class Problem:
    """K gradients of N numbers on the device."""

    def __init__(self, device: Device, k: int, n: int, dtype: torch.dtype) -> None:
        self.device, self.k, self.n, self.dtype = device, k, n, dtype
        self.J = jacobian(k, n, device=device.device).to(dtype)
        self.grads = list(self.J.unbind(0))
        size = self.J.element_size()
        self.read, self.written = k * n * size, n * size

    def error(self) -> float:
        """Of the Gramian against float64, relative to the lengths of its rows: what is wrong is not timed."""
        G = ops.gram(self.grads, backend=self.device.backend)
        exact = self.J.double()
        exact = exact @ exact.T
        norms = exact.diagonal().sqrt()
        return float(((G - exact) / norms.outer(norms)).abs().max())


RULES: dict[str, type[mf.Resolver]] = {rule.__name__: rule for rule in (mf.MGDA, mf.UPGrad, mf.PCGrad, mf.CAGrad, mf.IMTLG)}


def resolve(p: Problem, rule: mf.Resolver, backend: str = "") -> Call:
    return partial(mf.resolve, p.grads, rule, backend=backend or p.device.backend)


def forced(p: Problem, rule: mf.Resolver, path: str, overlap: bool = True) -> Call:
    """By one path, whatever the plan; a path that cannot serve the problem raises."""

    def call() -> Tensor:
        os.environ["MMFAST_CUDA_PATH"], os.environ["MMFAST_CUDA_OVERLAP"] = path, str(int(overlap))
        try:
            return mf.resolve(p.grads, rule, backend=p.device.backend)
        finally:
            del os.environ["MMFAST_CUDA_PATH"], os.environ["MMFAST_CUDA_OVERLAP"]

    return call


def ours(p: Problem) -> dict[str, Make]:
    return {name: partial(resolve, p, rule().to(p.device.device)) for name, rule in RULES.items()}


def plain(p: Problem) -> dict[str, Make]:
    return {f"{name}, plain torch": partial(resolve, p, rule().to(p.device.device), "reference") for name, rule in RULES.items()}


def passes(p: Problem) -> dict[str, tuple[Make, int]]:
    """The two halves of a resolve, with the bytes they must move."""
    w = torch.rand(p.k, dtype=torch.float64, device=p.device.device)
    gram, combine = partial(ops.gram, p.grads, backend=p.device.backend), partial(ops.combine, p.grads, w, backend=p.device.backend)
    return {"gram": (lambda: gram, p.read), "combine": (lambda: combine, p.read + p.written)}


def two_passes(J: Tensor) -> Tensor:
    """A Gramian and a weighted sum without a solver between them: less than any rule needs."""
    return torch.rsqrt((J @ J.T).diagonal()) @ J


def _torchjd(p: Problem, name: str) -> Call:
    from torchjd import aggregation

    return partial(getattr(aggregation, name)(), p.J.float())


def _compiled(p: Problem) -> Call:
    return partial(torch.compile(two_passes, dynamic=False), p.J)


def rivals(p: Problem) -> dict[str, Make]:
    """The same by others: the rule, a comma, who. TorchJD takes J already stacked."""
    found: dict[str, Make] = {f"{name}, TorchJD": partial(_torchjd, p, name) for name in ("MGDA", "UPGrad", "PCGrad", "IMTLG")}
    found["two passes, torch.compile"] = partial(_compiled, p)
    if choice.backends()["triton"][0]:
        found["MGDA, Triton"] = partial(resolve, p, mf.MGDA(), "triton")
    return found


@contextmanager
def auto_takes(backend: str) -> Iterator[None]:
    """Lets "auto" serve tensors on a GPU by a backend that has not proved itself there."""
    chosen = choice.choose
    modules = [module for name, module in sys.modules.items() if name.startswith("mmfast.") and getattr(module, "choose", None) is chosen]

    def choose(device: torch.device, asked: str, *rest: object) -> str:
        return backend if asked == "auto" else chosen(device, asked, *rest)  # type: ignore[arg-type]

    for module in modules:
        module.choose = choose  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for module in modules:
            module.choose = chosen  # type: ignore[attr-defined]


def training_steps(device: Device, k: int) -> dict[str, Call]:
    """A step of a tabular VAE with K heads: LinearHeads, and one plain layer without a block."""
    with torch.device(device.device):
        found = tabular.steps(k, 1, lambda _: mf.MGDA(), "")
    return {"plain layer": found["fused"], "LinearHeads": found["ours"]}
