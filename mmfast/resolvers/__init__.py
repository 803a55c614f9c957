"""The rules, one file per family, and how to find them by name."""

import difflib

from mmfast.resolvers.base import Resolver, Rule
from mmfast.resolvers.compose import CRMOGM, Compose
from mmfast.resolvers.elementwise import GradDrop, TrimmedMean
from mmfast.resolvers.magnitude import NSGD, GradNorm
from mmfast.resolvers.projection import GradVac, PCGrad
from mmfast.resolvers.robust import Krum
from mmfast.resolvers.simple import Constant, Mean, Random, Sum

_RULES: list[type[Resolver]] = [
    Constant,
    CRMOGM,
    GradDrop,
    GradNorm,
    GradVac,
    Krum,
    Mean,
    NSGD,
    PCGrad,
    Random,
    Sum,
    TrimmedMean,
]

__all__ = ["Compose", "Resolver", "Rule", "resolver", *(rule.__name__ for rule in _RULES)]


def _plain(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())


def resolver(name: str, **kwargs: object) -> Resolver:
    """Makes a resolver by its name, with its hyper-parameters as keyword arguments; case, dashes and underscores don't matter.

    >>> mf.resolver("imtl-g")
    >>> mf.resolver("cagrad", c=0.4)
    """
    rules = {_plain(rule.__name__): rule for rule in _RULES}
    rule = rules.get(_plain(name))
    if rule is None:
        near = [rules[match].__name__ for match in difflib.get_close_matches(_plain(name), rules)]
        known = f"did you mean {' or '.join(near)}?" if near else f"expected one of {', '.join(rule.__name__ for rule in _RULES)}"
        raise ValueError(f"there is no resolver {name!r}; {known}")
    return rule(**kwargs)
