"""RALA: tokens enter the state weighted by their relevance to the mean query, which raises its rank (id 41; Fan et al., 2024).

alpha_j = N softmax_j(s mean_i phi(q_i).phi(k_j)),   o_i = phi(q_i) (mean_j alpha_j phi(k_j) v_j^T) / (phi(q_i).mean_j alpha_j phi(k_j) + eps)
"""

import torch
from torch import Tensor

from regard.algebra import JointMap, Recipe, Recurrent, bind, elu_plus_one
from regard.algebra.position import grid_rotary
from regard.algebra.readouts import mean_divided
from regard.catalog.registry import register


def relevant(q: Tensor, k: Tensor, n: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
    q, k = elu_plus_one(q), elu_plus_one(k)
    mean = q.mean(-2, keepdim=True)
    if real is not None and q.shape[-2] == k.shape[-2]:
        mean = torch.where(real, q, 0.0).sum(-2, keepdim=True) / n
    score = (k * mean).sum(-1, keepdim=True) * q.shape[-1] ** -0.5
    score = score if real is None else score.masked_fill(~real, -1e30)  # finite: a row of padding alone stays a number
    return q, n * torch.softmax(score, -2) * k


@register("rala")
def rala(grid_width: int | None = None, eps: float = 1e-6) -> Recurrent:
    """grid_width: as of "mala". Both directions only: every key's weight reads all queries. The paper's block with its output gate:
    `regard.nn.GridAttention`."""
    return Recurrent(
        JointMap(relevant),
        readout=bind(mean_divided, eps=eps),
        turn=None if grid_width is None else bind(grid_rotary, width=grid_width),
        scaled=False,
        recipe=Recipe(rope=False),
    )
