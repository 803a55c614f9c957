"""Fusion of modalities that may be missing: explicit basis reallocation, distillation, and the systems that they are compared with."""

from mmfast.models.fusion.base import Concat, Fusion, FusionModel, Late, feature_sizes, task_loss
from mmfast.models.fusion.cmae import CMAE
from mmfast.models.fusion.ebr import EBR, reverse
from mmfast.models.fusion.grape import Grape
from mmfast.models.fusion.kd import KD
from mmfast.models.fusion.m3care import M3Care
from mmfast.models.fusion.mt import MT
from mmfast.models.fusion.muse import MUSE
from mmfast.models.fusion.shaspec import ShaSpec
from mmfast.models.fusion.smil import SMIL

__all__ = [
    "CMAE",
    "EBR",
    "KD",
    "MT",
    "MUSE",
    "SMIL",
    "Concat",
    "Fusion",
    "FusionModel",
    "Grape",
    "Late",
    "M3Care",
    "ShaSpec",
    "feature_sizes",
    "reverse",
    "task_loss",
]
