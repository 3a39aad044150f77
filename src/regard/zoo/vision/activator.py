"""Activator: gated linear units where attention stood; tokens meet in the final mean alone (id 185; Abdullah and Jeon, 2024).

unit(x) = W_3 (LN(gelu(W_1 x + b_1)) LN(W_2 x + b_2)) + b_3, one LayerNorm for both factors
block: x <- x + unit(LN x), x <- x + MLP(LN x) with one LayerNorm for both places; or without the MLP
A mixer without any exchange between tokens, and so the control of comparisons of attention.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from regard.catalog.registry import register
from regard.nn.images.patch_net import FeedForward, PatchNet
from regard.nn.parts import takes


@register("activator", kind="module")
class ActivatorUnit(nn.Module):
    """x (B, N, dim) -> the same shape, each token by itself. hidden: None for 2 dim, as the paper's."""

    def __init__(self, dim: int, hidden: int | None = None, eps: float = 1e-5):
        super().__init__()
        self.dim = dim
        hidden = hidden or 2 * dim
        self.gate, self.up, self.down = nn.Linear(dim, hidden), nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.norm = nn.LayerNorm(hidden, eps)

    @takes(x="batch tokens dim")
    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.norm(F.gelu(self.gate(x))) * self.norm(self.up(x)))  # type: ignore[no-any-return]


class ActivatorBlock(nn.Module):
    """x + unit(norm x), then with mlp=True x + MLP(norm x)."""

    def __init__(self, dim: int, hidden: int, dropout: float = 0.0, mlp: bool = True, eps: float = 1e-5):
        super().__init__()
        self.norm, self.unit = nn.LayerNorm(dim, eps), ActivatorUnit(dim, hidden, eps)
        self.mlp = FeedForward(dim, hidden, dropout) if mlp else None

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.unit(self.norm(x))
        return x if self.mlp is None else x + self.mlp(self.norm(x))


class ActivatorViT(PatchNet):
    """Images to logits; defaults of CIFAR-10: patches of 4 x 4, dim 256, hidden 512, 4 blocks, dropout 0.5."""

    def __init__(
        self,
        dim: int = 256,
        hidden: int = 512,
        layers: int = 4,
        dropout: float = 0.5,
        mlp: bool = True,
        *,
        channels: int = 3,
        patch: int = 4,
        classes: int = 10,
    ):
        super().__init__(lambda: ActivatorBlock(dim, hidden, dropout, mlp), dim, layers, channels, patch, classes)
