"""ASA: layers that look around and layers that look far, in turn, over latent keys and values (id 246; 2025).

local: sliding window over k = [W_UK c; rope(W_KR x)], v = W_UV c, c = RMSNorm(W_D x);  global: g_cmp o_cmp + g_slc o_slc over a latent c^g
for each group of heads, k = W_UK^h c^g, v = W_UV^h c^g;  a layer caches its latents alone
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from regard.algebra import Causal, Rope, Window
from regard.algebra.blocks import probabilities
from regard.algebra.compressed import best_blocks, group_sum, kernel_probabilities, kernels, shared_units
from regard.catalog.registry import register
from regard.engine.door import attend
from regard.errors import RegardError
from regard.nn.compressed_sparse import NSAAttention, check_sizes
from regard.nn.parts import whole


@dataclass
class LatentCache:
    """What a layer keeps: latents (B, n, G, R), rotated shared keys (B, n, Dr) in local layers, and how many tokens it has seen."""

    latents: Tensor
    keys: Tensor | None
    position: int

    @property
    def floats(self) -> int:
        """Numbers kept for one sequence."""
        return sum(x[0].numel() for x in (self.latents, self.keys) if x is not None)


class LatentAttention(nn.Module):
    """What both kinds share: queries (B, H, L, D), latents for `groups` of heads, and the weights that open them."""

    def __init__(self, dim: int, heads: int, head_dim: int, groups: int, rank: int):
        super().__init__()
        if heads % groups:
            raise RegardError(f"heads={heads} is not a multiple of groups={groups}")
        self.heads, self.head_dim, self.groups, self.rank = heads, head_dim, groups, rank
        self.q = nn.Linear(dim, heads * head_dim, False)
        self.down, self.norm = nn.Linear(dim, groups * rank, False), nn.RMSNorm(rank)
        self.up_k = nn.Parameter(torch.randn(heads, rank, head_dim) * rank**-0.5)
        self.up_v = nn.Parameter(torch.randn(heads, rank, head_dim) * rank**-0.5)
        self.out = nn.Linear(heads * head_dim, dim, False)

    def queries(self, x: Tensor) -> Tensor:
        return self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # type: ignore[no-any-return]

    def latents(self, x: Tensor) -> Tensor:
        """(B, L, G, R)."""
        return self.norm(self.down(x).unflatten(-1, (self.groups, -1)))  # type: ignore[no-any-return]

    def opened(self, c: Tensor) -> tuple[Tensor, Tensor]:
        """k and v (B, H, L, D) of latents."""
        each = c.transpose(1, 2).repeat_interleave(self.heads // self.groups, 1)
        return each @ self.up_k, each @ self.up_v

    def absorbed(self, q: Tensor) -> Tensor:
        """Queries that score latents as q scores opened keys: (B, H, L, R)."""
        return q @ self.up_k.transpose(-1, -2)

    def close(self, o: Tensor) -> Tensor:
        return self.out(o.transpose(1, 2).flatten(-2))  # type: ignore[no-any-return]


class LocalLatentAttention(LatentAttention):
    """Sliding-window attention over a latent and one rotary key for all heads. x (B, L, dim) -> (B, L, dim); the cache holds `window` tokens."""

    def __init__(self, dim: int, heads: int, *, head_dim: int | None = None, rank: int = 64, rope_dim: int = 16, window: int = 512):
        d = head_dim or dim // heads
        super().__init__(dim, heads, d, 1, rank)
        self.q_rope, self.k_rope = nn.Linear(dim, heads * rope_dim, False), nn.Linear(dim, rope_dim, False)
        self.rope, self.window, self.scale = Rope(), window, (d + rope_dim) ** -0.5

    def rotary(self, x: Tensor, first: int) -> tuple[Tensor, Tensor]:
        at = torch.arange(first, first + x.shape[1], device=x.device)
        q = self.q_rope(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return self.rope.rotate(q, at), self.rope.rotate(self.k_rope(x), at)

    def forward(self, x: Tensor) -> Tensor:
        q_turned, k_turned = self.rotary(x, 0)
        k, v = self.opened(self.latents(x))
        q = torch.cat((self.queries(x), q_turned), -1)
        k = torch.cat((k, k_turned[:, None].expand(-1, self.heads, -1, -1)), -1)
        return self.close(attend(q, k, v, mask=Causal() & Window(self.window), scale=self.scale))

    @whole
    def step(self, x: Tensor, cache: LatentCache | None = None) -> tuple[Tensor, LatentCache]:
        """New tokens (B, n, dim), one after another, with absorbed weights: keys and values are never opened."""
        outs = []
        for token in x.split(1, 1):
            first = 0 if cache is None else cache.position
            q_turned, k_turned = self.rotary(token, first)
            c = self.latents(token)
            if cache is not None:
                assert cache.keys is not None
                c, k_turned = torch.cat((cache.latents, c), 1), torch.cat((cache.keys, k_turned), 1)
            c, k_turned = c[:, -self.window :], k_turned[:, -self.window :]
            cache = LatentCache(c, k_turned, first + 1)
            s = self.absorbed(self.queries(token)) @ c.permute(0, 2, 3, 1) + q_turned @ k_turned[:, None].transpose(-1, -2)
            o = (s * self.scale).softmax(-1) @ c.transpose(1, 2)
            outs.append(self.close(o @ self.up_v))
        assert cache is not None
        return torch.cat(outs, 1), cache

    def cache_floats(self, length: int) -> int:
        return min(length, self.window) * (self.rank + self.k_rope.out_features)


class GlobalLatentAttention(LatentAttention):
    """Compression and selection over one latent a group of heads, no positions. `gates` (B, L, 2 H) are sigmoid(W x); fix_gates: (g_cmp,
    g_slc) instead."""

    def __init__(
        self, dim: int, heads: int, *, head_dim: int | None = None, groups: int = 1, rank: int | None = None, size: int = 32,
        stride: int = 16, block_size: int = 64, top_k: int = 16, fix_gates: tuple[float, float] | None = None,
    ):  # fmt: skip
        check_sizes(size, stride, block_size, top_k, 1)
        d = head_dim or dim // heads
        super().__init__(dim, heads, d, groups, rank or 2 * d)
        self.size, self.stride, self.block_size, self.top_k = size, stride, block_size, top_k
        self.gates, self.fix_gates = nn.Linear(dim, 2 * heads), fix_gates

    def gate(self, x: Tensor) -> Tensor:
        """(2, B, H, L, 1)."""
        if self.fix_gates is not None:
            return torch.tensor(self.fix_gates, dtype=x.dtype, device=x.device).view(2, 1, 1, 1, 1)
        return torch.sigmoid(self.gates(x)).unflatten(-1, (2, self.heads)).permute(2, 0, 3, 1)[..., None]

    def over_latents(self, x: Tensor, c: Tensor, first: int) -> Tensor:
        """Outputs (B, H, n, D) of tokens x at first, ... over latents c (B, t, G, R) so far."""
        q, shared = self.absorbed(self.queries(x)) * self.head_dim**-0.5, c.transpose(1, 2)
        pooled = kernels(shared, self.size, self.stride)
        p = kernel_probabilities(q, pooled, first, self.size, self.stride)
        group = self.heads // self.groups
        o_cmp = p @ pooled.repeat_interleave(group, 1)
        length = c.shape[1]
        at, keys = torch.arange(first, first + x.shape[1], device=x.device)[:, None], torch.arange(length, device=x.device)
        seen = keys <= at
        blocks = -(-length // self.block_size)
        if self.top_k < blocks:
            mass = shared_units(group_sum(p, self.groups), self.size, self.stride, self.block_size, blocks)
            keep = best_blocks(mass, first, self.block_size, self.top_k, self.heads).keep
            seen = seen & keep.repeat_interleave(self.block_size, -1)[..., :length]
        latents = shared.repeat_interleave(group, 1)
        weights = probabilities(q @ latents.transpose(-1, -2), seen)
        g = self.gate(x)
        return (g[0] * o_cmp + g[1] * (weights @ latents)) @ self.up_v

    def forward(self, x: Tensor) -> Tensor:
        c, rows = self.latents(x), []
        for start in range(0, x.shape[1], 256):  # no matrix wider than 256 rows
            part = x[:, start : start + 256]
            rows.append(self.over_latents(part, c[:, : start + part.shape[1]], start))
        return self.close(torch.cat(rows, 2))

    @whole
    def step(self, x: Tensor, cache: LatentCache | None = None) -> tuple[Tensor, LatentCache]:
        first, c = 0 if cache is None else cache.position, self.latents(x)
        c = c if cache is None else torch.cat((cache.latents, c), 1)
        return self.close(self.over_latents(x, c, first)), LatentCache(c, None, first + x.shape[1])

    def cache_floats(self, length: int) -> int:
        return length * self.groups * self.rank


@register("alternating-sparse-attention", kind="module")
def asa_layers(
    layers: int, dim: int, heads: int, *, window: int = 512, groups: int = 1, rank: int | None = None, rope_dim: int = 16,
    size: int = 32, stride: int = 16, block_size: int = 64, top_k: int = 16,
) -> list[nn.Module]:  # fmt: skip
    """Mixers for `Decoder`: local layers at 1, 3, ... (counted from one), global ones between them."""
    latent = rank or 2 * (dim // heads)
    made: list[nn.Module] = []
    for layer in range(layers):
        if layer % 2 == 0:
            made.append(LocalLatentAttention(dim, heads, rank=latent, rope_dim=rope_dim, window=window))
        else:
            made.append(
                GlobalLatentAttention(dim, heads, groups=groups, rank=latent, size=size, stride=stride, block_size=block_size, top_k=top_k)
            )
    return made


def cache_floats(layers: list[nn.Module], length: int) -> float:
    """Numbers kept a token of a sequence of `length`, over all layers."""
    return sum(layer.cache_floats(length) for layer in layers if isinstance(layer, CACHED)) / length


CACHED = (LocalLatentAttention, GlobalLatentAttention, NSAAttention)
