"""LightNet on grids of any number of axes: one scan without direction, relative cosines, and mixing along each axis at the input (id 191; Qin et al., 2024)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from ..catalog import get
from ..errors import RegardError
from .attention import Attention
from .mega import MultiHeadEMA
from .parts import SwiGLU


class AxisMixing(nn.Module):
    """MD-TPE: x (B, n_1 * n_2 * ..., dim) -> x + sum over axes of a Toeplitz product along it, whose coefficients are sums of `ndim` decaying
    exponentials, a channel each. O(n). causal: along a sequence (one axis) no token reads later ones."""

    def __init__(self, dim: int, axes: int, ndim: int = 1, causal: bool = False):
        super().__init__()
        if causal and axes != 1:
            raise RegardError(f"causal=True with axes={axes}: a grid has no order; expected one axis")
        self.mixers = nn.ModuleList([MultiHeadEMA(dim, ndim, bidirectional=not causal, activation=False) for _ in range(axes)])
        for mixer in self.mixers:  # x itself is added once, below
            nn.init.zeros_(mixer.omega)  # type: ignore[arg-type]
            mixer.omega.requires_grad_(False)  # type: ignore[union-attr, operator]

    def forward(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        if math.prod(grid) != x.shape[1] or len(grid) != len(self.mixers):
            raise RegardError(f"grid={tuple(grid)}: expected {len(self.mixers)} sizes whose product is the length {x.shape[1]}")
        plane = x.unflatten(1, tuple(grid))
        out = plane
        for axis, mixer in enumerate(self.mixers, 1):
            turned = plane.movedim(axis, -2)
            out = out + mixer(turned.flatten(0, -3)).view(turned.shape).movedim(-2, axis)
        return out.flatten(1, len(grid))


class LightNet(nn.Module):
    """Features on a grid (B, n_1 * n_2 * ..., inputs) -> (B, outputs): linear, `AxisMixing`, layers of LightNet attention in one scan over all positions
    and SwiGLU, the mean, linear. grid: the sizes of the axes; pooled=False gives outputs at every position."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        grid: Sequence[int],
        dim: int = 64,
        heads: int = 2,
        layers: int = 2,
        ndim: int = 1,
        pooled: bool = True,
    ):
        super().__init__()
        self.grid, self.pooled = tuple(grid), pooled
        self.start, self.place = nn.Linear(inputs, dim), AxisMixing(dim, len(self.grid), ndim)
        mechanism = get("lightnet", grid=self.grid, gate_rank=min(128, dim))
        self.mixers = nn.ModuleList([Attention(dim, heads, mechanism, causal=False) for _ in range(layers)])
        self.mlps = nn.ModuleList([SwiGLU(dim, 2 * dim) for _ in range(layers)])
        self.norms1, self.norms2 = (nn.ModuleList([nn.RMSNorm(dim, eps=1e-6) for _ in range(layers)]) for _ in range(2))
        self.norm, self.end = nn.RMSNorm(dim, eps=1e-6), nn.Linear(dim, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.place(self.start(x), self.grid)
        for norm1, mixer, norm2, mlp in zip(self.norms1, self.mixers, self.norms2, self.mlps, strict=True):
            x = x + mixer(norm1(x))
            x = x + mlp(norm2(x))
        x = self.norm(x)
        return self.end(x.mean(1) if self.pooled else x)  # type: ignore[no-any-return]
