"""Synthetic modalities with planted predictive and noisy features: ranks, similarity, collisions and what predicts the label are known."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mmfast.data.table import DataError


@dataclass(frozen=True)
class Source:
    """What one modality holds.

    Attributes:
        width: numbers in its input, d.
        predictive: latent features of its own that the label depends on, r.
        noise: latent features that it does not depend on, q.
        strength: how strongly it depends on them; 0 for a modality that has nothing of its own to say.
        loudness: standard deviation of the noise features beside 1 of the predictive ones.
    """

    width: int
    predictive: int
    noise: int
    strength: float = 1.0
    loudness: float = 1.0


@dataclass(frozen=True)
class Neurons:
    """Planted fusion neurons, each of which reads two latent features; see `Planted.neurons`."""

    weight: Tensor  # float64 [neurons, sum of the widths], columns in the modalities' order
    participation: Tensor  # float64 [neurons]: 2 where the two are of different modalities, else 1
    harmful: Tensor  # bool [neurons]: a predictive feature of one modality beside a noisy one of another


class Planted:
    """Modalities x_i = [c, s_i, loudness n_i] Q_i of independent standard normal latent features, and classes drawn from softmax(A [c, s_1, ..., s_m]).

    c are common to all modalities: what they hold in duplicate. s_i are the predictive features of modality i, n_i its noise. Q_i has orthonormal
        rows, and the columns of A are orthonormal up to
    `sharpness` and strength where there are as many classes. So every diagnostic of `mf.collapse` has a value that is known beforehand; the setting
    is that of Chaudhuri et al., "A closer look at multimodal representation collapse", ICML 2025, who give no data set of this kind.

    Args:
        sources: the modalities, by name.
        common: number of features in c.
        classes: of the label.
        sharpness: 0 for labels that are chance.
        seed: of Q and A; draws have seeds of their own.

    Attributes:
        sources, common, classes: as given.
        rank: dict of numerical ranks of the modalities' inputs, and "fused" for all of them side by side.
        effective_rank: dict of their effective ranks, in the limit of many rows.
        similarity: float64 [m, m], linear centred kernel alignment in that limit.
        predictive, noise: dicts of float64 [., d]: directions of a modality's input, orthonormal, that hold what predicts the label, and what does
            not.
        teacher: float64 [classes, sum of the widths]: the logits are linear in the modalities side by side; where the common features are read, all
            modalities have equal parts.

    Raises:
        DataError: a width too small for its features, or a number that is out of range.

    Example:
        >>> planted = Planted({"image": Source(24, predictive=4, noise=8), "sound": Source(12, predictive=2, noise=4)}, common=2)
        >>> inputs, target = planted.draw(1000, seed=1)
        >>> {name: tuple(x.shape) for name, x in inputs.items()}, planted.rank
        ({'image': (1000, 24), 'sound': (1000, 12)}, {'image': 14, 'sound': 8, 'fused': 20})
        >>> mf.collapse.numerical_rank(inputs["image"])
        tensor(14., dtype=torch.float64)
    """

    def __init__(self, sources: Mapping[str, Source], common: int = 0, classes: int = 10, sharpness: float = 4.0, seed: int = 0) -> None:
        self.sources, self.common, self.classes = dict(sources), common, classes
        _check(self.sources, common, classes)
        generator = torch.Generator().manual_seed(seed)
        self._bases = {name: _orthonormal(common + s.predictive + s.noise, s.width, generator) for name, s in self.sources.items()}
        read = {name: common + s.predictive for name, s in self.sources.items()}
        self.predictive = {name: Q[: read[name]] for name, Q in self._bases.items()}
        self.noise = {name: Q[read[name] :] for name, Q in self._bases.items()}
        strengths = torch.tensor(
            [1.0] * common + [s.strength for s in self.sources.values() for _ in range(s.predictive)], dtype=torch.float64
        )
        p = len(strengths)
        A = _orthonormal(p, classes, generator).T if p <= classes else _orthonormal(classes, p, generator)
        self._logits = sharpness * strengths * A  # [classes, p]
        self.teacher = self._teacher()
        spectra = {name: _spectrum(common, s) for name, s in self.sources.items()}
        whole = [len(self.sources) ** 0.5] * common + [value for name in spectra for value in spectra[name][common:]]
        self.rank = {name: sum(value > 0 for value in values) for name, values in {**spectra, "fused": whole}.items()}
        self.effective_rank = {name: _effective_rank(values) for name, values in {**spectra, "fused": whole}.items()}
        energy = torch.tensor([sum(value**4 for value in values) for values in spectra.values()], dtype=torch.float64)
        self.similarity = (common / energy.outer(energy).sqrt()).fill_diagonal_(1.0)

    def draw(self, rows: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
        """Rows of all modalities, float32 [rows, d_i] by name, and classes, int64 [rows]; on the CPU, the same for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        c = torch.randn(rows, self.common, generator=generator, dtype=torch.float64)
        own, inputs = [], {}
        for name, source in self.sources.items():
            s = torch.randn(rows, source.predictive, generator=generator, dtype=torch.float64)
            n = torch.randn(rows, source.noise, generator=generator, dtype=torch.float64)
            own.append(s)
            inputs[name] = (torch.cat([c, s, source.loudness * n], 1) @ self._bases[name]).float()
        logits = torch.cat([c, *own], 1) @ self._logits.T
        return inputs, torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)

    def neurons(self, count: int, seed: int) -> Neurons:
        """Fusion neurons that each read two latent features with weights of one length, drawn from all modalities' features alike and independently, with replacement.

        Two of different modalities meet with `mf.collapse.collision_probability` of the numbers of features, `common + predictive + noise` of each
        modality.
        """
        generator = torch.Generator().manual_seed(seed)
        sizes = torch.tensor([len(Q) for Q in self._bases.values()])
        owner = torch.arange(len(sizes)).repeat_interleave(sizes)
        noisy = torch.cat([torch.arange(n) >= len(self.predictive[name]) for name, n in zip(self._bases, sizes.tolist(), strict=True)])
        rows = torch.block_diag(*self._bases.values())  # [features, sum of the widths]
        first, second = (torch.randint(len(rows), (count,), generator=generator) for _ in range(2))
        apart = owner[first] != owner[second]
        return Neurons(rows[first] + rows[second], 1 + apart.double(), apart & (noisy[first] != noisy[second]))

    def _teacher(self) -> Tensor:
        blocks, place = [], self.common
        for name, source in self.sources.items():
            own = self._logits[:, place : place + source.predictive]
            blocks.append(torch.cat([self._logits[:, : self.common] / len(self.sources), own], 1) @ self.predictive[name])
            place += source.predictive
        return torch.cat(blocks, 1)


