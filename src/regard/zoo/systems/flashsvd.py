"""FlashSVD: attention and feed-forward layers of low rank that never hold what their factors make (id 202; Shao et al., 2025).

W ~ (U_r S_r) V_r per head, P = x U_r S_r;   Q, K, V tiles are P V + b, rebuilt where an online softmax reads them
feed-forward y = act(x U1 V1 + b1) U2 V2 + b2: over slices of its width, T = act(P V1[:, slice] + b1), S += T U2[slice], y = S V2 + b2
Not built: the Triton kernels (the tiles run in PyTorch on any device), and a converter of whole models.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.adapt.lowrank import factorised
from regard.catalog.registry import register
from regard.errors import RegardError

Factors = tuple[Tensor, Tensor, Tensor | None]  # P (B, H or 1, L, r), V (H, r, d), b (H, d)


def checked(name: str, factors: Factors, heads: int) -> Factors:
    p, right, bias = factors
    fits = p.dim() == 4 and right.dim() == 3 and right.shape[0] == heads and p.shape[1] in (1, heads) and p.shape[3] == right.shape[1]
    if not fits or (bias is not None and bias.shape != (heads, right.shape[2])):
        shapes = [None if x is None else tuple(x.shape) for x in factors]
        raise RegardError(f"{name} {shapes}: expected (B, H or 1, L, r), (H, r, d) and (H, d) or None with H={heads}")
    return p, right, bias


def rebuilt(factors: Factors, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Rows start <= i < stop of what the factors make, (B, H, rows, d)."""
    p, right, bias = factors
    out = p[:, :, start:stop].to(dtype) @ right.to(dtype)
    return out if bias is None else out + bias[:, None].to(dtype)


@register("flashsvd", kind="function")
def flashsvd_attention(
    query: Factors,
    key: Factors,
    value: Factors,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    rotate: Callable[[Tensor, Tensor], Tensor] | None = None,
    block_q: int = 32,
    block_k: int = 32,
    absorb: bool = False,
) -> Tensor:
    """Softmax attention of queries, keys and values given as factors (P, V, b) -> (B, H, Lq, dv); no (B, H, L, d) is made but that.

    P (B, H, L, r), or (B, 1, L, r) shared by the heads; V (H, r, d); b (H, d) or None. mask (B, Lk) bool: keys that are there. causal: queries are
    aligned to the end of the keys. rotate(x, positions): put on rebuilt rows of queries and keys (rotary positions). absorb: scores from
    P_q (V_q V_k^T) P_k^T and outputs from (p P_v) V_v, which is exact too and cheaper where r is far below d; not with rotate. A query that sees
    no key gives zeros.
    """
    heads = query[1].shape[0]
    query, key, value = (checked(name, x, heads) for name, x in (("query", query), ("key", key), ("value", value)))
    batch, n, m = query[0].shape[0], query[0].shape[2], key[0].shape[2]
    if key[0].shape[0] != batch or value[0].shape[:1] + value[0].shape[2:3] != (batch, m) or query[1].shape[2] != key[1].shape[2]:
        raise RegardError("query, key, value: expected one batch, as many values as keys, and queries as wide as keys")
    if mask is not None and (mask.shape != (batch, m) or mask.dtype != torch.bool):
        raise RegardError(f"mask {tuple(mask.shape)} {mask.dtype}: expected bool {batch, m}")
    if block_q < 1 or block_k < 1 or (absorb and rotate is not None):
        raise RegardError(f"block_q={block_q}, block_k={block_k}, absorb={absorb}: expected positive blocks, and absorb without rotate")
    wide = torch.promote_types(query[0].dtype, torch.float32)
    scale, dv = query[1].shape[2] ** -0.5 if scale is None else scale, value[1].shape[2]
    rows: Factors = value
    if absorb:  # biases become one more rank of ones
        queries, keys = (with_bias(x, wide) for x in (query, key))
        middle = queries[1] @ keys[1].transpose(1, 2)
        query, key = (
            (queries[0], middle, None),
            (keys[0], torch.eye(middle.shape[2], dtype=wide, device=middle.device).expand(heads, -1, -1), None),
        )
        rows = (value[0], torch.eye(value[1].shape[1], dtype=wide, device=middle.device).expand(heads, -1, -1), None)
    out = torch.empty(batch, heads, n, dv, dtype=query[0].dtype if not absorb else value[0].dtype, device=query[0].device)
    places = torch.arange(max(n, m), device=out.device)
    for i in range(0, n, block_q):
        q = rebuilt(query, i, i + block_q, wide) * scale
        at = places[i : min(i + block_q, n)] + m - n
        q = q if rotate is None else rotate(q, at)
        top = q.new_full((*q.shape[:3], 1), -torch.inf)
        total, acc = torch.zeros_like(top), q.new_zeros(*q.shape[:3], rows[1].shape[2])
        for j in range(0, m if not causal else max(0, int(at[-1]) + 1), block_k):
            k, js = rebuilt(key, j, j + block_k, wide), places[j : min(j + block_k, m)]
            s = q @ (k if rotate is None else rotate(k, js)).transpose(-1, -2)
            if causal:
                s = s.masked_fill(js > at[:, None], -torch.inf)
            if mask is not None:
                s = s.masked_fill(~mask[:, None, None, j : j + block_k], -torch.inf)
            new = torch.maximum(top, s.amax(-1, keepdim=True))
            shift = torch.where(new.isneginf(), 0.0, new)
            p, fade = torch.exp(s - shift), torch.exp(top - shift)
            total, acc, top = total * fade + p.sum(-1, keepdim=True), acc * fade + p @ rebuilt(rows, j, j + block_k, wide), new
        o = acc / torch.where(total > 0, total, 1.0)
        if absorb:
            o = o @ value[1].to(wide)
            o = o if value[2] is None else torch.where(total > 0, o + value[2][:, None].to(wide), 0.0)
        out[:, :, i : i + block_q] = o
    return out


