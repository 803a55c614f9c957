"""Made-up records of runs."""

from mmfast.experiments.results import Result
from mmfast.experiments.settings import Settings


def result(rule="none", seed=0, error=0.1, validation=0.0, features=None, step_us=1100.0, versions=None, **changes) -> Result:
    made = Settings(**{"model": "elbo", "data": "Wine", "rule": rule, "seed": seed, "epochs": 2000, "batch": 128, "samples": 1, **changes})
    return Result(made, made.epochs, 7, -1.0, validation or error, error, features or {"a": error}, step_us, 1000.0, versions or {})
