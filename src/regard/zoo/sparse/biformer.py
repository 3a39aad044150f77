"""BiFormer's bi-level routing: regions choose regions, tokens attend within the chosen ones (Zhu et al., 2023).

A_r = scale q_r k_r^T of region means; I = top-k of each row;  o = softmax(scale q K_I^T) V_I + LePE(v), LePE a depthwise convolution
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.algebra import Chosen, Input, Selection, View, Weighted
from regard.algebra.permute import tiles
from regard.catalog.registry import register
from regard.engine.door import attend
from regard.errors import RegardError
from regard.nn.parts import takes


def by_region(q: Tensor, k: Tensor, view: View, regions: Tensor, real: Tensor) -> Selection:
    """regions (B, n, n) bool, of tokens that lie region by region."""
    size = q.shape[-2] // regions.shape[-1]
    return Selection(regions[:, None].expand(-1, q.shape[1], -1, -1), size, size)


def shown(s: Tensor, real: Tensor) -> Tensor:
    return torch.where(real, s, -1e30)


ROUTED = Weighted(
    select=Chosen(by_region), position=shown, inputs=(Input("regions", "bff", dtype="bool"), Input("real", "bk", dtype="bool"))
)


@register("biformer", kind="module")
class BiLevelRoutingAttention(nn.Module):
    """x (N, H, W, C) -> (N, H, W, C); after a pass `routes` (N, regions, top_k) and `route_logits` (N, regions, regions) hold the routing.

    regions: S an axis. top_k: regions a region reads. scale: None is qk_dim^-0.5, all channels, as released. lepe: width of the
    convolution on v (0: none). soft: multiply keys and values by the softmax of the chosen logits. differentiable: let gradient into the logits.
    param_routing: a learned map, shared by q and k, of the regions' means. auto_pad: pad H and W to multiples of S before the projection.
    padded: "hidden": padded tokens are not read and enter no mean, or "attended", as released. layout: "nhwc", or "nchw", as the released
    refactoring: x (N, C, H, W), regions of floor(H / S) x floor(W / S) pixels and as many as that takes, zeros after the projection where they
    reach over the map, means over real pixels.
    """

    routes: Tensor
    route_logits: Tensor

    def __init__(
        self, dim: int, heads: int = 8, *, regions: int = 7, top_k: int = 4, qk_dim: int | None = None, scale: float | None = None,
        lepe: int = 5, soft: bool = False, differentiable: bool = False, auto_pad: bool = False, param_routing: bool = False,
        padded: str = "hidden", layout: str = "nhwc",
    ):  # fmt: skip
        super().__init__()
        self.dim = dim
        self.qk_dim = qk_dim or dim
        if not 1 <= top_k <= regions * regions or self.qk_dim % heads or dim % heads:
            raise RegardError(
                f"top_k={top_k}, dim={dim}, qk_dim={self.qk_dim}, heads={heads}: expected 1 <= top_k <= {regions**2}, and multiples of heads"
            )
        if padded not in ("hidden", "attended") or layout not in ("nhwc", "nchw"):
            raise RegardError(f"padded={padded!r}, layout={layout!r}; expected hidden or attended, and nhwc or nchw")
        self.heads, self.regions, self.top_k, self.scale = heads, regions, top_k, scale or self.qk_dim**-0.5
        self.soft, self.differentiable, self.auto_pad, self.padded, self.layout = soft, differentiable, auto_pad, padded, layout
        self.qkv, self.out = nn.Linear(dim, 2 * self.qk_dim + dim), nn.Linear(dim, dim)
        self.router = nn.Linear(self.qk_dim, self.qk_dim) if param_routing else nn.Identity()
        self.lepe = nn.Conv2d(dim, dim, lepe, padding=lepe // 2, groups=dim) if lepe else None

    def tile_of(self, height: int, width: int) -> tuple[int, int]:
        """Pixels of a region, height and width."""
        s = self.regions
        if self.layout == "nchw":
            if height < s or width < s:
                raise RegardError(f"a map of {height} x {width} with regions={s}: expected at least a pixel a region")
            return height // s, width // s
        if (height % s or width % s) and not self.auto_pad:
            raise RegardError(f"a map of {height} x {width} with regions={s}: expected multiples, or auto_pad=True")
        return -(-height // s), -(-width // s)

    def routing(self, q: Tensor, k: Tensor, real: Tensor, count: int) -> Tensor:
        """Logits (N, count, count) of means of regions; q, k (N, L, qk_dim) region by region, real (1, L) bool."""
        weigh = real if self.layout == "nchw" or self.padded == "hidden" else torch.ones_like(real)
        shares = weigh.unflatten(1, (count, -1)).to(q.dtype)
        shares = (shares / shares.sum(-1, keepdim=True).clamp_min(1))[..., None]
        means = [(y.unflatten(1, (count, -1)) * shares).sum(2) for y in (q, k)]
        means = means if self.differentiable else [y.detach() for y in means]
        q_hat, k_hat = (self.router(y) for y in means)
        logits: Tensor = self.scale * q_hat @ k_hat.transpose(-1, -2)
        if self.padded == "hidden":  # a region without a pixel has nothing to read
            logits = logits.masked_fill(~real.unflatten(1, (count, -1)).any(-1)[:, None], -torch.inf)
        return logits

    def forward(self, x: Tensor) -> Tensor:
        if self.layout == "nchw":
            return self.mixed(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.mixed(x)

    @takes(x="batch height width dim")
    def mixed(self, x: Tensor) -> Tensor:
        """x (N, H, W, C) -> (N, H, W, C)."""
        height, width = x.shape[1:3]
        tile = self.tile_of(height, width)
        bottom, right = -height % tile[0], -width % tile[1]
        if self.layout == "nhwc" and (tile[0] * self.regions != height or tile[1] * self.regions != width):
            bottom, right = tile[0] * self.regions - height, tile[1] * self.regions - width
        over = (0, 0, 0, right, 0, bottom)
        projected = self.qkv(F.pad(x, over)) if self.layout == "nhwc" else self.qkv(x)
        local = projected[..., 2 * self.qk_dim :]
        projected = projected if self.layout == "nhwc" else F.pad(projected, over)
        q, k, v = projected.split((self.qk_dim, self.qk_dim, x.shape[-1]), -1)
        shape = (height + bottom, width + right)
        count = shape[0] // tile[0] * (shape[1] // tile[1])
        order = tiles(shape, tile)
        real = F.pad(torch.ones(height, width, dtype=torch.bool, device=x.device), (0, right, 0, bottom)).flatten()
        real = order.apply(real[None, :, None])[..., 0]
        flat = [order.apply(y.flatten(1, 2)) for y in (q, k, v)]
        logits = self.routing(flat[0], flat[1], real, count)
        best = logits.topk(self.top_k, -1)
        self.routes, self.route_logits = best.indices, logits
        seen = real if self.padded == "hidden" else torch.ones_like(real)
        if self.soft:
            o = self.gathered(flat, best.indices, best.values.softmax(-1), seen)
        else:
            chosen = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, best.indices, True)
            each_q, each_k, each_v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in flat)
            o = attend(each_q, each_k, each_v, ROUTED, scale=self.scale, regions=chosen, real=seen).transpose(1, 2).flatten(-2)
        o = order.invert(o).unflatten(1, shape)[:, :height, :width]
        if self.lepe is not None:
            o = o + self.lepe(local.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)[:, :height, :width]
        return self.out(o)  # type: ignore[no-any-return]

    def gathered(self, flat: list[Tensor], routes: Tensor, weights: Tensor, real: Tensor) -> Tensor:
        """The same attention with keys and values of the routed regions gathered and weighted."""
        count = routes.shape[1]
        q, k, v = (y.unflatten(1, (count, -1)) for y in flat)
        at = torch.arange(q.shape[0], device=q.device)[:, None, None]
        k, v = (y[at, routes] * weights[..., None, None] for y in (k, v))
        seen = real.unflatten(-1, (count, -1)).expand(q.shape[0], -1, -1)[at, routes].flatten(2)
        q, k, v = (y.flatten(0, 1).unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k.flatten(2, 3), v.flatten(2, 3)))
        o = attend(q, k, v, scale=self.scale, mask=seen.flatten(0, 1)[:, None, None])
        return o.transpose(1, 2).flatten(-2).unflatten(0, (-1, count)).flatten(1, 2)


class BiFormerBlock(nn.Module):
    """x + 3x3 depthwise convolution, then bi-level routing and an MLP (ratio 3), pre-norm; x (N, H, W, C)."""

    def __init__(self, dim: int, heads: int, *, regions: int = 7, top_k: int = 4, ratio: int = 3):
        super().__init__()
        self.place = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mixer = BiLevelRoutingAttention(dim, heads, regions=regions, top_k=top_k)
        self.mlp = nn.Sequential(nn.Linear(dim, ratio * dim), nn.GELU(), nn.Linear(ratio * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.place(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x = x + self.mixer(self.norm1(x))
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class BiFormer(nn.Module):
    """x (N, H, W, channels) -> logits (N, classes): stages of `BiFormerBlock`s at widths[n] channels, `stem` pixels a token in the first and a
    quarter of the tokens in each next; mean over tokens, normed, at the end. The defaults are a tiny net; the paper's first has widths
    64, 128, 256, 512, depths 2, 2, 8, 2, regions 7 and top_ks 1, 4, 16, 49."""

    def __init__(
        self, classes: int, *, channels: int = 3, widths: tuple[int, ...] = (16, 32), depths: tuple[int, ...] = (1, 1),
        top_ks: tuple[int, ...] = (1, 4), regions: int = 2, head_dim: int = 8, ratio: int = 3, stem: int = 4,
    ):  # fmt: skip
        super().__init__()
        if not len(widths) == len(depths) == len(top_ks) or not widths or any(width % head_dim for width in widths):
            raise RegardError(
                f"widths={widths}, depths={depths}, top_ks={top_ks}, head_dim={head_dim}: expected one of each a stage, widths multiples of head_dim"
            )
        self.merges, self.stages = nn.ModuleList(), nn.ModuleList()
        for n, (width, depth, top) in enumerate(zip(widths, depths, top_ks, strict=True)):
            size = stem if n == 0 else 2
            self.merges.append(nn.Conv2d(widths[n - 1] if n else channels, width, size, size))
            blocks = [BiFormerBlock(width, width // head_dim, regions=regions, top_k=top, ratio=ratio) for _ in range(depth)]
            self.stages.append(nn.Sequential(*blocks))
        self.norm, self.head = nn.LayerNorm(widths[-1]), nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        for merge, stage in zip(self.merges, self.stages, strict=True):
            x = stage(merge(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        return self.head(self.norm(x.mean((1, 2))))  # type: ignore[no-any-return]


def region_routes(q: Tensor, k: Tensor, regions: int, top_k: int, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Routing alone, for maps q and k (N, H, W, C) of any attention: (routes (N, S^2, top_k), logits (N, S^2, S^2)) of region means."""
    height, width = q.shape[1:3]
    if q.shape != k.shape or height % regions or width % regions or not 1 <= top_k <= regions * regions:
        raise RegardError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, regions={regions}, top_k={top_k}: expected equal shapes, heights and widths multiples of "
            f"regions, and 1 <= top_k <= {regions**2}"
        )
    means = [y.unflatten(2, (regions, -1)).unflatten(1, (regions, -1)).mean((2, 4)).flatten(1, 2) for y in (q, k)]
    logits = means[0] @ means[1].transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return logits.topk(top_k, -1).indices, logits
