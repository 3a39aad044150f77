"""Flash window attention: whole small windows at once, features streamed, nothing of L x L kept for backward (Zhang, 2025).

S = scale sum_f Q_f K_f^T + bias (+ mask);  O_f = softmax(S) V_f;  backward makes P again, dS = P (dP - rowsum(dP P))
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from regard.catalog.registry import register
from regard.errors import RegardError
from regard.nn.images.windows import from_windows, to_windows
from regard.nn.parts import takes


def scores(q: Tensor, k: Tensor, bias: Tensor | None, mask: Tensor | None, scale: float, chunk: int) -> Tensor:
    """softmax of the scores, accumulated over chunks of features."""
    s = torch.zeros(*q.shape[:-1], k.shape[-2], dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    for a, b in zip(q.split(chunk, -1), k.split(chunk, -1), strict=True):
        s += (a @ b.transpose(-1, -2)).to(s.dtype)
    s *= scale
    if bias is not None:
        s += bias
    if mask is not None:  # (windows, L, L), added; batches of windows follow one another
        s = (s.unflatten(0, (-1, mask.shape[0])) + mask[:, None]).flatten(0, 1)
    return s.softmax(-1).to(q.dtype)


class FlashWindow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, scale: float, chunk: int) -> Tensor:
        ctx.save_for_backward(q, k, v, *(x for x in (bias, mask) if x is not None))
        ctx.has, ctx.scale, ctx.chunk = (bias is not None, mask is not None), scale, chunk
        p = scores(q, k, bias, mask, scale, chunk)
        return torch.cat([p @ part for part in v.split(chunk, -1)], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *rest = ctx.saved_tensors
        bias = rest.pop(0) if ctx.has[0] else None
        mask = rest.pop(0) if ctx.has[1] else None
        p, d_out = scores(q, k, bias, mask, ctx.scale, ctx.chunk), grads[0]
        turned, d_p = p.transpose(-1, -2), torch.zeros_like(p)
        d_v = []
        for part, value in zip(d_out.split(ctx.chunk, -1), v.split(ctx.chunk, -1), strict=True):
            d_v.append(turned @ part)
            d_p += part @ value.transpose(-1, -2)
        d_s = p * (d_p - (d_p * p).sum(-1, keepdim=True))
        d_q = [ctx.scale * d_s @ part for part in k.split(ctx.chunk, -1)]
        d_k = [ctx.scale * d_s.transpose(-1, -2) @ part for part in q.split(ctx.chunk, -1)]
        d_bias = d_s.sum_to_size(bias.shape) if bias is not None and ctx.needs_input_grad[3] else None
        return torch.cat(d_q, -1), torch.cat(d_k, -1), torch.cat(d_v, -1), d_bias, None, None, None


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, mask: Tensor | None = None, scale: float | None = None, chunk: int = 16
) -> Tensor:
    """q, k, v (windows * B, H, L, D), L up to a few hundred -> (windows * B, H, L, D).

    bias: added, broadcastable to (H, L, L), differentiable. mask: (windows, L, L), added (0 or -inf), the windows of an image in turn.
    chunk: features a step; the result does not depend on it beyond rounding.
    """
    if q.dim() != 4 or (mask is not None and q.shape[0] % mask.shape[0]):
        raise RegardError(f"q has shape {tuple(q.shape)}: expected (windows * B, H, L, D), windows as in the mask")
    out: Tensor = FlashWindow.apply(q, k, v, bias, mask, q.shape[-1] ** -0.5 if scale is None else scale, chunk)
    return out


def region_mask(height: int, width: int, size: int, shift: int) -> Tensor:
    """(windows, size^2, size^2), added: tokens that were no neighbours before the shift do not see each other."""
    region = torch.zeros(height, width)
    cuts = (slice(0, -size), slice(-size, -shift), slice(-shift, None))
    for number, (a, b) in enumerate((a, b) for a in cuts for b in cuts):
        region[a, b] = number
    ids = to_windows(region[None, :, :, None], size)[..., 0]
    return torch.where(ids[:, :, None] == ids[:, None], 0.0, float("-inf"))


@register("flash-window-attention", kind="module")
class SwinWindowAttention(nn.Module):
    """x (B, H, W, dim) -> (B, H, W, dim): attention in windows of `window`^2, shifted by `shift`, with a learned relative bias.

    flash: the streamed path; False runs the plain one (same values). H and W multiples of the window.
    """

    def __init__(self, dim: int, heads: int, window: int = 7, shift: int = 0, *, flash: bool = True, chunk: int = 16):
        super().__init__()
        self.dim = dim
        if not 0 <= shift < window or dim % heads:
            raise RegardError(f"shift={shift}, window={window}, dim={dim}, heads={heads}: expected 0 <= shift < window, and a multiple")
        self.heads, self.window, self.shift, self.flash, self.chunk = heads, window, shift, flash, chunk
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.table = nn.Parameter(0.02 * torch.randn((2 * window - 1) ** 2, heads))

    def bias(self) -> Tensor:
        """(heads, L, L): the table at (dy + w - 1) (2 w - 1) + dx + w - 1."""
        at = torch.arange(self.window, device=self.table.device)
        y, x = (c.flatten() for c in torch.meshgrid(at, at, indexing="ij"))
        index = (y[:, None] - y + self.window - 1) * (2 * self.window - 1) + x[:, None] - x + self.window - 1
        return self.table[index].permute(2, 0, 1)

    @takes(x="batch height width dim")
    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        if height % self.window or width % self.window:
            raise RegardError(f"a map of {height} x {width} with window={self.window}; expected multiples")
        mask = region_mask(height, width, self.window, self.shift).to(x) if self.shift else None
        x = x.roll((-self.shift, -self.shift), (1, 2)) if self.shift else x
        q, k, v = self.qkv(to_windows(x, self.window)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if self.flash:
            o = window_attention(q, k, v, self.bias(), mask, chunk=self.chunk)
        else:
            o = scores(q, k, self.bias(), mask, q.shape[-1] ** -0.5, q.shape[-1]) @ v
        o = from_windows(self.out(o.transpose(1, 2).flatten(-2)), self.window, height, width)
        return o.roll((self.shift, self.shift), (1, 2)) if self.shift else o
