"""ConViT: attention that starts as a convolution and may leave it, by a gate a head (id 187; d'Ascoli et al., 2021).

A_h = (1 - sigmoid(lam_h)) softmax(q k^T / sqrt(d)) + sigmoid(lam_h) softmax(w_h . r_ij + b_h),  r_ij = (dx, dy, dx^2 + dy^2), key minus query
local start: w_h = alpha (2 D_x, 2 D_y, -1), offsets D_h over a sqrt(H) x sqrt(H) grid, W_v = 1:  score -alpha |delta - D_h|^2 + const
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.algebra import Bias, Weighted
from regard.catalog.registry import register
from regard.engine.door import attend
from regard.errors import RegardError
from regard.nn.images.patch_net import DropPath, FeedForward, depth_rates, small_values
from regard.nn.images.planes import Patches
from regard.nn.images.token_attention import TokenAttention, known_grid
from regard.nn.parts import takes

BIASED = Weighted(position=Bias())


def offsets(shape: tuple[int, int], device: torch.device | None = None) -> Tensor:
    """(N, N, 3): dx, dy and their squares' sum from each query to each key of a grid (H, W), tokens row by row."""
    rows, columns = torch.meshgrid(*(torch.arange(n, device=device) for n in shape), indexing="ij")
    dx, dy = (at.flatten()[None] - at.flatten()[:, None] for at in (columns, rows))
    return torch.stack((dx, dy, dx**2 + dy**2), -1)


