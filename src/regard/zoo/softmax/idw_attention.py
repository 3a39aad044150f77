"""Inverse-distance-weighting attention (id 26; McCarter, 2023).

p_ij = (1 / d_ij) / sum_l (1 / d_il),   d_ij = eps + |q_i - k_j|^power
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from regard.algebra import Distance, Weighted
from regard.catalog import get
from regard.catalog.registry import register
from regard.engine.door import attend


@register("idw-attention")
def idw(power: float = 2.0, eps: float = 1e-3, link: str = "log") -> Weighted:
    """link: "log" (the paper's), or its comparisons under softmax: "negative" -d, "gaussian" -d/2, "inverse" 1/d. No scale."""
    return Weighted(score=Distance(power, link, eps))


class IDWClassifier(nn.Module):
    """x (B, dim) -> logits (B, classes): attention of x over `prototypes` keys, whose values are logits.

    link: "log" (inverse distance), "negative", "gaussian", "inverse" or "dot" for the comparisons. power: of the distance.
    """

    def __init__(self, dim: int, prototypes: int, classes: int, *, power: float = 2.0, eps: float = 1e-3, link: str = "log"):
        super().__init__()
        self.power, self.eps, self.link = power, eps, link
        self.keys, self.values = nn.Parameter(torch.randn(prototypes, dim)), nn.Parameter(torch.zeros(prototypes, classes))
        self.mechanism = get("softmax") if link == "dot" else get("idw-attention", power=power, eps=eps, link=link)

    def start_from(self, x: Tensor) -> None:
        """The paper's start: keys ~ N(mean(x), (0.1 std(x))^2), values zero."""
        with torch.no_grad():
            self.keys.normal_().mul_(0.1 * x.std(0)).add_(x.mean(0))
            self.values.zero_()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = x[None, None], self.keys[None, None], self.values[None, None]
        return attend(q, k, v, self.mechanism)[0, 0]

    @torch.no_grad()
    def augment(self, x: Tensor, target: int) -> None:
        """Add one prototype by hand, at x (dim,), such that x is classified as `target`; elsewhere its influence falls as 1/distance."""
        logits = self(x[None])[0]
        inverse = (1 / (self.eps + (x - self.keys).norm(dim=-1) ** self.power)).sum()
        eta = (1 + self.eps * inverse) * (logits.max() - logits[target])  # the new logit leads by (max - logit) / (1 + eps S)
        value = torch.zeros_like(logits)
        value[target] = eta
        self.keys = nn.Parameter(torch.cat((self.keys, x[None])))
        self.values = nn.Parameter(torch.cat((self.values, value[None])))
