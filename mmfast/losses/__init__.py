"""One loss from K, where only their values are looked at: nn.Modules in plain torch, losses [K] -> scalar.

They cost nothing beside a training step, and know nothing of conflict; a block resolves that. Both may be used at once.
"""

from mmfast.losses.balanced import DWA, FAMO, GradNorm
from mmfast.losses.fixed import COSMOS, GLS, PBI, STCH, GeometricMean
from mmfast.losses.learned import IMTLL, UW

__all__ = ["COSMOS", "DWA", "FAMO", "GLS", "IMTLL", "PBI", "STCH", "UW", "GeometricMean", "GradNorm"]
