"""The gradients of four losses at the parameters of a ResNet-18, as lists of its 62 tensors: `mf.resolve` and TorchJD's `jac_to_grad`."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import mmfast as mf
from benchmarks.providers import RULES, Data, Unavailable, aggregator_of
from benchmarks.timing import Call

K = 4
STAGES = (64, 128, 256, 512)  # channels of the four stages, two blocks of two 3 x 3 convolutions each


def resnet18(classes: int = 1000) -> Iterator[tuple[int, ...]]:
    """Shapes of its parameters, in order (He et al., "Deep residual learning for image recognition", CVPR 2016)."""
    yield from [(64, 3, 7, 7), (64,), (64,)]
    before = 64
    for stage, width in enumerate(STAGES):
        for block in range(2):
            yield from [(width, before, 3, 3), (width,), (width,), (width, width, 3, 3), (width,), (width,)]
            if stage and not block:  # the projection on the way past it
                yield from [(width, before, 1, 1), (width,), (width,)]
            before = width
    yield from [(classes, STAGES[-1]), (classes,)]


class Lists(Data):
    """Gradients as `providers.Data` makes them, cut into the parameters' shapes: Jacobians [K, *shape] for TorchJD, whose rows are ours."""

    def __init__(self, shapes: list[tuple[int, ...]], k: int = K) -> None:
        sizes = [torch.Size(shape).numel() for shape in shapes]
        super().__init__(k, sum(sizes))
        self.params = [torch.zeros(shape, requires_grad=True) for shape in shapes]
        self.jacobians = [part.reshape(k, *shape).contiguous() for part, shape in zip(self.J.split(sizes, 1), shapes, strict=True)]
        self.lists = [[jacobian[i] for jacobian in self.jacobians] for i in range(k)]

    def resolve(self, rule: mf.Resolver) -> Tensor:
        """The result as one vector, for the gate."""
        return torch.cat([d.flatten() for d in mf.resolve(self.lists, rule)])


def ours(name: str, data: Lists) -> Call:
    rule = RULES[name](data.k)

    def call() -> None:
        for p, gradient in zip(data.params, mf.resolve(data.lists, rule), strict=True):
            p.grad = gradient

    return call


def torchjd(by_sums: bool) -> Callable[[str, Lists], Call]:
    """`jac_to_grad`, which joins the Jacobians to one matrix; or, by_sums, adds up their Gramians."""

    def provider(name: str, data: Lists) -> Call:
        aggregator = aggregator_of(name, data.k)
        from torchjd.aggregation import GramianWeightedAggregator
        from torchjd.autojac import jac_to_grad

        if by_sums and not isinstance(aggregator, GramianWeightedAggregator):
            raise Unavailable("its aggregator needs the matrix")

        def call() -> None:
            for p, jacobian in zip(data.params, data.jacobians, strict=True):
                p.jac, p.grad = jacobian, None  # type: ignore[attr-defined]  # it adds to what is there
            jac_to_grad(data.params, aggregator, optimize_gramian_computation=by_sums)  # type: ignore[call-overload]

        return call

    return provider


PROVIDERS: dict[str, Callable[[str, Lists], Call]] = {"ours": ours, "torchjd": torchjd(False), "torchjd sums": torchjd(True)}
