"""LightNet: an additive recurrence, whose decay is what the keys' exponentials sum to, so that no direction is needed (id 191; Qin et al., 2024).

S_t = sum_{s <= t} e^{f_s - z_t} v_s^T, z_t = log sum_{s <= t} e^{f_s};  o_t = silu(q_t) S_t.   Without a mask: k = softmax of f over all positions
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.algebra import FeatureMap, Input, Learned, Recipe, Recurrent, Sizes, bind, identity
from regard.catalog import get
from regard.catalog.registry import register
from regard.errors import RegardError
from regard.nn.attention import Attention
from regard.nn.ema import MultiHeadEMA
from regard.nn.parts import SwiGLU


def query(q: Tensor, scaled: bool) -> Tensor:
    return F.silu(q) * (q.shape[-1] ** -0.5 if scaled else 1.0)


def axis_angles(sizes: Sizes, axes: int) -> Tensor:
    """10000^(-2 c / D) for the channels that each axis owns in turn, (H, D, axes)."""
    rates = 10000 ** (-2 / sizes.head_dim * torch.arange(sizes.head_dim, dtype=torch.float64))
    own = torch.arange(sizes.head_dim)[:, None] % axes == torch.arange(axes)
    return (rates[:, None] * own).expand(sizes.heads, -1, -1).clone()


def relative_cosines(x: Tensor, position: Tensor, theta: Tensor, grid: tuple[int, ...]) -> Tensor:
    """[x cos a, x sin a], a = sum_axis theta_axis i_axis: products depend on differences of grid indices alone."""
    at, index = position, []
    for size in reversed(grid):
        index.append(at % size)
        at = at // size
    place = torch.stack(index[::-1], -1).to(torch.float64)  # (L, axes)
    angle = torch.einsum("la,hda->hld", place, theta.to(torch.float64))
    return torch.cat((x * angle.cos().to(x.dtype), x * angle.sin().to(x.dtype)), -1)


@register("lightnet")
def lightnet(
    grid: tuple[int, ...] = (),
    scaled: bool = True,
    gate_rank: int | None = 128,
    key_dim: int | float | None = None,
    short_conv: int = 0,
    norm_eps: float = 1e-5,
) -> Recurrent:
    """grid: the sizes of the axes that tokens, in row order, stand on; with it q and k carry relative cosines (MD-LRPE), learned input
    `theta` (H, D, axes); a sequence is (a large number,). (): no positions. scaled: D^-1/2 on q, as the released kernel has. k holds
    logits f. Of the layer: gate_rank of the silu gate, key_dim channels of q and k a head (expand_ratio; None: head_dim), short_conv width of
    convolutions without activation (0: none), norm_eps of the RMS norm over all heads together. `regard.nn.LightNet` adds the mixing along axes at the input (MD-TPE)."""
    grid = tuple(grid)
    extra: tuple[Input, ...] = ()
    if grid:
        start = bind(axis_angles, axes=len(grid))
        extra = (Input("theta", "hdf", default=start, layer=Learned(start)),)
    return Recurrent(
        FeatureMap(bind(query, scaled=scaled), identity),
        keys="softmax",
        turn=bind(relative_cosines, grid=grid) if grid else None,
        scaled=False,
        inputs=extra,
        recipe=Recipe(
            short_conv=short_conv, merge_norm="rms", norm_eps=norm_eps, out_gate="silu", gate_rank=gate_rank, rope=False, key_dim=key_dim
        ),
    )


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
