"""Rectified linear attention: ReLU weights without normalisation, RMSNorm behind (id 39; Zhang et al., 2021).

p_ij = relu(s_ij),   the layer gives W_o(scale * o / rms(o) * sigmoid(gate * o)) of the merged heads o
"""

import torch

from regard.algebra import Recipe, RowLocal, Weighted
from regard.catalog.registry import register


@register("rela")
def rela(gated: bool = True) -> Weighted:
    """gated: ReLA-g, with the sigmoid gate in the norm; False: ReLA-i, RMSNorm alone."""
    return Weighted(normalizer=RowLocal(torch.relu), recipe=Recipe(merge_norm="gated_rms" if gated else "rms"))
