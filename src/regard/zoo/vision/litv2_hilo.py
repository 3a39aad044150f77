"""HiLo attention: some heads attend inside small windows, the others to the windows' means (id 193; Pan et al., 2022).

floor(alpha heads) low heads: q from every token, k and v from means of s x s windows;  the others: attention inside each window
out = [high; low], each with projections of its own;  s = 1: plain attention.  No positions: the MLP holds a 3 x 3 depthwise convolution.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.catalog.registry import register
from regard.errors import RegardError
from regard.nn.images.grid import ChannelNorm
from regard.nn.images.patch_net import ConvMLP, DropPath, depth_rates, fan_out_values
from regard.nn.images.planes import BatchNorm, Patches
from regard.nn.images.token_attention import TokenAttention, known_grid
from regard.nn.images.windows import filled_up, from_windows, to_windows
from regard.nn.parts import takes


@register("litv2-hilo", kind="module")
class HiLo(nn.Module):
    """x (B, H*W, dim), shape (H, W) (None: a square) -> the same shape. alpha: share of low heads. window: s.

    Sizes that are no multiple of s are filled up with zeros, which take part as tokens, as released. scale: None for head_dim ** -0.5.
    """

    def __init__(self, dim: int, heads: int = 8, window: int = 2, alpha: float = 0.5, qkv_bias: bool = False, scale: float | None = None):
        super().__init__()
        if dim % heads or window < 1 or not 0 <= alpha <= 1:
            raise RegardError(
                f"dim={dim}, heads={heads}, window={window}, alpha={alpha}; expected a multiple of heads, and alpha from 0 to 1"
            )
        width, low = dim // heads, int(heads * alpha) if window > 1 else heads
        self.dim, self.window, self.widths = dim, window, ((heads - low) * width, low * width)
        self.high = TokenAttention(dim, heads - low, self.widths[0], qkv_bias, scale) if low < heads else None
        self.low = TokenAttention(dim, low, self.widths[1], qkv_bias, scale) if low else None

    @takes(x="batch tokens dim")
    def forward(self, x: Tensor, shape: tuple[int, int] | None = None) -> Tensor:
        height, width = known_grid(x.shape[1], shape)
        plane = filled_up(x.unflatten(1, (height, width)), self.window)
        rows, columns = plane.shape[1:3]
        parts = []
        if self.high is not None:
            parts.append(from_windows(self.high(to_windows(plane, self.window)), self.window, rows, columns))
        if self.low is not None:
            means = F.avg_pool2d(plane.movedim(-1, 1), self.window) if self.window > 1 else plane.movedim(-1, 1)
            parts.append(self.low(plane.flatten(1, 2), means.flatten(2).mT).unflatten(1, (rows, columns)))
        return torch.cat(parts, -1)[:, :height, :width].flatten(1, 2)

    def flops(self, height: int, width: int) -> int:
        """Products, each with its addition, of one map."""
        s, (high, low) = self.window, self.widths
        n, windows = -(-height // s) * -(-width // s) * s**2, -(-height // s) * -(-width // s)
        inside = n * self.dim * high * 3 + windows * s**4 * high * 2 + n * high**2
        return inside + n * self.dim * low + windows * self.dim * low * 2 + n * low * windows * 2 + n * low**2


class DeformableMerging(nn.Module):
    """(B, C, H, W) -> (B, out, H // 2, W // 2): a 2 x 2 convolution of stride 2 whose taps stand where a second one, zero at first, moves
    them (linear between pixels, zero outside), then BatchNorm and GELU."""

    def __init__(self, channels: int, out: int):
        super().__init__()
        self.conv, self.move = Patches(channels, out, 2), Patches(channels, 8, 2)
        self.norm = BatchNorm(out)
        for p in self.move.parameters():
            nn.init.zeros_(p)

    def forward(self, x: Tensor) -> Tensor:
        moved = self.move(x).unflatten(1, (4, 2))  # a tap's row, then its column
        (h, w), (rows, columns) = x.shape[2:], moved.shape[3:]
        taps = torch.stack(torch.meshgrid(torch.arange(2), torch.arange(2), indexing="ij"), -1).flatten(0, 1).to(x)
        start = torch.stack(torch.meshgrid(2 * torch.arange(rows), 2 * torch.arange(columns), indexing="ij")).to(x)
        at = (start + taps[..., None, None] + moved) / x.new_tensor([max(h - 1, 1), max(w - 1, 1)])[:, None, None] * 2 - 1
        grid = at.flip(2).permute(0, 3, 4, 1, 2).flatten(2, 3)  # (B, rows, columns * taps, 2)
        seen = F.grid_sample(x, grid.to(x.dtype), align_corners=True).unflatten(-1, (columns, 4))
        assert self.conv.bias is not None
        out = torch.einsum("bchwt,oct->bohw", seen, self.conv.weight.flatten(2)) + self.conv.bias[:, None, None]
        return F.gelu(self.norm(out))


class LITBlock(nn.Module):
    """x + HiLo(LN x), if heads, then x + MLP(LN x), on (B, C, H, W)."""

    def __init__(self, dim: int, heads: int, window: int, alpha: float, ratio: float, qkv_bias: bool, drop_path: float, dropout: float):
        super().__init__()
        self.norm1 = ChannelNorm(dim) if heads else None
        self.attention = HiLo(dim, heads, window, alpha, qkv_bias) if heads else None
        self.norm2, self.mlp, self.drop = ChannelNorm(dim), ConvMLP(dim, int(dim * ratio), dropout), DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        if self.norm1 is not None and self.attention is not None:
            y = self.attention(self.norm1(x).flatten(2).mT, (x.shape[2], x.shape[3]))
            x = x + self.drop(y.mT.unflatten(-1, x.shape[2:]))
        return x + self.drop(self.mlp(self.norm2(x)))  # type: ignore[no-any-return]


class LITv2(nn.Module):
    """Images (B, channels, H, W) -> logits (B, classes): patches of 4 x 4, stages of blocks with merging between them, LayerNorm, mean, linear.

    windows: of each stage, 0 for blocks of the MLP alone, 1 for plain attention. The defaults are LITv2-S's. dim doubles from stage to stage.
    """

    def __init__(
        self,
        dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        heads: Sequence[int] = (3, 6, 12, 24),
        windows: Sequence[int] = (0, 0, 2, 1),
        alpha: float = 0.9,
        *,
        channels: int = 3,
        classes: int = 1000,
        patch: int = 4,
        ratio: float = 4.0,
        qkv_bias: bool = True,
        dropout: float = 0.0,
        drop_path: float = 0.1,
    ):
        super().__init__()
        if not len(depths) == len(heads) == len(windows):
            raise RegardError(f"depths, heads, windows name {len(depths)}, {len(heads)}, {len(windows)} stages; expected as many of each")
        self.channels = channels
        layers: list[nn.Module] = [Patches(channels, dim, patch), ChannelNorm(dim)]
        for at, rates in enumerate(depth_rates(drop_path, depths)):
            wide, count = dim * 2**at, heads[at] if windows[at] else 0
            layers += [DeformableMerging(wide // 2, wide)] if at else []
            layers += [LITBlock(wide, count, windows[at], alpha, ratio, qkv_bias, rate, dropout) for rate in rates]
        self.layers, self.norm, self.head = nn.Sequential(*layers), ChannelNorm(wide), nn.Linear(wide, classes)
        for part in self.layers:
            if isinstance(part, LITBlock):
                part.apply(linear_values)
        self.head.apply(linear_values)

    @takes(x="batch channels height width")
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.layers(x)).mean((2, 3)))  # type: ignore[no-any-return]


def linear_values(layer: nn.Module) -> None:
    """`fan_out_values`, where 1 x 1 convolutions are linear layers."""
    if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1):
        nn.init.trunc_normal_(layer.weight, std=0.02)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    else:
        fan_out_values(layer)
