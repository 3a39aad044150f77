"""Sinkformer: doubly stochastic attention by Sinkhorn's iterations (id 22; Sander et al., 2021). Not causal.

A = n exp(C + f + g),   f, g by alternately normalising rows and columns; one iteration is softmax
"""

from regard.algebra import Sinkhorn, Weighted
from regard.catalog.registry import register


@register("sinkformer")
def sinkformer(iterations: int = 3, detach_columns: bool = False) -> Weighted:
    """iterations: single normalisations, rows first; 3 or 5 as in the paper, 21 and more to converge."""
    return Weighted(normalizer=Sinkhorn(iterations, detach_columns))
