"""Who competes: for one case (rule, K, N), the call that each provider would make."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

import mmfast as mf
from benchmarks import naive
from benchmarks.timing import Call
from mmfast.resolvers.solve import precision_of

# The rules that both libraries have, with the parameters that make them the same
RULES: dict[str, Callable[[int], mf.Resolver]] = {
    "UPGrad": lambda k: mf.UPGrad(),
    "MGDA": lambda k: mf.MGDA(),
    "PCGrad": lambda k: mf.PCGrad(),
    "GradVac": lambda k: mf.GradVac(beta=0.5),
    "CAGrad": lambda k: mf.CAGrad(c=0.5),
    "IMTLG": lambda k: mf.IMTLG(),
    "AlignedMTL": lambda k: mf.AlignedMTL(),
    "DualProj": lambda k: mf.DualProj(),
    "ConFIG": lambda k: mf.ConFIG(),
    "GradDrop": lambda k: mf.GradDrop(),
    "NashMTL": lambda k: mf.NashMTL(),
    "TrimmedMean": lambda k: mf.TrimmedMean(1),
    "Mean": lambda k: mf.Mean(),
}
TWELVE = [name for name in RULES if name != "Mean"]  # Mean is no conflict resolution: reported, not counted
MIN_K = {"TrimmedMean": 3}  # one dropped at each end
BLOCK = 65536  # columns taken at a time where a whole copy in float64 would not be wanted

TORCHJD: dict[str, Callable[[object, int], Callable[[Tensor], Tensor]]] = {
    "CAGrad": lambda jd, k: jd.CAGrad(c=0.5),  # type: ignore[attr-defined]
    "NashMTL": lambda jd, k: jd.NashMTL(n_tasks=k),  # type: ignore[attr-defined]
    "TrimmedMean": lambda jd, k: jd.TrimmedMean(trim_number=1),  # type: ignore[attr-defined]
}


class Unavailable(Exception):
    """Why a provider can't take part in a case."""


