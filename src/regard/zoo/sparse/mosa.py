"""MoSA: each sparse head picks its own k tokens and attends among them (expert choice; Piekos et al., 2025).

I = top-k of r_t = sigmoid(x_t.w);  A = softmax over I_a >= I_b;  row a times r_{I_a};  scattered to I; the others get 0
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from regard.algebra import Causal, Explicit, Weighted, Window
from regard.catalog.registry import register
from regard.engine.door import attend
from regard.errors import RegardError
from regard.nn.parts import takes


def rotate_part(x: Tensor, place: Tensor, share: float, base: float) -> Tensor:
    """Rotary positions `place` (..., n) on the first `share` of the channels of x (..., n, D), pairs half a part apart."""
    width = int(x.shape[-1] * share) // 2 * 2
    if not width:
        return x
    angle = place[..., None].to(x.dtype) * base ** (-torch.arange(0, width, 2, device=x.device, dtype=x.dtype) / width)
    first, second = x[..., : width // 2], x[..., width // 2 : width]
    turned = (first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin())
    return torch.cat((*turned, x[..., width:]), -1)


def sparse_flops(dim: int, head_dim: int, tokens: int, length: int) -> int:
    """Of one sparse head: 8 h h' k + 4 h' k^2 + 2 h T + h' k."""
    return 8 * dim * head_dim * tokens + 4 * head_dim * tokens**2 + 2 * dim * length + head_dim * tokens


def dense_flops(dim: int, head_dim: int, length: int) -> int:
    return 8 * dim * head_dim * length + 4 * head_dim * length**2


@register("mosa", kind="module")
class MoSA(nn.Module):
    """x (B, T, dim) -> (B, T, dim): `sparse` expert-choice heads, and `dense` (or local, `window`) causal heads.

    sparsity: T over the tokens a head takes (2 at least). first: always take token 0. rope_share, rope_base: of a head's channels, and of their
    rotation. A head's choice looks at the whole sequence, so training is not strictly causal; `decode` works with a threshold: token t is taken
    when its score is among the top share so far, which approximates the choice. Keys held: k a sparse head, T a dense one (`kv_pairs`).

    Released weights: `qkv` is theirs by `.unflatten(-1, (3, -1)).permute(2, 0, 1, 3)`; `dense_qkv` has their order, head by head. Their local
    heads are those of another package, in blocks that see the block before; ours see `window` tokens.
    """

    def __init__(
        self,
        dim: int,
        sparse: int,
        dense: int = 0,
        *,
        head_dim: int = 64,
        sparsity: int = 16,
        first: bool = False,
        rope_share: float = 0.5,
        rope_base: float = 10000.0,
        window: int | None = None,
    ):
        super().__init__()
        self.dim = dim
        if sparse < 1 or sparsity < 1:
            raise RegardError(f"sparse={sparse}, sparsity={sparsity}: expected at least 1")
        self.sparse, self.dense, self.head_dim, self.sparsity, self.first, self.share = sparse, dense, head_dim, sparsity, first, rope_share
        self.window, self.base = window, rope_base

        def drawn(*shape: int, bound: float) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))

        self.router = drawn(sparse, dim, bound=dim**-0.5)
        self.qkv = drawn(3, sparse, dim, head_dim, bound=(3 * head_dim) ** -0.5)
        self.out = drawn(sparse, head_dim, dim, bound=(dim * sparse) ** -0.5)
        self.dense_qkv = nn.Linear(dim, 3 * dense * head_dim, False) if dense else None
        self.dense_out = nn.Linear(dense * head_dim, dim, False) if dense else None

    def taken(self, length: int) -> int:
        """Tokens a sparse head takes."""
        return min(length, max(2, length // self.sparsity))

    def ranked(self, scores: Tensor) -> Tensor:
        """What tokens are chosen by: their scores (B, E, T), the first token's above all others if it is always taken."""
        found = scores.detach().clone()
        if self.first:
            found[..., :1] = float("inf")
        return found

    def chosen(self, scores: Tensor) -> Tensor:
        """Places (B, E, k), in order, of scores (B, E, T)."""
        return self.ranked(scores).topk(self.taken(scores.shape[-1]), -1).indices.sort(-1).values

    @takes(x="batch length dim")
    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        r = torch.sigmoid(torch.einsum("btd,ed->bet", x, self.router))
        place = self.chosen(r)
        picked = x[:, None].expand(-1, self.sparse, -1, -1).gather(2, place[..., None].expand(*place.shape, x.shape[-1]))
        q, k, v = (torch.einsum("bekd,edh->bekh", picked, w) for w in self.qkv)
        q, k = (rotate_part(y, place, self.share, self.base) for y in (q, k))
        seen = place[..., :, None] >= place[..., None, :]
        o = attend(q, k, v, Weighted(), mask=Explicit(), visible=seen) * r.gather(2, place)[..., None]
        y = torch.einsum("bekh,ehd->bekd", o, self.out)
        out = y.new_zeros(x.shape).index_put((torch.arange(x.shape[0], device=x.device)[:, None, None], place), y, accumulate=True)
        if self.dense_qkv is None or self.dense_out is None:
            return out
        q, k, v = self.dense_qkv(x).unflatten(-1, (self.dense, -1)).transpose(1, 2).chunk(3, -1)
        at = torch.arange(length, device=x.device)
        q, k = (rotate_part(y, at, self.share, self.base) for y in (q, k))
        mask = Causal() if self.window is None else Causal() & Window(self.window)
        return out + self.dense_out(attend(q, k, v, mask=mask).transpose(1, 2).flatten(-2))  # type: ignore[no-any-return]

    def kv_pairs(self, length: int) -> int:
        """Keys held for `length` tokens."""
        return self.sparse * self.taken(length) + self.dense * (length if self.window is None else min(length, self.window))

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """x (B, T, dim) one token after the other, each sparse head taking a token whose score is among the top 1 / sparsity so far."""
        rows = [self.forward_threshold(x[:, : t + 1]) for t in range(x.shape[1])]
        return torch.stack(rows, 1)

    def forward_threshold(self, x: Tensor) -> Tensor:
        """The last token's output under the threshold rule, for the tokens taken so far by it."""
        r = torch.sigmoid(torch.einsum("btd,ed->bet", x, self.router))
        length = x.shape[1]
        ranked = self.ranked(r)
        bar = torch.stack([ranked[..., : t + 1].topk(self.taken(t + 1), -1).values[..., -1] for t in range(length)], -1)
        kept = ranked >= bar
        q, k, v = (torch.einsum("btd,edh->beth", x, w) for w in self.qkv)
        at = torch.arange(length, device=x.device)
        q, k = (rotate_part(y, at, self.share, self.base) for y in (q, k))
        o = attend(q[:, :, -1:], k, v, Weighted(), mask=kept[:, :, None]) * (r * kept)[..., -1:, None]
        out = torch.einsum("bekh,ehd->bd", o, self.out)
        if self.dense_qkv is None or self.dense_out is None:
            return out
        q, k, v = self.dense_qkv(x).unflatten(-1, (self.dense, -1)).transpose(1, 2).chunk(3, -1)
        q, k = (rotate_part(y, at, self.share, self.base) for y in (q, k))
        mask = Causal() if self.window is None else Causal() & Window(self.window)
        return out + self.dense_out(attend(q[:, :, -1:], k, v, mask=mask).transpose(1, 2).flatten(-2))[:, 0]  # type: ignore[no-any-return]