def with_bias(factors: Factors, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    p, right, bias = factors
    if bias is None:
        return p.to(dtype), right.to(dtype)
    return F.pad(p, (0, 1), value=1.0).to(dtype), torch.cat((right, bias[:, None]), 1).to(dtype)


def flashsvd_ffn(
    p: Tensor,
    v1: Tensor,
    b1: Tensor | None,
    u2: Tensor,
    v2: Tensor,
    b2: Tensor | None,
    activation: Callable[[Tensor], Tensor] = F.gelu,
    block: int = 128,
) -> Tensor:
    """p = x U1 (..., r1), v1 (r1, width), u2 (width, r2), v2 (r2, dim) -> (..., dim), without a tensor of the whole width."""
    if p.shape[-1] != v1.shape[0] or v1.shape[1] != u2.shape[0] or u2.shape[1] != v2.shape[0] or block < 1:
        shapes = [tuple(x.shape) for x in (p, v1, u2, v2)]
        raise RegardError(
            f"p, v1, u2, v2 {shapes}, block={block}: expected (..., r1), (r1, width), (width, r2), (r2, dim), and a positive block"
        )
    total = p.new_zeros(*p.shape[:-1], u2.shape[1])
    for at in range(0, v1.shape[1], block):
        t = p @ v1[:, at : at + block]
        total = total + activation(t if b1 is None else t + b1[at : at + block]) @ u2[at : at + block]
    out = total @ v2
    return out if b2 is None else out + b2


class FlashSVDSelfAttention(nn.Module):
    """Self-attention from a plain layer's projections, each head's factorised: x (B, L, dim) -> (B, L, dim). options: of `factorised`."""

    def __init__(
        self, q: nn.Linear, k: nn.Linear, v: nn.Linear, out: nn.Linear, heads: int, rank: int, causal: bool = False, **options: Any
    ):
        super().__init__()
        self.heads, self.causal, self.out = heads, causal, out
        for name, linear in (("q", q), ("k", k), ("v", v)):
            pairs = [factorised(w.detach().T, rank, **options) for w in linear.weight.unflatten(0, (heads, -1))]
            self.register_parameter(f"{name}_left", nn.Parameter(torch.cat([left for left, _ in pairs], 1)))
            self.register_parameter(f"{name}_right", nn.Parameter(torch.stack([right for _, right in pairs])))
            bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().unflatten(0, (heads, -1)).clone())
            self.register_parameter(f"{name}_bias", bias)

    def factors(self, name: str, x: Tensor) -> Factors:
        p = (x @ getattr(self, f"{name}_left")).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return p, getattr(self, f"{name}_right"), getattr(self, f"{name}_bias")

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        o = flashsvd_attention(*(self.factors(name, x) for name in "qkv"), mask, causal=self.causal)
        return self.out(o.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]