@register("convit", kind="module")
class GPSA(nn.Module):
    """Gated positional self-attention: x (B, N, dim) on a grid -> the same shape.

    shape in the call: the grid (H, W) (None: a square). local_init: the start as a convolution; with heads no square number, those beyond the
    largest square start as other weights do. locality: alpha. gate: lam's first value. dropout: of weights; proj_dropout: of the output.
    scale: of q k^T (None: head_dim ** -0.5).
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        locality: float = 1.0,
        local_init: bool = True,
        qkv_bias: bool = False,
        gate: float = 1.0,
        dropout: float = 0.0,
        proj_dropout: float = 0.0,
        scale: float | None = None,
    ):
        super().__init__()
        if dim % heads:
            raise RegardError(f"dim={dim} is no multiple of heads={heads}; expected one")
        self.dim, self.heads, self.dropout = dim, heads, dropout
        self.scale = (dim // heads) ** -0.5 if scale is None else scale
        self.qk, self.v, self.out = nn.Linear(dim, 2 * dim, qkv_bias), nn.Linear(dim, dim, qkv_bias), nn.Linear(dim, dim)
        self.position, self.gate = nn.Linear(3, heads), nn.Parameter(torch.full((heads,), gate))
        self.drop = nn.Dropout(proj_dropout)
        self.apply(small_values)
        if local_init:
            self.start_local(locality)

    @torch.no_grad()
    def start_local(self, locality: float) -> None:
        side = math.isqrt(self.heads)
        centre = (side - 1) / 2 if side % 2 == 0 else side // 2
        nn.init.eye_(self.v.weight)
        at = torch.arange(side**2, device=self.position.weight.device)
        place = torch.stack((2 * (at // side - centre), 2 * (at % side - centre), torch.full_like(at, -1)), -1)
        self.position.weight[: side**2] = place.to(self.position.weight.dtype)
        self.position.weight.mul_(locality)

    def scores(self, x: Tensor, shape: tuple[int, int] | None) -> tuple[Tensor, Tensor, Tensor]:
        """q and k (B, H, N, D), and scores of places (1, H, N, N)."""
        q, k = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qk(x).chunk(2, -1))
        at = offsets(known_grid(x.shape[1], shape), x.device)  # squares of distances are whole numbers that half precision would round
        weight, bias = (p.to(torch.promote_types(p.dtype, torch.float32)) for p in (self.position.weight, self.position.bias))
        place = bias[:, None, None] + sum(weight[:, c, None, None] * at[..., c] for c in range(3))
        return q, k, place[None].to(q.dtype)

    def weights(self, x: Tensor, shape: tuple[int, int] | None = None) -> Tensor:
        """A (B, H, N, N), rows of which sum to one."""
        q, k, place = self.scores(x, shape)
        share = torch.sigmoid(self.gate)[:, None, None]
        return (1 - share) * F.softmax(q @ k.mT * self.scale, -1) + share * F.softmax(place, -1)

    @takes(x="batch tokens dim")
    def forward(self, x: Tensor, shape: tuple[int, int] | None = None) -> Tensor:
        q, k, place = self.scores(x, shape)
        v = self.v(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        if self.training and self.dropout:
            read = F.dropout(self.weights(x, shape), self.dropout) @ v
        else:  # the two softmaxes apart, neither matrix of which need be held
            none = q.new_zeros(1, self.heads, x.shape[1], q.shape[-1]).expand_as(q)
            share = torch.sigmoid(self.gate)[:, None, None]
            read = (1 - share) * attend(q, k, v, scale=self.scale) + share * attend(none, none, v, BIASED, position_bias=place)
        return self.drop(self.out(read.transpose(1, 2).flatten(-2)))  # type: ignore[no-any-return]

    @torch.no_grad()
    def nonlocality(self, x: Tensor, shape: tuple[int, int] | None = None) -> Tensor:
        """Mean distance, in tokens, at which each head (H,) reads: 1/N sum_ij A_ij |delta_ij|, over the batch."""
        distance = offsets(known_grid(x.shape[1], shape), x.device)[..., 2].to(x.dtype).sqrt()
        return (self.weights(x, shape) * distance).sum(-1).mean((0, 2))


@torch.no_grad()
def conv_to_gpsa(conv: nn.Conv2d, locality: float = 20.0, gate: float = 30.0) -> GPSA:
    """A layer of k^2 heads that is the convolution (k x k, k odd, stride 1, same padding, no groups) at tokens whose neighbours are all on the
    grid: head h reads one neighbour, and W_v, W_o are the factors of its tap. A head holds dim / k^2 channels, so taps must be of that rank.

    locality, gate: alpha, and lam of all heads; what other tokens get falls as exp(-locality) and exp(-gate).
    """
    k, dim, groups = conv.kernel_size[0], conv.in_channels, conv.groups
    if (
        conv.kernel_size != (k, k)
        or k % 2 == 0
        or conv.out_channels != dim
        or conv.stride != (1, 1)
        or conv.dilation != (1, 1)
        or groups != 1
    ):
        raise RegardError(f"conv is {conv}; expected k x k with k odd, stride 1, no dilation or groups, and as many channels out as in")
    if dim % k**2:
        raise RegardError(f"conv has {dim} channels; expected a multiple of its {k**2} taps, a head each")
    made, width = GPSA(dim, k**2, locality, gate=gate).to(conv.weight), dim // k**2
    for head in range(k**2):
        tap = conv.weight[:, :, head % k, head // k]  # a head's offset: column head // k, row head % k
        u, s, vh = torch.linalg.svd(tap.double())
        if float(s[width:].sum()) > 1e-5 * float(s[0]):
            raise RegardError(f"tap {head} of conv has rank above {width}; expected at most channels / k^2, what a head holds")
        part = slice(head * width, (head + 1) * width)
        made.out.weight[:, part], made.v.weight[part] = (u[:, :width] * s[:width]).to(tap.dtype), vh[:width].to(tap.dtype)
    nn.init.zeros_(made.out.bias)
    if conv.bias is not None:
        made.out.bias.copy_(conv.bias)
    return made


class ConViTBlock(nn.Module):
    """x + attention(LN x), then x + MLP(LN x). local: GPSA in place of plain attention."""

    def __init__(self, dim: int, heads: int, local: bool, ratio: float, locality: float, dropout: float, drop_path: float, eps: float):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps), nn.LayerNorm(dim, eps)
        self.mlp, self.drop = FeedForward(dim, int(dim * ratio), dropout).apply(small_values), DropPath(drop_path)
        self.attention: nn.Module
        if local:
            self.attention = GPSA(dim, heads, locality, proj_dropout=dropout)
        else:
            self.attention = TokenAttention(dim, heads, proj_dropout=dropout).apply(small_values)

    def forward(self, x: Tensor, shape: tuple[int, int]) -> Tensor:
        y = self.norm1(x)
        x = x + self.drop(self.attention(y, shape) if isinstance(self.attention, GPSA) else self.attention(y))
        return x + self.drop(self.mlp(self.norm2(x)))  # type: ignore[no-any-return]


class ConViT(nn.Module):
    """Images (B, channels, side, side) -> logits (B, classes): patches and a learned place each, `local` blocks of GPSA, then the class token joins
    and plain blocks follow. width: channels a head; Ti, S and B have 4, 9 and 16 heads."""

    def __init__(
        self,
        heads: int = 4,
        width: int = 48,
        depth: int = 12,
        local: int = 10,
        *,
        side: int = 224,
        patch: int = 16,
        channels: int = 3,
        classes: int = 1000,
        ratio: float = 4.0,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        locality: float = 1.0,
        positions: bool = True,
        eps: float = 1e-6,
    ):
        super().__init__()
        if side % patch or not 0 <= local < depth:
            raise RegardError(
                f"side={side}, patch={patch}, local={local}, depth={depth}; expected a multiple of patch, and local below depth"
            )
        dim = heads * width
        self.channels, self.local, self.grid = channels, local, (side // patch, side // patch)
        self.patches = Patches(channels, dim, patch)
        self.token = nn.Parameter(torch.zeros(1, 1, dim))
        self.places = nn.Parameter(torch.zeros(1, self.grid[0] ** 2, dim)) if positions else None
        self.drop, (rates,) = nn.Dropout(dropout), depth_rates(drop_path, [depth])
        self.blocks = nn.ModuleList(
            [ConViTBlock(dim, heads, at < local, ratio, locality, dropout, rate, eps) for at, rate in enumerate(rates)]
        )
        self.norm, self.head = nn.LayerNorm(dim, eps), nn.Linear(dim, classes).apply(small_values)
        for table in (self.token, self.places):
            if table is not None:
                nn.init.trunc_normal_(table, std=0.02)

    @takes(x="batch channels height width")
    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x)
        if x.shape[2:] != self.grid:
            raise RegardError(f"x makes a grid of {tuple(x.shape[2:])} patches; expected {self.grid}")
        x = x.flatten(2).transpose(1, 2)
        x = self.drop(x if self.places is None else x + self.places)
        for at, block in enumerate(self.blocks):
            x = torch.cat((self.token.expand(len(x), -1, -1), x), 1) if at == self.local else x
            x = block(x, self.grid)
        return self.head(self.norm(x)[:, 0])  # type: ignore[no-any-return]
