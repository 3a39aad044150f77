"""MambaOut: the Mamba block without its state space, for images (id 286; Yu and Wang, 2024).

u = LN(x);  [g (h), i (h - c), v (c)] = split(W_1 u), h = int(8/3 C), c = int(conv_ratio C);  y = x + W_2 (gelu(g) [i, dwconv_7x7(v)])
with the state space: SSM(silu(dwconv(v))) in place of dwconv(v), scanned row by row
A transformer block costs 24 D^2 L + 4 D L^2 operations, half of them quadratic in L at L = 6 D: longer sequences are long.
The paper's two experiments, small, are checks of this row: squares from discs, 64 patches seen whole, where the state space adds a few points for three
times the time, and the first token of 32 from the last, which nothing else reaches. Nets of the paper's size are not trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.catalog.registry import register
from regard.errors import RegardError
from regard.nn.images.patch_net import DropPath, depth_rates, small_values
from regard.nn.parts import takes
from regard.nn.selective_scan import SelectiveScan


@register("mambaout", kind="module")
class GatedCNNBlock(nn.Module):
    """x (B, H, W, dim) -> the same shape. conv_ratio: the share of dim whose channels are convolved. ssm: with Mamba's state space behind the
    convolution, `state` numbers a channel, one causal scan over rows; False is MambaOut."""

    def __init__(
        self,
        dim: int,
        ratio: float = 8 / 3,
        kernel: int = 7,
        conv_ratio: float = 1.0,
        ssm: bool = False,
        state: int = 16,
        drop_path: float = 0.0,
        eps: float = 1e-6,
    ):
        super().__init__()
        hidden, mixed = int(ratio * dim), int(conv_ratio * dim)
        if not 1 <= mixed <= hidden or kernel % 2 == 0:
            raise RegardError(
                f"conv_ratio={conv_ratio}, ratio={ratio}, kernel={kernel}; expected 1 to {hidden} convolved channels and an odd kernel"
            )
        self.dim, self.parts = dim, [hidden, hidden - mixed, mixed]
        self.norm, self.first, self.last = nn.LayerNorm(dim, eps), nn.Linear(dim, 2 * hidden), nn.Linear(hidden, dim)
        self.conv = nn.Conv2d(mixed, mixed, kernel, padding=kernel // 2, groups=mixed)
        self.scan = SelectiveScan(mixed, state=state) if ssm else None
        self.drop = DropPath(drop_path)

    def mix(self, v: Tensor) -> Tensor:
        """What stands for attention: (B, H, W, c) -> the same shape."""
        v = self.conv(v.movedim(-1, 1))
        if self.scan is not None:
            v = self.scan(F.silu(v).flatten(2)[:, None])[:, 0].view_as(v)
        return v.movedim(1, -1)

    @takes(x="batch height width dim")
    def forward(self, x: Tensor) -> Tensor:
        g, i, v = self.first(self.norm(x)).split(self.parts, -1)
        return x + self.drop(self.last(F.gelu(g) * torch.cat((i, self.mix(v)), -1)))  # type: ignore[no-any-return]


class Down(nn.Module):
    """3 x 3 convolutions of stride 2 on (B, H, W, C), a LayerNorm behind each and GELU between them, through the widths given."""

    def __init__(self, *widths: int, eps: float = 1e-6):
        super().__init__()
        pairs = list(pairwise(widths))
        self.convs = nn.ModuleList([nn.Conv2d(a, b, 3, 2, 1) for a, b in pairs])
        self.norms = nn.ModuleList([nn.LayerNorm(b, eps) for _, b in pairs])

    def forward(self, x: Tensor) -> Tensor:
        for at, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = norm(conv((F.gelu(x) if at else x).movedim(-1, 1)).movedim(1, -1))
        return x


SIZES = {  # dims, depths
    "femto": ((48, 96, 192, 288), (3, 3, 9, 3)),
    "kobe": ((48, 96, 192, 288), (3, 3, 15, 3)),
    "tiny": ((96, 192, 384, 576), (3, 3, 9, 3)),
    "small": ((96, 192, 384, 576), (3, 4, 27, 3)),
    "base": ((128, 256, 512, 768), (3, 4, 27, 3)),
}


class MambaOut(nn.Module):
    """Images (B, channels, H, W) -> logits (B, classes): a stem of stride 4, stages of blocks halving the map between them, mean, LayerNorm, and a
    head linear, GELU, LayerNorm, dropout, linear. options: of the blocks (ssm=True for all of them, kernel, conv_ratio, ...)."""

    def __init__(
        self,
        dims: Sequence[int] = SIZES["tiny"][0],
        depths: Sequence[int] = SIZES["tiny"][1],
        channels: int = 3,
        classes: int = 1000,
        head_ratio: float = 4.0,
        head_dropout: float = 0.0,
        drop_path: float = 0.0,
        eps: float = 1e-6,
        **options: Any,
    ):
        super().__init__()
        if len(dims) != len(depths):
            raise RegardError(f"dims and depths name {len(dims)} and {len(depths)} stages; expected as many of each")
        self.channels, layers = channels, list[nn.Module]()
        for at, (dim, rates) in enumerate(zip(dims, depth_rates(drop_path, depths), strict=True)):
            layers.append(Down(dims[at - 1], dim, eps=eps) if at else Down(channels, dim // 2, dim, eps=eps))
            layers += [GatedCNNBlock(dim, drop_path=rate, eps=eps, **options) for rate in rates]
        self.layers, last = nn.Sequential(*layers), dims[-1]
        hidden = int(head_ratio * last)
        self.norm = nn.LayerNorm(last, eps)
        self.head = nn.Sequential(
            nn.Linear(last, hidden), nn.GELU(), nn.LayerNorm(hidden, eps), nn.Dropout(head_dropout), nn.Linear(hidden, classes)
        )
        self.apply(small_values)

    @takes(x="batch channels height width")
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.layers(x.movedim(1, -1)).mean((1, 2))))  # type: ignore[no-any-return]


def mambaout(size: str, **options: Any) -> MambaOut:
    """MambaOut by name: "femto", "kobe", "tiny", "small", "base"."""
    if size not in SIZES:
        raise RegardError(f"size={size!r}; expected one of {', '.join(map(repr, SIZES))}")
    dims, depths = SIZES[size]
    return MambaOut(dims, depths, **options)


def block_flops(length: int, dim: int) -> tuple[int, int]:
    """Operations of a transformer block (MLP ratio 4) that grow linearly and quadratically with the length: 24 D^2 L and 4 D L^2."""
    return 24 * dim**2 * length, 4 * dim * length**2


def is_long_sequence(length: int, dim: int) -> bool:
    """Whether the quadratic part is the larger: L > 6 D."""
    linear, quadratic = block_flops(length, dim)
    return quadratic > linear


TASKS = {  # tokens at patch 16, and whether each token may see its past alone
    "classification": (224 * 224 // 256, False),
    "detection": (800 * 1280 // 256, False),
    "segmentation": (512 * 2048 // 256, False),
    "generation": (0, True),
}


def needs_memory(task: str, dim: int = 384) -> bool:
    """Whether a state space fits the task by the paper's two criteria: its sequence is long for a model of width `dim`, or its tokens may see
    their past alone. task: "classification" (ImageNet), "detection" (COCO), "segmentation" (ADE20K) or "generation"."""
    if task not in TASKS:
        raise RegardError(f"task={task!r}; expected one of {', '.join(map(repr, TASKS))}")
    tokens, causal = TASKS[task]
    return causal or is_long_sequence(tokens, dim)