def jacobian(k: int, n: int, seed: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """K gradients [K, N] as modalities give them: eight shared directions, so that about half of all pairs conflict, and norms over a factor of ten."""
    generator = torch.Generator(device).manual_seed(seed)
    draw = partial(torch.randn, generator=generator, device=device)
    mix = draw(k, 8)
    scale = torch.logspace(-1, 0, k, device=device)[torch.randperm(k, generator=generator, device=device)] / 4
    J = draw(k, n)
    for block in J.split(BLOCK, dim=1):
        block.addmm_(mix, draw(8, block.shape[1])).mul_(scale.unsqueeze(1))
    return J


@dataclass
class Data:
    """The gradients of one (K, N), and what is computed from them once for all rules."""

    k: int
    n: int
    J: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.J = jacobian(self.k, self.n)

    @cached_property
    def grads(self) -> list[Tensor]:
        return list(self.J.unbind(0))

    @cached_property
    def gram64(self) -> Tensor:
        G = torch.zeros(self.k, self.k, dtype=torch.float64)
        for block in self.J.split(BLOCK, dim=1):
            G += block.double() @ block.double().T
        return G


def plain_weights(G: Tensor, rule: mf.Resolver, preserve_norm: bool = False) -> Tensor:
    """The rule's plain-torch form."""
    return mf.weights(G, rule, preserve_norm=preserve_norm, backend="reference")


def _mean(G: Tensor) -> Tensor:
    return torch.ones_like(G[0]) / len(G)


def _imtlg(G: Tensor) -> Tensor:
    w = torch.linalg.pinv(G, hermitian=True) @ G.diagonal().sqrt()
    return w / w.sum()


def _aligned(G: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(G)
    kept = values > values[-1] * len(G) * 2.0**-52
    scale = torch.where(kept, values, torch.inf)
    return vectors * (scale.min() / scale).sqrt() @ vectors.mean(0)


def _config(G: Tensor) -> Tensor:
    norms = G.diagonal().sqrt()
    a = torch.linalg.pinv(G / torch.outer(norms, norms), hermitian=True).sum(1) / norms
    Ga = G @ a
    return Ga.sum() / (a @ Ga) * a


# What fits in a few lines of torch, written as a user would who knows torch well; the other rules take mmfast's plain-torch form
CLOSED_FORM: dict[str, Callable[[Tensor], Tensor]] = {"Mean": _mean, "IMTLG": _imtlg, "AlignedMTL": _aligned, "ConFIG": _config}


def _trimmed_mean(J: Tensor) -> Tensor:
    return J.sort(0).values[1:-1].mean(0)


def _grad_drop(J: Tensor) -> Tensor:
    keep = 0.5 * (1 + J.sum(0) / J.abs().sum(0)) > torch.rand_like(J[0])
    return torch.where(keep, J.clamp(min=0).sum(0), J.clamp(max=0).sum(0))


ON_ELEMENTS: dict[str, Callable[[Tensor], Tensor]] = {"TrimmedMean": _trimmed_mean, "GradDrop": _grad_drop}


def _plain(name: str, k: int) -> Callable[[list[Tensor]], Tensor]:
    """The rule in plain torch: stack, J @ J.T, weights, w @ J."""
    if name in ON_ELEMENTS:
        return lambda grads: ON_ELEMENTS[name](torch.stack(grads))
    rule = RULES[name](k)
    solve = CLOSED_FORM.get(name) or (lambda G: plain_weights(G, rule))

    def resolve(grads: list[Tensor]) -> Tensor:
        J = torch.stack(grads)
        return solve((J @ J.T).double()).to(J.dtype) @ J

    return resolve


def ours(name: str, data: Data) -> Call:
    rule, grads = RULES[name](data.k), data.grads
    return lambda: mf.resolve(grads, rule)


def aggregator_of(name: str, k: int) -> Any:
    """TorchJD's aggregator for a rule of k gradients."""
    try:
        import torchjd.aggregation as jd
    except ImportError as error:
        raise Unavailable("torchjd is not installed") from error
    try:
        return TORCHJD.get(name, lambda jd, k: getattr(jd, name)())(jd, k)
    except ImportError as error:
        raise Unavailable("needs torchjd[full]") from error


def torchjd(name: str, data: Data) -> Call:
    """TorchJD's aggregator on the stacked matrix: stacking is not counted."""
    aggregator, J = aggregator_of(name, data.k), data.J
    return lambda: aggregator(J)


def plain(name: str, data: Data) -> Call:
    resolve, grads = _plain(name, data.k), data.grads
    return lambda: resolve(grads)


def compiled(name: str, data: Data) -> Call:
    """torch.compile of the plain torch. An iterative rule unrolls into a graph that takes minutes to compile: left out."""
    if name not in ON_ELEMENTS and name not in CLOSED_FORM:
        raise Unavailable("iterative rule")
    resolve, grads = torch.compile(_plain(name, data.k), dynamic=False), data.grads
    try:
        resolve(grads)
    except Exception as error:  # a peer that fails is a result, not the end of the run
        raise Unavailable(f"torch.compile: {type(error).__name__}") from error
    return lambda: resolve(grads)


def loops(name: str, data: Data) -> Call:
    """The block as it is usually written (naive.py), norm-preserving rescale included."""
    if name not in naive.RULES:
        raise Unavailable("not among the naive rules")
    rule, grads = naive.RULES[name](data.k), data.grads
    return lambda: naive.resolve(grads, rule)


PROVIDERS: dict[str, Callable[[str, Data], Call]] = {"ours": ours, "torchjd": torchjd, "torch": plain, "compile": compiled, "naive": loops}


def error_of(result: Tensor, expected: Tensor, size: float | None = None) -> float:
    """Distance of the result from the float64 reference, relative to `size` (default: the reference's norm)."""
    return float((result.double() - expected).norm()) / (size or float(expected.norm()))


def gate(name: str, data: Data, result: Callable[[mf.Resolver], Tensor] | None = None, preserve_norm: bool = False) -> tuple[float, bool]:
    """(our error against the float64 reference, whether it is at most twice that of the same-precision torch code).

    Rules that follow the inverse of the Gramian promise their conditions to K times its precision (docs/design.md, Numbers), and get that much more.

    `result` is what is to be timed, as a function of the resolver; mf.resolve if it is not given.
    """
    rule = RULES[name](data.k)
    found = result(copy.deepcopy(rule)) if result else mf.resolve(data.grads, copy.deepcopy(rule))
    if name in ELEMENTWISE:
        if preserve_norm:
            expected = mf.resolve([g.double() for g in data.grads], copy.deepcopy(rule), preserve_norm=True, backend="reference")
        else:
            expected = ELEMENTWISE[name](data.J.double(), found)
        error = error_of(found, expected)
        return error, error <= 2e-6
    w = plain_weights(data.gram64, copy.deepcopy(rule), preserve_norm)
    expected = torch.cat([w @ block.double() for block in data.J.split(BLOCK, dim=1)])
    same = plain_weights((data.J @ data.J.T).double(), copy.deepcopy(rule), preserve_norm).to(data.J.dtype) @ data.J
    summed = float(w.abs() @ data.gram64.diagonal().sqrt())  # rows may cancel: then the result is small, its rounding is not
    error = error_of(found, expected, summed)
    lifted = data.k * precision_of(data.J.dtype) if any(step.lifts for step in rule.chain() or ()) else 0.0
    return error, error <= 2 * error_of(same, expected, summed) + 1e-6 + lifted


def _expected_trimmed_mean(J: Tensor, found: Tensor) -> Tensor:
    return (J.sum(0) - J.amax(0) - J.amin(0)) / (len(J) - 2)


def _expected_grad_drop(J: Tensor, found: Tensor) -> Tensor:
    """The draws are ours alone: every element must be the sum of the positive or of the negative parts, as often as the purities say."""
    positive, negative = J.clamp(min=0).sum(0), J.clamp(max=0).sum(0)
    purity = positive / (positive - negative)
    kept = (found - positive).abs() < (found - negative).abs()
    off, spread = (kept.sum() - purity.sum()).abs(), (purity * (1 - purity)).sum().sqrt()
    tie = found == 0  # a purity that equals its 23-bit draw lets neither through: about one element in 2^24
    expected = torch.where(tie, 0, torch.where(kept, positive, negative))
    return torch.where((off > 5 * spread + 1) | (tie.sum() > 3), torch.nan, expected)


ELEMENTWISE = {"TrimmedMean": _expected_trimmed_mean, "GradDrop": _expected_grad_drop}
