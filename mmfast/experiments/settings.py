"""What one training run is: model, data, rule, seed, and how long."""

import ast
import hashlib
import inspect
import json
import re
from dataclasses import asdict, dataclass
from typing import Any

from mmfast import data
from mmfast.resolvers import Compose, resolver
from mmfast.resolvers.base import Resolver
from mmfast.resolvers.elementwise import ElementwiseRule

MODELS = {"elbo": "VAE", "iwae": "IWAE", "dreg": "DReG", "hivae": "HI-VAE"}
NONE = "none"  # the rule of a run without a block


class SettingsError(ValueError):
    """What cannot be run, for the person who asked for it."""


def name_of(run: Any, *parts: object) -> str:
    """What tells a run for people, and a digest of all its settings, as a file may be called."""
    digest = hashlib.sha256(json.dumps(asdict(run)).encode()).hexdigest()[:8]
    return re.sub(r"[^A-Za-z0-9.+=]+", "-", "-".join(map(str, (*parts, digest))))


@dataclass(frozen=True)
class Settings:
    """One run; made by `settings`, which fills in the paper's numbers."""

    model: str
    data: str
    rule: str
    seed: int
    epochs: int
    batch: int
    samples: int

    @property
    def label(self) -> str:
        """For people."""
        return f"{self.model} {self.data} {self.rule} {self.seed}"

    @property
    def name(self) -> str:
        """Short, unique, and fit for a file."""
        return name_of(self, self.model, self.data, self.rule, self.seed)


def settings(
    model: str,
    data_set: str,
    rule: str = NONE,
    seed: int = 0,
    epochs: int | None = None,
    batch: int | None = None,
    samples: int | None = None,
) -> Settings:
    """Checks a run and fills in what the paper used: 2000 epochs on Wine and 400 elsewhere, batches of 128 (HI-VAE: 1000), 20 samples (ELBO, HI-VAE: 1)."""
    if model not in MODELS:
        raise SettingsError(f"model is {model!r}, expected one of {', '.join(MODELS)}")
    if data_set not in data.SETS:
        raise SettingsError(f"data is {data_set!r}, expected one of {', '.join(data.names())}")
    one = model in ("elbo", "hivae")
    if one and samples not in (None, 1):
        raise SettingsError(f"samples is {samples}, but {model} takes 1")
    found = Settings(
        model,
        data_set,
        canonical(rule),
        seed,
        (2000 if data_set == "Wine" else 400) if epochs is None else epochs,
        (1000 if model == "hivae" else 128) if batch is None else batch,
        (1 if one else 20) if samples is None else samples,
    )
    check_whole(found, seed=0, epochs=1, batch=1, samples=1)
    if found.batch == 1 and model != "hivae":
        raise SettingsError("batch is 1, expected at least 2: the encoder normalises over the batch")
    return found


def check_whole(settings: object, **least: int) -> None:
    """Refuses settings whose numbers of that name are not whole or less than that."""
    for name, lowest in least.items():
        value = getattr(settings, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < lowest:
            raise SettingsError(f"{name} is {value!r}, expected a whole number, {lowest} at least")


def _steps(rule: str) -> list[tuple[str, dict[str, object]]]:
    """(name, arguments) of each step of a rule such as "GradNorm(alpha=1.0)+PCGrad"."""
    try:
        tree = ast.parse(re.sub(r"(?<=[A-Za-z])-(?=[A-Za-z])", "", rule), mode="eval").body  # imtl-g is a name too
        parts = []
        while isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.Add):
            parts.append(tree.right)
            tree = tree.left
        steps: list[tuple[str, dict[str, object]]] = []
        for part in [tree, *reversed(parts)]:
            if isinstance(part, ast.Call) and not part.args:
                steps.append((_name(part.func), {str(k.arg): ast.literal_eval(k.value) for k in part.keywords}))
            else:
                steps.append((_name(part), {}))
        return steps
    except (SyntaxError, ValueError):
        raise SettingsError(f"rule is {rule!r}, expected none or rules such as PCGrad, GradNorm(alpha=1.0) or GradNorm+PCGrad") from None


def _name(node: ast.AST) -> str:
    if isinstance(node, ast.Name):
        return node.id
    raise ValueError


def make_resolver(rule: str) -> Resolver | None:
    """A new resolver of that rule, or None for "none"."""
    if rule.lower() == NONE:
        return None
    try:
        parts = [resolver(name, **arguments) for name, arguments in _steps(rule)]
        found = parts[0] if len(parts) == 1 else Compose(*parts)
    except SettingsError:
        raise
    except (TypeError, ValueError) as error:
        raise SettingsError(f"rule is {rule!r}: {error}") from None
    if isinstance(found, ElementwiseRule):
        raise SettingsError(f"rule is {rule!r}, which needs each gradient's elements; the heads of these models never form them")
    return found


def canonical(rule: str) -> str:
    """The one way to write a rule: its class names, with the arguments that are not the default."""
    if make_resolver(rule) is None:
        return NONE
    steps = []
    for name, arguments in _steps(rule):
        kind = type(resolver(name, **arguments))
        given = []
        for key, value in sorted(arguments.items()):
            default = inspect.signature(kind).parameters[key].default
            if value != default:
                given.append(f"{key}={float(value) if isinstance(default, float) else value!r}")  # type: ignore[arg-type]
        steps.append(kind.__name__ + (f"({', '.join(given)})" if given else ""))
    return "+".join(steps)