def _check(sources: dict[str, Source], common: int, classes: int) -> None:
    if not sources:
        raise DataError("sources is empty, expected one Source per modality")
    if common < 0 or classes < 2:
        raise DataError(f"common is {common} and classes {classes}, expected at least 0 and 2")
    for name, s in sources.items():
        held = common + s.predictive + s.noise
        if min(s.predictive, s.noise) < 0 or not 1 <= held <= s.width:
            raise DataError(
                f"{name} holds {common} common, {s.predictive} predictive and {s.noise} noisy features, expected 1 to {s.width} in all, its width"
            )
        if not (s.strength >= 0 and s.loudness > 0 and math.isfinite(s.strength + s.loudness)):
            raise DataError(f"{name} has strength {s.strength} and loudness {s.loudness}, expected at least 0, and a positive number")


def _orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Random orthonormal rows, float64, no more of them than columns."""
    return torch.linalg.qr(torch.randn(columns, rows, generator=generator, dtype=torch.float64))[0].T


def _spectrum(common: int, source: Source) -> list[float]:
    """Standard deviations of a modality's latent features, the common ones first."""
    return [1.0] * (common + source.predictive) + [source.loudness] * source.noise


def _effective_rank(values: list[float]) -> float:
    total = math.fsum(values)
    return math.exp(-math.fsum(v / total * math.log(v / total) for v in values))
