"""Query-key normalization: cosine scores with a learned scale (id 14; Henry et al., 2020).

p_i = softmax_j(g * q_i.k_j / (|q_i| |k_j|)),   g starts at log2(L^2 - L), L = 97.5th percentile of training lengths
"""

import math
from collections.abc import Sequence

import torch

from regard.algebra import Cosine, Weighted
from regard.catalog.registry import register
from regard.errors import RegardError


@register("qknorm")
def qknorm(init: float | None = None, eps: float = 1e-6) -> Weighted:
    """init: the start of the learned `temperature` (one a head; pass (1,) for one a layer); None: log2(L^2 - L) of the call."""
    return Weighted(score=Cosine(eps, init))


def g0_from_lengths(lengths: Sequence[int]) -> float:
    """The paper's initial scale, from the training lengths."""
    if not len(lengths):
        raise RegardError("lengths is empty; expected the lengths of training sequences")
    at = float(torch.quantile(torch.tensor(list(lengths), dtype=torch.float64), 0.975))
    if at < 2:
        raise RegardError(f"the 97.5th percentile of lengths is {at}; expected at least 2")
    return math.log2(at * at - at)
