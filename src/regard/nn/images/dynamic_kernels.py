"""Kernels that a map makes for itself: every pixel's own weights over its window, read off its affinity to tokens of the whole plane."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import RegardError
from .planes import BatchNorm


def window_starts(length: int, kernel: int, device: torch.device | None = None) -> Tensor:
    """Where the window of each of `length` pixels begins: around it, shifted inside at the ends."""
    return (torch.arange(length, device=device) - kernel // 2).clamp(0, length - kernel)


def window_sums(v: Tensor, weights: Tensor, kernel: int) -> Tensor:
    """sum over a window's pixels of weight times value: v (B, G, C, H, W), weights (B, G, H, W, kernel^2), row by row -> (B, G, C, H, W)."""
    height, width = v.shape[-2:]
    reach = torch.arange(kernel, device=v.device)
    rows = window_starts(height, kernel, v.device)[:, None] + reach
    columns = window_starts(width, kernel, v.device)[:, None] + reach
    out = torch.zeros_like(v)
    for at in range(kernel):  # a row of the windows at a time: kernel times the map is held, not its square
        seen = v[..., rows[:, at], :][..., columns]
        out = out + torch.einsum("bghwk,bgchwk->bgchw", weights[..., at * kernel : (at + 1) * kernel], seen)
    return out


def window_bias(table: Tensor, height: int, width: int) -> Tensor:
    """The entry (key - query + k - 1) of a table (G, 2k - 1, 2k - 1) for every pixel and every pixel of its window: (G, H, W, k^2)."""
    kernel = (table.shape[-1] + 1) // 2
    reach = torch.arange(kernel, device=table.device) + kernel - 1
    down, across = (window_starts(n, kernel, table.device) - torch.arange(n, device=table.device) for n in (height, width))
    rows, columns = down[:, None] + reach, across[:, None] + reach
    return table[:, rows[:, None, :, None], columns[None, :, None, :]].flatten(-2)


class DynamicKernels(nn.Module):
    """query (B, dim, H, W), context (B, context, H', W'), value (B, dim, H, W) -> (B, dim, H, W).

    q = BN(W_q query) / sqrt(dim / G), keys = BN(W_k of the context's mean over pool x pool cells), G = 2 heads groups; q . keys (pool^2 numbers a
    pixel and group) through one linear map are the logits of a window of small^2 and one of kernel^2 pixels, plus a relative table each, softmax;
    the first half of the value's channels is summed with the small window, the second with the large one.
    std: of the tables' first values (0: zeros).
    """

    def __init__(self, dim: int, context: int, kernel: int = 7, small: int = 5, heads: int = 2, pool: int = 7, std: float = 0.0):
        super().__init__()
        self.groups = 2 * heads
        if kernel % 2 == 0 or small % 2 == 0 or not 1 <= small <= kernel:
            raise RegardError(f"kernel={kernel}, small={small}; expected odd sizes, and small at most kernel")
        if dim % (2 * self.groups):
            raise RegardError(f"dim={dim}; expected a multiple of 4 heads = {2 * self.groups}")
        self.kernel, self.small, self.pool, self.scale = kernel, small, pool, (dim // self.groups) ** -0.5
        self.query = nn.Sequential(nn.Conv2d(dim, dim // 2, 1, bias=False), BatchNorm(dim // 2))
        self.key = nn.Sequential(nn.Conv2d(context, dim // 2, 1, bias=False), BatchNorm(dim // 2))
        self.logits = nn.Linear(pool**2, small**2 + kernel**2)
        tables = (torch.zeros(self.groups, 2 * k - 1, 2 * k - 1) for k in (small, kernel))
        self.near, self.far = (nn.Parameter(nn.init.trunc_normal_(x, std=std) if std else x) for x in tables)

    def working_size(self, height: int, width: int) -> tuple[int, int]:
        """Maps smaller than the window are stretched until their shorter side holds it."""
        if min(height, width) >= self.kernel:
            return height, width
        if height < width:
            return self.kernel, int(self.kernel / height * width)
        return int(self.kernel / width * height), self.kernel

    def weights(self, query: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """(B, G, H, W, small^2) and (B, G, H, W, kernel^2)."""
        q = self.scale * self.query(query).unflatten(1, (self.groups, -1)).flatten(3)
        k = self.key(F.adaptive_avg_pool2d(context, self.pool)).unflatten(1, (self.groups, -1)).flatten(3)
        logits = self.logits(q.mT @ k).unflatten(2, tuple(query.shape[2:]))
        parts = logits.split([self.small**2, self.kernel**2], -1)
        return tuple((x + window_bias(t, query.shape[2], query.shape[3])).softmax(-1) for x, t in zip(parts, (self.near, self.far)))  # type: ignore[return-value]

    def forward(self, query: Tensor, context: Tensor, value: Tensor, project: nn.Module | None = None) -> Tensor:
        """project: of the value, behind the stretching: the statistics of a BatchNorm in it are those of the stretched map."""
        shape = (query.shape[2], query.shape[3])
        size = self.working_size(*shape)
        if size != shape:
            same = context.shape[2:] == query.shape[2:]
            query, value = (F.interpolate(x, size, mode="bilinear", align_corners=False) for x in (query, value))
            context = F.interpolate(context, size, mode="bilinear", align_corners=False) if same else context
        value = value if project is None else project(value)
        near, far = self.weights(query, context)
        first, second = value.unflatten(1, (2, self.groups, -1)).unbind(1)
        out = torch.cat((window_sums(first, near, self.small), window_sums(second, far, self.kernel)), 1).flatten(1, 2)
        return out if size == shape else F.adaptive_avg_pool2d(out, shape)
