"""ViG: gated linear attention in both directions over an image, with a gate of local features (id 177; Liao et al., 2024).

o = (GLA(q, k, v, a_forward) + reversed GLA(q, k, v, a_backward)) / 2,   y = W_o (r RMSNorm(o) + (1 - r) RMSNorm(l)),   l = silu(DWConv(x))
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.catalog import get
from regard.catalog.registry import register
from regard.engine.door import attend
from regard.errors import RegardError
from regard.nn.parts import takes


def both_directions(q: Tensor, k: Tensor, v: Tensor, forward_decay: Tensor, backward_decay: Tensor, scale: float | None = None) -> Tensor:
    """The mean of gated linear attention along the sequence and against it; decays (B, H, L, D) are logs <= 0. Every token counts itself
    in both. q, k (B, H, L, D), v (B, H, L, Dv) -> (B, H, L, Dv).

    Both run as one call: the reversed sequence stands beside the other in the batch.
    """
    b = len(q)
    q, k, v = (torch.cat((x, x.flip(-2))) for x in (q, k, v))
    out = attend(q, k, v, get("gla"), scale=scale, log_decay=torch.cat((forward_decay, backward_decay.flip(-2))))
    return (out[:b] + out[b:].flip(-2)) / 2


@register("vig", kind="module")
class BiGLA2D(nn.Module):
    """x (B, H*W (+ cls), dim) -> the same, at any resolution: pass the grid to `forward`.

    expand_k, expand_v: widths of q and k, and of v, over dim. tau: temperature of the gates; rank: of their projection. cls: a class token
    stands first, which the convolution leaves out.
    """

    def __init__(
        self, dim: int, heads: int, expand_k: float = 0.5, expand_v: float = 1.0, rank: int = 16, tau: float = 16.0, cls: bool = False
    ):
        super().__init__()
        self.dim = dim
        self.key, self.value = int(dim * expand_k), int(dim * expand_v)
        if self.key % heads or self.value % heads:
            raise RegardError(f"heads={heads}: expected a divisor of the widths {self.key} of q and k and {self.value} of v")
        self.heads, self.tau, self.cls = heads, tau, int(cls)
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.qkv = nn.Linear(dim, 2 * self.key + self.value, False)
        self.gates = nn.Sequential(nn.Linear(dim, rank, False), nn.Linear(rank, 2 * self.key))
        self.near = nn.Identity() if self.value == dim else nn.Linear(dim, self.value, False)
        self.mix = nn.Linear(dim, self.value)
        self.norm_far, self.norm_near = (nn.RMSNorm(self.value // heads, eps=1e-5) for _ in range(2))
        self.out = nn.Linear(self.value, dim, False)

    def local(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        plane = x[:, self.cls :].transpose(1, 2).unflatten(-1, grid)
        found = F.silu(self.conv(plane)).flatten(2).transpose(1, 2)
        return torch.cat((x[:, : self.cls], found), 1)

    @takes(x="batch tokens dim")
    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        if x.shape[1] != grid[0] * grid[1] + self.cls:
            raise RegardError(f"x has {x.shape[1]} tokens; expected {grid[0]} x {grid[1]}{' + 1' * self.cls}")
        local = self.local(x, grid)
        split = [self.key, self.key, self.value]
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(local).split(split, -1))
        ahead, back = ((F.logsigmoid(g) / self.tau).unflatten(-1, (self.heads, -1)).transpose(1, 2) for g in self.gates(local).chunk(2, -1))
        far = self.norm_far(both_directions(q, k, v, ahead, back).transpose(1, 2))
        near = self.norm_near(self.near(local).unflatten(-1, (self.heads, -1)))
        r = torch.sigmoid(self.mix(local)).unflatten(-1, (self.heads, -1))
        return self.out((r * far + (1 - r) * near).flatten(-2))  # type: ignore[no-any-return]


class ViG(nn.Module):
    """Images (B, channels, H, W) of any size that patch divides -> logits (B, classes): patches, blocks of BiGLA2D and SwiGLU, the mean."""

    def __init__(self, channels: int, classes: int, dim: int = 64, heads: int = 2, layers: int = 2, patch: int = 2):
        super().__init__()
        from regard.nn.parts import SwiGLU

        self.patch = nn.Conv2d(channels, dim, patch, patch)
        self.norms1, self.norms2 = (nn.ModuleList([nn.RMSNorm(dim) for _ in range(layers)]) for _ in range(2))
        self.mixers = nn.ModuleList([BiGLA2D(dim, heads) for _ in range(layers)])
        self.mlps = nn.ModuleList([SwiGLU(dim, 2 * dim) for _ in range(layers)])
        self.norm, self.head = nn.RMSNorm(dim), nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x)
        grid = (x.shape[2], x.shape[3])
        x = x.flatten(2).transpose(1, 2)
        for norm1, mixer, norm2, mlp in zip(self.norms1, self.mixers, self.norms2, self.mlps, strict=True):
            x = x + mixer(norm1(x), grid)
            x = x + mlp(norm2(x))
        return self.head(self.norm(x).mean(1))  # type: ignore[no-any-return]
