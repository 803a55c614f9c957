"""Multimodal VAEs with impartial training: MVAE, MMVAE and MoPoE as mixtures over subsets of modalities."""

from mmfast.models.multimodal.modality import Modality
from mmfast.models.multimodal.model import MultimodalVAE

__all__ = ["Modality", "MultimodalVAE"]
