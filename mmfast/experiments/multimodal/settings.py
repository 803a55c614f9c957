"""What one training run of a multimodal VAE is, and the sizes in which the experiment can be run."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mmfast.data import triplets
from mmfast.experiments.settings import NONE, SettingsError, canonical, check_whole, name_of

MODELS = {"mvae": "MVAE", "mmvae": "MMVAE", "mopoe": "MoPoE"}
MIXTURES = {"mvae": "poe", "mmvae": "moe", "mopoe": "mopoe"}
OBJECTIVES = ("elbo", "iwae", "siwae")
RULES = (NONE, "PCGrad", "CAGrad", "IMTLG", "GradNorm")
BLOCKS = ("p", "pq", "pqs")
LATENT = 20


@dataclass(frozen=True)
class Size:
    """How large the experiment is."""

    most: int  # pairs of a digit, see `triplets.pair`; nine tenths of them are trained on
    repeats: int
    test_most: int
    test_repeats: int
    epochs: int
    batch: int
    samples: int  # of z from each component, K
    learning_rate: float
    warm_up: int  # steps over which the learning rate rises to its value
    width: float  # of SVHN's convolutions
    latents: int  # of training triplets whose z the latent classifiers learn from, or all if there are fewer
    likelihood_rows: int  # test triplets whose log-likelihood is estimated, or all if there are fewer
    likelihood_samples: int
    judge_most: int  # training pairs of a digit for the classifiers that judge what is generated
    judge_epochs: int
    probes: int  # looks at the conflict during training


SIZES = {
    # as published: 1,009,224 training, 112,136 validation and 200,000 test triplets of the real set
    "full": Size(10_000, 20, 10_000, 20, 30, 256, 20, 1e-3, 0, 1.0, 200_000, 1000, 1000, 10_000, 30, 100),
    # 9,000 training, 1,000 validation and 2,000 test triplets, 1,686 steps; without warm-up the scales of an expert of a product can collapse in the first ten
    "small": Size(1000, 1, 200, 1, 3, 16, 2, 1e-3, 100, 0.5, 4500, 100, 100, 3000, 8, 20),
    # for tests: 90 training, 10 validation and 20 test triplets
    "tiny": Size(10, 1, 2, 1, 2, 16, 2, 1e-3, 4, 0.25, 50, 4, 6, 10, 1, 3),
}


@dataclass(frozen=True)
class Settings:
    """One run; made by `settings`, which checks them."""

    model: str
    objective: str
    blocks: str  # "" without
    rule: str
    seed: int
    data: str
    size: str
    epochs: int

    @property
    def label(self) -> str:
        """For people."""
        return f"{self.model} {self.objective} {' on '.join(filter(None, (self.rule, self.blocks)))} {self.seed}"

    @property
    def name(self) -> str:
        """Short, unique, and fit for a file."""
        return name_of(self, self.model, self.objective, self.blocks, self.rule, self.seed, self.size)

    @property
    def sizes(self) -> Size:
        return SIZES[self.size]


def settings(
    model: str,
    objective: str,
    rule: str = NONE,
    blocks: str | None = None,
    seed: int = 0,
    data: str | None = None,
    size: str = "small",
    epochs: int | None = None,
) -> Settings:
    """Checks a run and fills in the blocks ("p", or "" without a rule), the data set that is here, and the size's number of epochs."""
    rule = canonical(rule)
    blocks = ("" if rule == NONE else "p") if blocks is None else blocks
    found = Settings(model, objective, blocks, rule, seed, data or triplets.here(), size, 0)
    expected: dict[str, Sequence[str]] = {
        "model": tuple(MODELS),
        "objective": OBJECTIVES,
        "data": triplets.NAMES,
        "size": tuple(SIZES),
        "blocks": ("",) if rule == NONE else BLOCKS,
    }
    for name, known in expected.items():
        if getattr(found, name) not in known:
            raise SettingsError(f"{name} is {getattr(found, name)!r}, expected one of {', '.join(map(repr, known))}")
    found = replace(found, epochs=found.sizes.epochs if epochs is None else epochs)
    check_whole(found, seed=0, epochs=1)
    return found
