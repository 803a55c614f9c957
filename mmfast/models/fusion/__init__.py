"""Fusion of modalities that may be missing: explicit basis reallocation, distillation, and the systems that they are compared with."""

from mmfast.models.fusion.base import Concat, Fusion, FusionModel, Late, feature_sizes, task_loss
from mmfast.models.fusion.ebr import EBR, reverse

__all__ = ["EBR", "Concat", "Fusion", "FusionModel", "Late", "feature_sizes", "reverse", "task_loss"]
