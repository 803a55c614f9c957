"""Representation collapse measured: whether the modalities of a fused representation share neurons that cannot hold them all.

After Chaudhuri, Dutta, Bui, Georgescu, "A closer look at multimodal representation collapse", ICML 2025. Where the paper names a quantity and not how
to measure it, the docstring says what is measured here. docs/collapse.md: what each number means, what it costs, when to look.
"""

from mmfast.collapse.agop import Agop
from mmfast.collapse.alignment import similarity
from mmfast.collapse.collisions import collision_bound, collision_probability, participation
from mmfast.collapse.rank import effective_rank, numerical_rank
from mmfast.collapse.record import Record, Watch, watch

__all__ = [
    "Agop",
    "Record",
    "Watch",
    "collision_bound",
    "collision_probability",
    "effective_rank",
    "numerical_rank",
    "participation",
    "similarity",
    "watch",
]
