"""Twins: attention inside windows and attention to a strided convolution's tokens, in turn (id 238; Chu et al., 2021).

LSA: softmax attention inside ws x ws windows, no shift.  GSA: q from all tokens, k and v from LN(conv_{sr, stride sr}(x))
SVT: blocks of LSA, GSA, LSA, ...; PCPVT: all GSA.  PEG behind the first block of each stage: x <- x + dwconv_3x3(x), places for any size
Cost over the window k is k^2 N + N^2 / k^2, least at k = N^(1/4).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from regard.catalog.registry import register
from regard.errors import RegardError
from regard.nn.images.patch_net import DropPath, FeedForward, depth_rates, fan_out_values
from regard.nn.images.planes import Patches
from regard.nn.images.token_attention import TokenAttention, known_grid
from regard.nn.images.windows import filled_up, from_windows, to_windows
from regard.nn.parts import takes

Shape = tuple[int, int]


class LocallyGroupedAttention(nn.Module):
    """x (B, H*W, dim), shape (H, W) (None: a square) -> the same shape: attention inside windows of `window`^2 tokens. Sizes that are no multiple are
    filled up with zeros, which take part as tokens, as released. dropout: of weights; proj_dropout: of the output. scale: None for head_dim ** -0.5.
    masked: what fills up is no token, as in the released code for segmentation (which masks only where both sides are filled up)."""

    def __init__(
        self,
        dim: int,
        heads: int,
        window: int = 7,
        qkv_bias: bool = False,
        dropout: float = 0.0,
        proj_dropout: float = 0.0,
        scale: float | None = None,
        masked: bool = False,
    ):
        super().__init__()
        if window < 1:
            raise RegardError(f"window={window}; expected at least 1")
        self.dim, self.window, self.masked = dim, window, masked
        self.inner = TokenAttention(dim, heads, None, qkv_bias, scale, dropout, proj_dropout)

    @takes(x="batch tokens dim")
    def forward(self, x: Tensor, shape: Shape | None = None) -> Tensor:
        height, width = known_grid(x.shape[1], shape)
        plane = filled_up(x.unflatten(1, (height, width)), self.window)
        keep = None
        if self.masked and plane.shape[1:3] != (height, width):
            keep = to_windows(filled_up(x.new_ones(len(x), height, width, 1), self.window), self.window)[..., 0] > 0
        out = from_windows(self.inner(to_windows(plane, self.window), keep=keep), self.window, *plane.shape[1:3])
        return out[:, :height, :width].flatten(1, 2)


class GlobalSubsampledAttention(nn.Module):
    """x (B, H*W, dim), shape -> the same shape: keys and values from a convolution of size and stride `reduction` and a LayerNorm (1: from x).
    Rows and columns that do not fill a stride give no key."""

    def __init__(
        self,
        dim: int,
        heads: int,
        reduction: int = 1,
        qkv_bias: bool = False,
        dropout: float = 0.0,
        proj_dropout: float = 0.0,
        eps: float = 1e-5,
        scale: float | None = None,
    ):
        super().__init__()
        self.dim, self.reduction = dim, reduction
        self.inner = TokenAttention(dim, heads, None, qkv_bias, scale, dropout, proj_dropout)
        self.reduce = nn.Conv2d(dim, dim, reduction, reduction) if reduction > 1 else None
        self.norm = nn.LayerNorm(dim, eps) if reduction > 1 else None

    @takes(x="batch tokens dim")
    def forward(self, x: Tensor, shape: Shape | None = None) -> Tensor:
        if self.reduce is None or self.norm is None:
            return self.inner(x)  # type: ignore[no-any-return]
        shape = known_grid(x.shape[1], shape)
        if min(shape) < self.reduction:
            raise RegardError(f"a grid of {shape} with reduction={self.reduction}; expected at least that on both sides")
        return self.inner(x, self.norm(self.reduce(x.mT.unflatten(-1, shape)).flatten(2).mT))  # type: ignore[no-any-return]


class PEG(nn.Module):
    """x (B, H*W, dim), shape -> x + depthwise 3 x 3 convolution of the map: places from the zeros around it."""

    def __init__(self, dim: int):
        super().__init__()
        self.dim, self.conv = dim, nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    @takes(x="batch tokens dim")
    def forward(self, x: Tensor, shape: Shape | None = None) -> Tensor:
        plane = x.mT.unflatten(-1, known_grid(x.shape[1], shape))
        return x + self.conv(plane).flatten(2).mT  # type: ignore[no-any-return]


class TwinsBlock(nn.Module):
    """x + attention(LN x), then x + MLP(LN x)."""

    def __init__(self, dim: int, attention: nn.Module, ratio: float = 4.0, dropout: float = 0.0, drop_path: float = 0.0, eps: float = 1e-6):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps), nn.LayerNorm(dim, eps)
        self.attention, self.mlp, self.drop = attention, FeedForward(dim, int(dim * ratio), dropout), DropPath(drop_path)

    def forward(self, x: Tensor, shape: Shape) -> Tensor:
        x = x + self.drop(self.attention(self.norm1(x), shape))
        return x + self.drop(self.mlp(self.norm2(x)))  # type: ignore[no-any-return]


@register("twins", kind="module")
class Twins(nn.Module):
    """Images (B, channels, H, W) -> logits (B, classes); `features(x)`: the maps (B, C, h, w) of the stages.

    windows: of LSA, a number a stage, in blocks 0, 2, ... (SVT); None: GSA in all blocks (PCPVT). reductions: of GSA, a number a stage. The
    defaults are SVT-S's. patch: of the first stage; the others halve the map. Patches that are not full are left out.
    """

    def __init__(
        self,
        dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 10, 4),
        heads: Sequence[int] = (2, 4, 8, 16),
        windows: Sequence[int] | None = (7, 7, 7, 7),
        reductions: Sequence[int] = (8, 4, 2, 1),
        ratios: Sequence[float] = (4, 4, 4, 4),
        *,
        channels: int = 3,
        classes: int = 1000,
        patch: int = 4,
        qkv_bias: bool = True,
        dropout: float = 0.0,
        weight_dropout: float = 0.0,
        drop_path: float = 0.0,
        eps: float = 1e-6,
        scale: float | None = None,
        masked: bool = False,
    ):
        super().__init__()
        sizes = {len(x) for x in (dims, depths, heads, reductions, ratios, windows or dims)}
        if len(sizes) > 1:
            raise RegardError(f"dims, depths, heads, windows, reductions and ratios name {sorted(sizes)} stages; expected as many of each")
        self.channels, inner = channels, channels
        self.patches, self.norms, self.places, self.stages = (nn.ModuleList() for _ in range(4))
        for at, (dim, rates) in enumerate(zip(dims, depth_rates(drop_path, depths), strict=True)):
            made: dict[str, Any] = {"qkv_bias": qkv_bias, "dropout": weight_dropout, "proj_dropout": dropout, "scale": scale}
            far = partial(GlobalSubsampledAttention, dim, heads[at], reductions[at], **made)
            near = far if windows is None else partial(LocallyGroupedAttention, dim, heads[at], windows[at], masked=masked, **made)
            blocks = [TwinsBlock(dim, (far if b % 2 else near)(), ratios[at], dropout, rate, eps) for b, rate in enumerate(rates)]
            self.patches.append(Patches(inner, dim, 2 if at else patch))
            self.norms.append(nn.LayerNorm(dim))
            self.places.append(PEG(dim))
            self.stages.append(nn.ModuleList(blocks))
            inner = dim
        self.drop, self.norm, self.head = nn.Dropout(dropout), nn.LayerNorm(inner, eps), nn.Linear(inner, classes)
        self.apply(fan_out_values)

    @takes(x="batch channels height width")
    def features(self, x: Tensor) -> list[Tensor]:
        found = []
        for patches, norm, place, blocks in zip(self.patches, self.norms, self.places, self.stages, strict=True):
            x = patches(x)
            shape = x.shape[2:]
            x = self.drop(norm(x.flatten(2).mT))
            for at, block in enumerate(blocks.children()):
                x = block(x, shape)
                x = x if at else place(x, shape)
            x = x.mT.unflatten(-1, shape)
            found.append(x)
        return found

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.features(x)[-1].flatten(2).mT).mean(1))  # type: ignore[no-any-return]


def pcpvt(**options: Any) -> Twins:
    """Twins-PCPVT-S, PVT's blocks with PEG; other sizes by `depths`: (3, 4, 18, 3) B, (3, 8, 27, 3) L."""
    usual: dict[str, Any] = {"dims": (64, 128, 320, 512), "depths": (3, 4, 6, 3), "heads": (1, 2, 5, 8), "ratios": (8, 8, 4, 4)}
    return Twins(windows=None, **{**usual, **options})


def pair_flops(tokens: int, window: int, dim: int = 1) -> float:
    """What LSA and GSA of the same window cost in weights and reads together: 2 dim (k^2 N + N^2 / k^2)."""
    if window < 1:
        raise RegardError(f"window={window}; expected at least 1")
    return 2 * dim * (window**2 * tokens + tokens**2 / window**2)
