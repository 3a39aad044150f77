"""MQSA-TED: sequential recommendation with queries of one item and of several, and transitions distilled into items (id 179; Zhu & Shen, 2023).

branch: Q = LN(q) W_q, K = x W_k, V = x W_v, causal softmax;  u = LN(attention + LN(q));  y = u + W_2 relu(W_1 u), times the mask;  then LN
q = x in the short branch; in the long one the mean of the last L items that are there.   logits = (alpha y_short + (1 - alpha) y_long) E^T
distillation: CE(softmax(T_i / max_j T_ij / tau), softmax(sqrt(d) e_i E^T / tau)), T_ij how often j follows i;   total: CE + 0.1 of it
Not reproduced: the claim on nearest neighbours (60% of top-1): 14-53% were seen over settings.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.algebra import Causal, Padding
from regard.catalog.registry import register
from regard.engine.door import attend
from regard.errors import RegardError
from regard.nn.parts import takes


class QueryBlock(nn.Module):
    """One block: queries from one stream, keys and values from another. x, q (B, L, dim), keep (B, L) bool. Weights start as Glorot's uniform ones,
    biases at 0."""

    def __init__(self, dim: int, heads: int = 1, hidden: int | None = None, dropout: float = 0.5, eps: float = 1e-24):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps), nn.LayerNorm(dim, eps)
        self.q, self.k, self.v = (nn.Linear(dim, dim) for _ in range(3))
        self.up, self.down = nn.Linear(dim, hidden or dim), nn.Linear(hidden or dim, dim)
        self.heads, self.dropout = heads, dropout
        for layer in (self.q, self.k, self.v, self.up, self.down):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, q: Tensor, keep: Tensor) -> Tensor:
        y = self.norm1(q)
        p = self.dropout if self.training else 0.0
        heads = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (self.q(y), self.k(x), self.v(x)))
        q, k, v = heads
        o = attend(q, k, v, "softmax", mask=Causal() & Padding(), keep=keep, dropout_p=p).transpose(1, 2).flatten(2)
        u = self.norm2(torch.where(keep[..., None], o, 0.0) + y)
        h = F.dropout(torch.relu(self.up(u)), self.dropout, self.training)
        return (u + F.dropout(self.down(h), self.dropout, self.training)) * keep[..., None]


def window_mean(x: Tensor, keep: Tensor, length: int) -> Tensor:
    """Mean of each token and the `length` - 1 before it, of those that are there; zeros where none is. x (B, L, dim), keep (B, L) bool."""
    m = keep.to(x.dtype)[..., None]
    sums = [F.pad(y, (0, 0, length - 1, 0)).unfold(1, length, 1).sum(-1) for y in (x * m, m)]
    return sums[0] / sums[1].clamp_min(1)


@register("mqsa-ted", kind="module")
class MQSATED(nn.Module):
    """Items (B, L) from 1 on, 0 is padding, -> scores of what comes next (B, L, items), of item j + 1 at j.

    long: items a query of the long branch is the mean of. alpha: share of the short branch. length: positions, counted so that the newest item has
    the last one, whatever stands before it. blocks: of each branch, with weights of its own.
    """

    def __init__(
        self,
        items: int,
        dim: int = 64,
        long: int = 3,
        alpha: float = 0.5,
        length: int = 50,
        blocks: int = 1,
        heads: int = 1,
        hidden: int | None = None,
        dropout: float = 0.5,
        tau: float = 0.1,
        eps: float = 1e-24,
    ):
        super().__init__()
        if min(items, dim, long, length, blocks, heads) < 1 or dim % heads or not 0 <= alpha <= 1 or not 0 <= dropout < 1 or tau <= 0:
            raise RegardError(
                f"items={items}, dim={dim}, long={long}, alpha={alpha}, length={length}, blocks={blocks}, heads={heads}, dropout={dropout}, tau={tau}: "
                "expected positive numbers, dim a multiple of heads, alpha from 0 to 1 and dropout below 1"
            )
        self.items, self.dim, self.long, self.alpha, self.length, self.dropout, self.tau = items, dim, long, alpha, length, dropout, tau
        self.embed, self.place = nn.Embedding(items + 1, dim, padding_idx=0), nn.Embedding(length, dim)
        for table in (self.embed, self.place):
            nn.init.normal_(table.weight, std=0.01)
        nn.init.zeros_(self.embed.weight[0])
        self.short_blocks, self.long_blocks = (
            nn.ModuleList(QueryBlock(dim, heads, hidden, dropout, eps) for _ in range(blocks)) for _ in range(2)
        )
        self.short_norm, self.long_norm = nn.LayerNorm(dim, eps), nn.LayerNorm(dim, eps)

    @takes(items="batch tokens")
    def hidden(self, items: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs of the short and the long branch, (B, L, dim)."""
        keep, n = items != 0, items.shape[1]
        if n > self.length:
            raise RegardError(f"items {tuple(items.shape)}: expected at most length={self.length} items; give the newest ones")
        x = self.embed(items) * self.dim**0.5 + self.place.weight[self.length - n :]
        x = F.dropout(x, self.dropout, self.training) * keep[..., None]
        short = long = x
        for one in self.short_blocks:
            short = one(short, short, keep)
        for one in self.long_blocks:
            long = one(long, window_mean(long, keep, self.long), keep)
        return self.short_norm(short), self.long_norm(long)

    def forward(self, items: Tensor) -> Tensor:
        short, long = self.hidden(items)
        return (self.alpha * short + (1 - self.alpha) * long) @ self.embed.weight[1:].T

    def loss(self, items: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy of what came next, targets (B, L), where it is not 0; padding is one more class, of score 0."""
        there = targets != 0
        return F.cross_entropy(F.pad(self(items)[there], (1, 0)), targets[there])

    def distillation(self, transitions: Tensor, items: Tensor) -> Tensor:
        """Mean over items (n,), those of a batch, of the cross-entropy to transition counts (items + 1, items + 1); of items that nothing
        followed the teacher is even."""
        counts = transitions[items][:, 1:].to(self.embed.weight)
        teacher = (counts / counts.amax(-1, keepdim=True).clamp_min(1e-24) / self.tau).softmax(-1)
        head = F.dropout(self.dim**0.5 * self.embed(items), self.dropout, self.training)
        return -(teacher * (head @ self.embed.weight[1:].T / self.tau).log_softmax(-1)).sum(-1).mean()

    def total(self, items: Tensor, targets: Tensor, transitions: Tensor, kd: float = 0.1, l2: float = 1e-4) -> Tensor:
        """loss + kd * distillation of the batch's items + l2 * half the squares of all parameters."""
        squares = torch.stack([p.square().sum() for p in self.parameters()]).sum() / 2
        return self.loss(items, targets) + kd * self.distillation(transitions, items[items != 0]) + l2 * squares


def transition_counts(sequences: Tensor, items: int, span: int = 1) -> Tensor:
    """How often j follows i within `span` items, (items + 1, items + 1); sequences (B, L), 0 is padding."""
    counts = torch.zeros(items + 1, items + 1)
    for step in range(1, span + 1):
        a, b = sequences[:, :-step].flatten(), sequences[:, step:].flatten()
        there = (a != 0) & (b != 0)
        counts.index_put_((a[there], b[there]), torch.ones(int(there.sum())), accumulate=True)
    return counts


def ranking(scores: Tensor, targets: Tensor, k: int = 10) -> tuple[float, float]:
    """HR@k and NDCG@k: scores (n, items), the item (n,) that came; ties count against."""
    own = scores.gather(1, targets[:, None] - 1)
    rank = (scores >= own).sum(1) - 1
    hit = rank < k
    return float(hit.double().mean()), float((hit / torch.log2(rank + 2.0)).double().mean())
