"""The rules, one file per family, and how to find them by name."""

from mmfast.resolvers import names
from mmfast.resolvers.alignment import IMTLG, AlignedMTL, ConFIG
from mmfast.resolvers.bargaining import FairGrad, NashMTL
from mmfast.resolvers.base import Resolver, Rule
from mmfast.resolvers.compose import CRMOGM, Compose
from mmfast.resolvers.cone import PCD, DualProj, UPGrad
from mmfast.resolvers.elementwise import GradDrop, TrimmedMean
from mmfast.resolvers.magnitude import DBMTL, NSGD, GradNorm, Unit
from mmfast.resolvers.minnorm import MGDA, CAGrad, MMPareto
from mmfast.resolvers.names import resolver
from mmfast.resolvers.projection import GradVac, PCGrad
from mmfast.resolvers.robust import Krum
from mmfast.resolvers.simple import Constant, Mean, Random, Sum
from mmfast.resolvers.stochastic import MoDo, SDMGrad
from mmfast.resolvers.tracking import EMA, ExcessMTL, MConFIG, MoCo

__all__ = [
    "CRMOGM",
    "DBMTL",
    "EMA",
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
    "ExcessMTL",
    "FairGrad",
    "GradDrop",
    "GradNorm",
    "GradVac",
    "Krum",
    "MConFIG",
    "MMPareto",
    "Mean",
    "MoCo",
    "MoDo",
    "NashMTL",
    "PCGrad",
    "Random",
    "Resolver",
    "Rule",
    "SDMGrad",
    "Sum",
    "TrimmedMean",
    "UPGrad",
    "Unit",
    "resolver",
]

names.register(globals()[name] for name in __all__ if name not in ("Resolver", "Rule", "resolver"))
