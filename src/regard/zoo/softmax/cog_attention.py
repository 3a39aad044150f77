"""Cog attention: negative weights (id 15; Lv et al., 2024).

p_ij = sign(s_ij) exp|s_ij| / sum_j exp|s_ij|        sum_j |p_ij| = 1 (a score of exactly 0 weighs 0 but counts in the sum)

Not built: image diffusion blocks, statistics of OV circuits.
"""

import torch
from torch import Tensor

from regard.algebra import RowLocal, Weighted
from regard.catalog.registry import register


def signed(s: Tensor, c: Tensor) -> Tensor:
    return torch.sign(s) * torch.exp(torch.abs(s) - c)


def strength(s: Tensor, c: Tensor) -> Tensor:
    return torch.exp(torch.abs(s) - c)


@register("cog-attention")
def cog() -> Weighted:
    """The paper keeps plain softmax in the first and last layer: `Decoder(["softmax", *["cog-attention"] * n, "softmax"], layers=n + 2)`."""
    return Weighted(normalizer=RowLocal(signed, strength, shift="maxabs"))
