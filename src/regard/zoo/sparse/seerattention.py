"""SeerAttention: a small gate learns from the dense attention which blocks matter (Gao et al., 2024).

G = rope(W_q avg(Q_u)) . rope(W_k [max; min; avg](K_w)) / sqrt(d_g);  trained: KL(GT || softmax G), GT_uw = max of the probabilities in (u, w)
Trained together: the loss of the model, whose sparse attention `forward` is, plus `distil` times a scale. Decoding: `SeerDecoding`, whose gate
scores blocks for every token and key head (SeerAttention-R).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from regard.algebra import Causal, Chosen, Input, Rope, Selection, View, Weighted
from regard.algebra.blocks import HIDDEN, heads_of, top_k
from regard.catalog.registry import register
from regard.engine.door import attend
from regard.errors import RegardError
from regard.nn.parts import takes
from regard.nn.token_gate import POOLS, TokenGate, pooled_by, token_maxima


class AttnGate(nn.Module):
    """q (B, H, L, D), k (B, Hkv, L, D), both before rotary positions -> logits (B, H, nq, nk), block-causal ones finite.

    width: d_g. rope: rotate pooled q and k at the first position of their blocks (base: of the angles). q_pools, k_pools: of "max", "min",
    "avg", what blocks are pooled to. map_q: whether pooled q has a map of its own; without (one pool, width = head_dim) k has a map a query head.
    """

    def __init__(
        self, heads: int, kv_heads: int, head_dim: int, *, width: int = 128, block_size: int = 64, rope: bool = True,
        q_pools: tuple[str, ...] = ("avg",), k_pools: tuple[str, ...] = POOLS, map_q: bool = True, base: float = 10000.0,
    ):  # fmt: skip
        super().__init__()
        for name, pools in (("q_pools", q_pools), ("k_pools", k_pools)):
            if not pools or set(pools) - set(POOLS) or len(set(pools)) < len(pools):
                raise RegardError(f"{name}={pools}; expected some of {', '.join(POOLS)}, each once")
        if not map_q and (len(q_pools) > 1 or width != head_dim):
            raise RegardError(f"map_q=False with q_pools={q_pools}, width={width}: expected one pool and width=head_dim={head_dim}")
        if heads % kv_heads:
            raise RegardError(f"heads={heads}, kv_heads={kv_heads}: expected a multiple")
        self.block_size, self.rope, self.pools = block_size, Rope(base) if rope else None, (tuple(q_pools), tuple(k_pools))
        rows = len(q_pools) * head_dim, len(k_pools) * head_dim
        self.q = nn.Parameter(torch.randn(heads, rows[0], width) * rows[0] ** -0.5) if map_q else None
        self.k = nn.Parameter(torch.randn(kv_heads if map_q else heads, rows[1], width) * rows[1] ** -0.5)

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        g_q, g_k = (pooled_by(x, self.block_size, pools) for x, pools in zip((q, k), self.pools, strict=True))
        g_q = g_q if self.q is None else g_q @ self.q
        g_k = heads_of(g_k, self.k.shape[0]) @ self.k
        if self.rope is not None:
            g_q, g_k = (self.rope.rotate(g, torch.arange(g.shape[-2], device=g.device) * self.block_size) for g in (g_q, g_k))
        s = g_q @ heads_of(g_k, q.shape[1]).transpose(-1, -2) * g_q.shape[-1] ** -0.5
        return s.masked_fill(~torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).tril(s.shape[-1] - s.shape[-2]), HIDDEN)


@torch.no_grad()
def block_maxima(q: Tensor, k: Tensor, block_size: int, normalise: bool = True, scale: float | None = None, causal: bool = True) -> Tensor:
    """Ground truth (B, H, n, n): the largest probability of each block pair (causal, unless told otherwise), without the matrix: a row of blocks at a time.

    Tile maxima are taken with the running row maximum, then rescaled by exp(max - lse). normalise: rows sum to one.
    """
    k, rows = heads_of(k, q.shape[1]), []
    count = -(-k.shape[-2] // block_size)
    at = torch.arange(k.shape[-2], device=q.device)
    q = q * (q.shape[-1] ** -0.5 if scale is None else scale)
    for start in range(0, q.shape[-2], block_size):
        part = q[..., start : start + block_size, :]
        seen = at[start : start + part.shape[-2], None]
        tops, lse = [], torch.full_like(part[..., :1], HIDDEN)
        for w in range(count):
            if causal and w * block_size > start + block_size - 1:
                tops.append(torch.full_like(part[..., :1], HIDDEN))
                continue
            columns = slice(w * block_size, (w + 1) * block_size)
            s = part @ k[..., columns, :].transpose(-1, -2)
            s = s.masked_fill(at[columns] > seen, HIDDEN) if causal else s
            tops.append(s.amax(-1, keepdim=True))
            lse = torch.logaddexp(lse, s.logsumexp(-1, keepdim=True))
        rows.append(torch.exp(torch.cat(tops, -1) - lse).amax(-2))
    truth = torch.stack(rows, -2)
    return truth / truth.sum(-1, keepdim=True) if normalise else truth


def gate_loss(logits: Tensor, truth: Tensor, skip: float = 0.25) -> Tensor:
    """Mean over elements of KL(truth || softmax(logits)); the first `skip` share of rows is left out."""
    first = int(skip * logits.shape[-2])
    p, log_p = truth[..., first:, :], logits[..., first:, :].log_softmax(-1)
    return torch.where(p > 0, p * (p.clamp_min(1e-30).log() - log_p), 0.0).mean()


def gated_blocks(
    q: Tensor, k: Tensor, view: View, gate: Tensor, threshold: Tensor, ratio: Tensor, size: Tensor, last_dense: Tensor
) -> Selection:
    """Blocks whose softmax score exceeds `threshold`, or, when ratio > 0, the best int((1 - sqrt(1 - ratio)) n) of each row, at least one."""
    score, count = gate.softmax(-1), gate.shape[-1]
    causal = torch.isfinite(gate)
    if float(ratio) > 0:
        keep = top_k(gate, causal, max(1, int((1 - (1 - float(ratio)) ** 0.5) * count)))
    else:
        keep = (score > threshold) & causal
    if int(last_dense):
        keep[..., -int(last_dense) :, :] = causal[..., -int(last_dense) :, :]
    return Selection(keep.expand(q.shape[0], q.shape[1], -1, -1), int(size), int(size))


GATED = Weighted(
    mask=Causal(),
    select=Chosen(gated_blocks, ahead=True, decode=False),
    inputs=(
        Input("gate", "bhff"),
        Input("threshold", "", 2e-3),
        Input("ratio", "", 0.0),
        Input("size", "", dtype="int"),
        Input("last_dense", "", 0, dtype="int"),
    ),
)


@register("seerattention", kind="module")
class SeerAttention(nn.Module):
    """Sparse causal attention of q (B, H, L, D), k, v (B, Hkv, L, D) before rotary positions, by a learned gate.

    threshold: block probability above which a block is kept (0: dense), or ratio: share of the causal blocks (nz). last_dense: rows of blocks
    at the end that read everything (released models: 2). No block is kept but for its score, the diagonal included: a row whose scores all
    stay under the threshold reads nothing and gives zeros. q_pools, k_pools, map_q, base: of the gate (`AttnGate`). `distil(q, k)` is the loss of the gate alone: q and k get no gradient. Chunks of fewer queries than keys, and
    decoding, run dense.
    """

    def __init__(
        self, heads: int, kv_heads: int, head_dim: int, *, width: int = 128, block_size: int = 64, threshold: float = 2e-3,
        ratio: float | None = None, last_dense: int = 0, rope: bool = True, q_pools: tuple[str, ...] = ("avg",),
        k_pools: tuple[str, ...] = POOLS, map_q: bool = True, base: float = 10000.0,
    ):  # fmt: skip
        super().__init__()
        self.heads = heads
        self.kv_heads = kv_heads
        self.head_dim = head_dim
        if ratio is not None and not 0 < ratio <= 1:
            raise RegardError(f"ratio={ratio}; expected a share in (0, 1]")
        if last_dense < 0:
            raise RegardError(f"last_dense={last_dense}; expected 0 or more rows of blocks")
        self.gate = AttnGate(
            heads,
            kv_heads,
            head_dim,
            width=width,
            block_size=block_size,
            rope=rope,
            q_pools=q_pools,
            k_pools=k_pools,
            map_q=map_q,
            base=base,
        )
        self.threshold, self.ratio, self.last_dense, self.rope = threshold, ratio, last_dense, Rope(base) if rope else None

    def rotated(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        if self.rope is None:
            return q, k
        behind = k.shape[-2] - q.shape[-2]
        return self.rope.rotate(q, torch.arange(behind, k.shape[-2], device=q.device)), self.rope.rotate(
            k, torch.arange(k.shape[-2], device=k.device)
        )

    @takes(q="batch heads queries head_dim", k="batch kv_heads length head_dim", v="batch kv_heads length values")
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        turned_q, turned_k = self.rotated(q, k)
        if q.shape[-2] != k.shape[-2] or (self.threshold <= 0 and self.ratio is None):
            return attend(turned_q, turned_k, v, mask=Causal())
        given: dict[str, Any] = {
            "size": self.gate.block_size,
            "threshold": self.threshold,
            "ratio": self.ratio or 0.0,
            "last_dense": self.last_dense,
        }
        given |= {"gate": self.gate(q, k).detach()}
        return attend(turned_q, turned_k, v, GATED, **given)

    def distil(self, q: Tensor, k: Tensor) -> Tensor:
        """KL of the gate to the block maxima of the dense attention."""
        q, k = q.detach(), k.detach()
        turned_q, turned_k = self.rotated(q, k)
        return gate_loss(self.gate(q, k), block_maxima(turned_q, turned_k, self.gate.block_size))


def token_blocks(q: Tensor, k: Tensor, view: View, keep: Tensor, size: Tensor) -> Selection:
    return Selection(keep, 1, int(size))


BY_TOKEN = Weighted(
    mask=Causal(), select=Chosen(token_blocks, ahead=True), inputs=(Input("keep", "bhff", dtype="bool"), Input("size", "", dtype="int"))
)


class SeerDecoding(nn.Module):
    """Sparse attention of new tokens' q (B, H, n, D), at the end of k, v (B, Hkv, L, D), all before rotary positions; n may be L, or 1.

    A block is read where its softmax score exceeds `threshold`, or, with `budget` (tokens), where it is among the best budget / block_size blocks;
    a token's own block is always read. options: of `TokenGate`. `distil(q, k)` is the loss of the gate alone.
    """

    def __init__(
        self,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        threshold: float = 2e-3,
        budget: int | None = None,
        rope: bool = True,
        base: float = 10000.0,
        **options: Any,
    ):
        super().__init__()
        self.gate = TokenGate(heads, kv_heads, head_dim, rope=Rope(base) if rope else None, **options)
        if budget is not None and budget < self.gate.block_size:
            raise RegardError(f"budget={budget}; expected at least a block of {self.gate.block_size} tokens")
        self.threshold, self.budget, self.rope = threshold, budget, self.gate.rope

    def rotated(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        if self.rope is None:
            return q, k
        at = torch.arange(k.shape[2], device=k.device)
        return self.rope.rotate(q, at[k.shape[2] - q.shape[2] :]), self.rope.rotate(k, at)

    @torch.no_grad()
    def blocks(self, q: Tensor, k: Tensor) -> Tensor:
        """(B, Hkv, n, blocks) bool: which are read."""
        logits, size = self.gate(q, k), self.gate.block_size
        own = torch.arange(k.shape[2] - q.shape[2], k.shape[2], device=k.device)[:, None] // size
        if self.budget is None:
            keep = logits.softmax(-1) > self.threshold
        else:
            keep = top_k(logits, torch.isfinite(logits), self.budget // size)
        return keep | (torch.arange(logits.shape[-1], device=k.device) == own)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keep = heads_of(self.blocks(q, k), q.shape[1])
        turned_q, turned_k = self.rotated(q, k)
        return attend(turned_q, turned_k, v, BY_TOKEN, keep=keep, size=self.gate.block_size)

    def distil(self, q: Tensor, k: Tensor) -> Tensor:
        """KL of the gate to the largest probability of each block among the query heads of a key head; q and k get no gradient."""
        q, k = q.detach(), k.detach()
        logits = self.gate(q, k)
        return gate_loss(logits, token_maxima(*self.rotated(q, k), self.gate.block_size), 0.0)
