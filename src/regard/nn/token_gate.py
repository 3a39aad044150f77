"""What a token expects of blocks of keys: a gate for every token and key head (SeerAttention-R; Gao et al., 2025)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..algebra import Rope
from ..algebra.blocks import HIDDEN, cut, heads_of, pooled
from ..errors import RegardError
from .parts import takes

POOLS = ("max", "min", "avg")


def pooled_by(x: Tensor, size: int, pools: tuple[str, ...]) -> Tensor:
    """What `pools` make of each block of (..., L, D), side by side in the order max, min, avg: (..., n, len(pools) D)."""
    short = -x.shape[-2] % size
    blocks = cut(torch.cat((x, x[..., -1:, :].expand(*x.shape[:-2], short, -1)), -2) if short else x, size)
    made = {"max": lambda: blocks.amax(-2), "min": lambda: blocks.amin(-2), "avg": lambda: pooled(x, size)}
    return torch.cat([made[name]() for name in POOLS if name in pools], -1)


class TokenGate(nn.Module):
    """q (B, H, n, D) of the last tokens of k (B, Hkv, L, D), before rotary positions -> logits (B, Hkv, n, blocks), -inf behind a token's own block.

    g_q = W_q [q of the query heads of a key head],   g_k = W_k [max; min; avg of a block],   logits = rope(g_q) . rope(g_k) / sqrt(width)

    rope turns g_q at its token and g_k at its block's first one. A block whose last token is behind the query is not complete, and its g_k is 0.
    width: d_g. k_pools: of "max", "min", "avg". norm: RMSNorm of g_q and g_k, with this eps (None: no norm).
    """

    def __init__(
        self,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        width: int = 128,
        block_size: int = 64,
        rope: Rope | None = None,
        k_pools: tuple[str, ...] = POOLS,
        norm: float | None = None,
    ):
        super().__init__()
        if heads % kv_heads or block_size < 1 or not k_pools or set(k_pools) - set(POOLS) or len(set(k_pools)) < len(k_pools):
            raise RegardError(
                f"heads={heads}, kv_heads={kv_heads}, block_size={block_size}, k_pools={k_pools}: expected a multiple, a positive number, and "
                f"some of {', '.join(POOLS)}, each once"
            )
        self.block_size, self.rope, self.k_pools = block_size, rope, tuple(k_pools)
        self.q = nn.Parameter(nn.init.xavier_uniform_(torch.empty(kv_heads, heads // kv_heads, head_dim, width)))
        self.k = nn.Parameter(nn.init.xavier_uniform_(torch.empty(kv_heads, len(k_pools) * head_dim, width)))
        self.q_norm, self.k_norm = (nn.Identity() if norm is None else nn.RMSNorm(width, eps=norm) for _ in range(2))

    @takes(q="batch heads queries head_dim", k="batch kv_heads length head_dim")
    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        length, size = k.shape[2], self.block_size
        if q.shape[2] > length:
            raise RegardError(f"{q.shape[2]} queries and {length} keys: queries are the last tokens of the keys; expected no more of them")
        token = torch.arange(length - q.shape[2], length, device=k.device)
        g_q = self.q_norm(torch.einsum("bhgnd,hgdw->bhnw", q.unflatten(1, (len(self.k), -1)), self.q))
        g_k = self.k_norm(pooled_by(k, size, self.k_pools) @ self.k)
        first = torch.arange(g_k.shape[2], device=k.device) * size
        if self.rope is not None:
            g_q, g_k = self.rope.rotate(g_q, token), self.rope.rotate(g_k, first)
        s = g_q @ g_k.mT * g_q.shape[-1] ** -0.5
        s = torch.where(first + size - 1 <= token[:, None], s, 0.0)
        return s.masked_fill(first > token[:, None], HIDDEN)


@torch.no_grad()
def token_maxima(q: Tensor, k: Tensor, block_size: int, rows: int = 256) -> Tensor:
    """Ground truth (B, Hkv, n, blocks) for q (B, H, n, D) at the end of k (B, Hkv, L, D): the largest causal probability of a token in each block,
    over the query heads of a key head; rows sum to one. `rows` of the matrix exist at a time."""
    length, found = k.shape[2], []
    place, keys = torch.arange(length, device=k.device), heads_of(k, q.shape[1])
    for start in range(0, q.shape[2], rows):
        part = q[:, :, start : start + rows]
        token = length - q.shape[2] + start + torch.arange(part.shape[2], device=k.device)
        p = (part @ keys.mT * q.shape[-1] ** -0.5).masked_fill(place > token[:, None], HIDDEN).softmax(-1)
        most = torch.nn.functional.pad(p, (0, -length % block_size)).unflatten(-1, (-1, block_size)).amax(-1)
        found.append(most.unflatten(1, (k.shape[1], -1)).amax(2))
    truth = torch.cat(found, 2)
    return truth / truth.sum(-1, keepdim=True)
