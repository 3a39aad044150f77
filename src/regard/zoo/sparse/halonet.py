"""HaloNet: blocks of queries read the block and a halo around it (Vaswani et al., 2021).

o_ij = softmax over the (b + 2h)^2 patch of (scale q_ij.k_ab + q_ij.(rel_h[a - i] + rel_w[b - j])) v_ab
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.algebra import Input, Weighted
from regard.catalog.registry import register
from regard.engine.door import attend
from regard.errors import RegardError
from regard.nn.parts import takes


def biased(s: Tensor, relative: Tensor, real: Tensor) -> Tensor:
    return torch.where(real, s + relative, -1e30)


PATCHES = Weighted(position=biased, inputs=(Input("relative", "bhqk"), Input("real", "bk", dtype="bool")))


@register("halonet", kind="module")
class HaloAttention2d(nn.Module):
    """x (B, C, H, W) -> (B, out, H / stride, W / stride); H and W multiples of `block`.

    block, halo: b and h. stride: queries a block are taken every so many pixels, keys from the whole patch. head_dim: of q and k;
    value_dim: of v. masked: padded keys are not attended to (False: zero keys are, as published code does). relative: "unscaled" (on q as
    it is, as released), "scaled" (on scale q) or "none". bias: of q, k and v. project: a 1x1 convolution (with a bias) on the output even where
    its width is right. pool: stride by averaging the output instead. steps: relative places count pixels ("pixels"), or queries of the
    down-sampled block, as released where stride > 1 ("queries").
    """

    def __init__(
        self, dim: int, out: int | None = None, heads: int = 8, *, block: int = 8, halo: int = 3, stride: int = 1, head_dim: int = 16,
        value_dim: int | None = None, masked: bool = True, relative: str = "unscaled", bias: bool = False, project: bool = False,
        pool: bool = False, steps: str = "pixels",
    ):  # fmt: skip
        super().__init__()
        self.dim = dim
        out = out or dim
        if block % stride or halo < 0 or relative not in ("unscaled", "scaled", "none") or steps not in ("pixels", "queries"):
            raise RegardError(
                f"block={block}, stride={stride}, halo={halo}, relative={relative!r}, steps={steps!r}: expected stride | block, halo >= 0, "
                "unscaled, scaled or none, and pixels or queries"
            )
        self.heads, self.block, self.halo, self.masked, self.relative = heads, block, halo, masked, relative
        self.stride, self.pool = (1, stride) if pool else (stride, 1)
        self.step_of_query = self.stride if steps == "pixels" else 1
        self.head_dim, self.value_dim = head_dim, value_dim or out // heads
        self.patch = block + 2 * halo
        self.q = nn.Conv2d(dim, heads * head_dim, 1, bias=bias)
        self.kv = nn.Conv2d(dim, heads * (head_dim + self.value_dim), 1, bias=bias)
        self.rel_h, self.rel_w = (nn.Parameter(torch.randn(2 * self.patch - 1, head_dim) * head_dim**-0.5) for _ in range(2))
        wide = heads * self.value_dim
        self.project = nn.Conv2d(wide, out, 1, bias=project) if project or wide != out else nn.Identity()

    def patches(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, blocks, patch^2), zeros outside the map."""
        b, h, p = self.block, self.halo, self.patch
        found = F.pad(x, (h, h, h, h)).unfold(2, p, b).unfold(3, p, b)
        return found.flatten(4).flatten(2, 3)

    def relative_logits(self, q: Tensor) -> Tensor:
        """q (n, heads, queries, D) of one block each -> (n, heads, queries, patch^2)."""
        side = self.block // self.stride
        at = torch.arange(side, device=q.device) * self.step_of_query
        # q.rel[a - i]: row a of the patch against pixel i of the block, which stands at i + halo in the patch.
        index = torch.arange(self.patch, device=q.device) - at[:, None] - self.halo + self.patch - 1
        q = q.unflatten(2, (side, side))
        rows = torch.einsum("nhijd,iad->nhija", q, self.rel_h[index])
        columns = torch.einsum("nhijd,jbd->nhijb", q, self.rel_w[index])
        return (rows[..., :, None] + columns[..., None, :]).flatten(-2).flatten(2, 3)

    @takes(x="batch dim height width")
    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        b, s = self.block, self.stride
        if height % b or width % b:
            raise RegardError(f"a map of {height} x {width} with block={b}; expected multiples")
        rows, columns, side = height // b, width // b, b // s
        q = self.q(x)[..., ::s, ::s].unflatten(3, (columns, side)).unflatten(2, (rows, side)).permute(0, 2, 4, 3, 5, 1)
        q = q.reshape(batch * rows * columns, side * side, self.heads, self.head_dim).transpose(1, 2)
        kv = self.patches(self.kv(x)).unflatten(1, (self.heads, -1)).permute(0, 3, 1, 4, 2).flatten(0, 1)
        k, v = kv.split((self.head_dim, self.value_dim), -1)
        real = (
            self.patches(torch.ones_like(x[:1, :1]))[0, 0] > 0
            if self.masked
            else torch.ones(rows * columns, self.patch**2, dtype=torch.bool, device=x.device)
        )
        scale = self.head_dim**-0.5
        logits = (
            torch.zeros_like(q[..., :1]) if self.relative == "none" else self.relative_logits(q * scale if self.relative == "scaled" else q)
        )
        o = attend(q, k, v, PATCHES, scale=scale, relative=logits, real=real.repeat(batch, 1))
        o = o.unflatten(0, (batch, rows, columns)).unflatten(4, (side, side)).permute(0, 3, 6, 1, 4, 2, 5)
        o = self.project(o.reshape(batch, self.heads * self.value_dim, rows * side, columns * side))
        return F.avg_pool2d(o, self.pool) if self.pool > 1 else o


class HaloBlock(nn.Module):
    """A bottleneck: 1x1 convolution, halo attention, 1x1 convolution, with a residual (strided where the attention is)."""

    def __init__(self, dim: int, out: int, *, ratio: int = 2, heads: int = 4, block: int = 8, halo: int = 3, stride: int = 1):
        super().__init__()
        inner = out // ratio
        self.body = nn.Sequential(
            nn.Conv2d(dim, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.SiLU(),
            HaloAttention2d(inner, inner, heads, block=block, halo=halo, stride=stride, head_dim=16), nn.BatchNorm2d(inner), nn.SiLU(),
            nn.Conv2d(inner, out, 1, bias=False), nn.BatchNorm2d(out),
        )  # fmt: skip
        same = dim == out and stride == 1
        self.skip = nn.Identity() if same else nn.Sequential(nn.Conv2d(dim, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.body(x) + self.skip(x))


class HaloNet(nn.Module):
    """Images (B, channels, H, W) -> logits: a convolution and stages of halo bottlenecks, each but the first halving the map."""

    def __init__(self, classes: int, channels: int = 3, widths: tuple[int, ...] = (32, 64), *, block: int = 4, halo: int = 1):
        super().__init__()
        self.stem = nn.Conv2d(channels, widths[0], 3, padding=1, bias=False)
        before = (widths[0], *widths[:-1])
        self.stages = nn.Sequential(
            *[
                HaloBlock(a, b, block=block, halo=halo, stride=1 if at == 0 else 2)
                for at, (a, b) in enumerate(zip(before, widths, strict=True))
            ]
        )
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(self.stem(x)).mean((-1, -2)))  # type: ignore[no-any-return]
