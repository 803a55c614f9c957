"""The rules, one file per family, and how to find them by name."""

import difflib
from typing import Any

from mmfast.resolvers.alignment import IMTLG, AlignedMTL, ConFIG
from mmfast.resolvers.bargaining import FairGrad, NashMTL
from mmfast.resolvers.base import Resolver, Rule
from mmfast.resolvers.compose import CRMOGM, Compose
from mmfast.resolvers.cone import PCD, DualProj, UPGrad
from mmfast.resolvers.elementwise import GradDrop, TrimmedMean
from mmfast.resolvers.magnitude import NSGD, GradNorm
from mmfast.resolvers.minnorm import MGDA, CAGrad
from mmfast.resolvers.projection import GradVac, PCGrad
from mmfast.resolvers.robust import Krum
from mmfast.resolvers.simple import Constant, Mean, Random, Sum

__all__ = [
    "CRMOGM",
    "IMTLG",
    "MGDA",
    "NSGD",
    "PCD",
    "AlignedMTL",
    "CAGrad",
    "Compose",
    "ConFIG",
    "Constant",
    "DualProj",
    "FairGrad",
    "GradDrop",
    "GradNorm",
    "GradVac",
    "Krum",
    "Mean",
    "NashMTL",
    "PCGrad",
    "Random",
    "Resolver",
    "Rule",
    "Sum",
    "TrimmedMean",
    "UPGrad",
    "resolver",
]


def _plain(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())


# Compose has no keyword arguments to be made from.
_BY_NAME: dict[str, Any] = {_plain(name): globals()[name] for name in __all__ if name not in ("Compose", "Resolver", "Rule", "resolver")}


def resolver(name: str, **kwargs: Any) -> Resolver:
    """Makes a resolver by its name, with its hyper-parameters as keyword arguments; case, dashes and underscores don't matter.

    >>> mf.resolver("imtl-g")
    IMTLG()
    >>> mf.resolver("cagrad", c=0.4)
    CAGrad(c=0.4, rescale=0)
    """
    rule = _BY_NAME.get(_plain(name))
    if rule is None:
        near = [_BY_NAME[match].__name__ for match in difflib.get_close_matches(_plain(name), _BY_NAME)]
        known = f"did you mean {' or '.join(near)}?" if near else f"expected one of {', '.join(r.__name__ for r in _BY_NAME.values())}"
        raise ValueError(f"there is no resolver {name!r}; {known}")
    return rule(**kwargs)
