"""ReLU attention with a variance factor, and feed-forward layers as memories (id 94; Shen et al., 2023).

p_ij = relu(s_ij) / (gamma_h sqrt(n_i / 2))        Var(sum_j relu(x_j) v_j) = n / 2 for independent standard normal x and v
"""

import torch
from torch import Tensor

from ...algebra import Input, Learned, RowLocal, Weighted
from ...catalog.registry import register


def root_half_visible(total: Tensor, n: Tensor, gamma: Tensor) -> Tensor:
    return gamma * (n.clamp_min(1) / 2).sqrt()


@register("reluformer")
def reluformer() -> Weighted:
    """The input `gamma` (H,) is learned as exp(g) from 1."""
    inputs = (Input("gamma", "h", default=1.0, layer=Learned(0.0, torch.exp)),)
    return Weighted(normalizer=RowLocal(torch.relu, divide=root_half_visible, inputs=inputs))


def row_mass_loss(weights: Tensor, eps: float = 1e-8) -> Tensor:
    """Mean |log sum_j p_ij| over rows of weights (..., Lq, Lk): 0 when every row sums to one. Empty rows are left out."""
    mass = weights.sum(-1)
    live = mass > eps
    return torch.where(live, torch.where(live, mass, 1.0).log().abs(), 0.0).sum() / live.sum().clamp_min(1)


def entropy_margin_loss(weights: Tensor, margin: float = 0.7, visible: Tensor | None = None) -> Tensor:
    """Mean relu(H(p / sum p) - margin log n) over rows, n the visible keys (None: all); entropy in nats."""
    n = (
        torch.full_like(weights[..., 0], float(weights.shape[-1]))
        if visible is None
        else visible.expand_as(weights).sum(-1).to(weights.dtype)
    )
    p = weights / weights.sum(-1, keepdim=True).clamp_min(1e-8)
    entropy = -torch.special.xlogy(p, p.clamp_min(1e-30)).sum(-1)
    return torch.relu(entropy - margin * n.clamp_min(1).log()).mean()
