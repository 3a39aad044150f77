"""ACMIL: bags of instances pooled by several attentions that must differ, with the largest weights sometimes masked (id 218; Zhang et al., 2023).

h_i = relu(W f_i),  a_ki = w_k . (tanh(V h_i) sigmoid(U h_i)),  A_k = softmax_i a_k,  z_k = sum_i A_ki h_i, a classifier each
bag: mean_k A_k read once, with a classifier of its own;  training: of each branch's 10 largest scores int(0.6 10) at random become -1e9
loss = CE(bag) + mean_k CE(branch k) + 2 / (K (K - 1)) sum_{j < k} cos(A_j, A_k).  One branch, no masking: ABMIL.
By multi-head attention: branch k is a learned query q_k with projections, an output layer and a LayerNorm of its own; masking is a head's, and the bag
reads, head by head, with the branches' mean weights through values of its own.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.catalog.registry import register
from regard.errors import RegardError
from regard.nn.parts import takes


class GatedAttentionPool(nn.Module):
    """Scores of instances, h (B, N, dim) -> (B, branches, N); branches share V and U."""

    def __init__(self, dim: int, hidden: int = 128, branches: int = 1):
        super().__init__()
        self.dim = dim
        self.v, self.u, self.weights = nn.Linear(dim, hidden), nn.Linear(dim, hidden), nn.Linear(hidden, branches)

    @takes(h="batch instances dim")
    def forward(self, h: Tensor) -> Tensor:
        return self.weights(torch.tanh(self.v(h)) * torch.sigmoid(self.u(h))).mT  # type: ignore[no-any-return]


@torch.no_grad()
def stochastic_topk_mask(scores: Tensor, top: int, p: float, keep: Tensor | None = None, draw: Tensor | None = None) -> Tensor:
    """Which scores (..., N) to mask, bool: int(m p) at random of the m = min(top, instances there are) largest of each row.

    keep: bool that broadcasts to scores, instances that exist. draw: (..., min(top, N)) numbers whose smallest, in order of the scores, are masked
    (None: uniform ones).
    """
    if top < 0 or not 0 <= p <= 1:
        raise RegardError(f"top={top}, p={p}; expected top from 0 and p from 0 to 1")
    width = min(top, scores.shape[-1])
    there = torch.ones_like(scores, dtype=torch.bool) if keep is None else keep.expand_as(scores)
    at = scores.masked_fill(~there, -torch.inf).topk(width, -1).indices
    found = there.sum(-1, keepdim=True).clamp_max(width)
    draw = torch.rand(at.shape, device=at.device) if draw is None else draw
    if draw.shape != at.shape:
        raise RegardError(f"draw has shape {tuple(draw.shape)}; expected {tuple(at.shape)}")
    late = torch.arange(width, device=at.device) >= found
    place = draw.masked_fill(late, torch.inf).argsort(dim=-1, stable=True).argsort(-1)
    chosen = place < (found.double() * p).floor()
    return torch.zeros_like(there).scatter(-1, at, chosen)


class Bags(NamedTuple):
    """branches (B, K, classes), bag (B, classes): logits; scores (B, K, N), or (B, heads, K, N), masked as they were used."""

    branches: Tensor
    bag: Tensor
    scores: Tensor

    @property
    def weights(self) -> Tensor:
        """Softmax of the scores over the instances."""
        return self.scores.softmax(-1)


class Branches(nn.Module):
    """What both forms have: the instances' reduction, masking, and a classifier for each branch and the bag."""

    def __init__(self, features: int, classes: int, dim: int, branches: int, masked: int, share: float, dropout: float):
        super().__init__()
        if branches < 1 or masked < 0 or not 0 <= share <= 1:
            raise RegardError(f"branches={branches}, masked={masked}, share={share}; expected at least 1, at least 0, and 0 to 1")
        self.features, self.masked, self.share = features, masked, share
        self.reduce = nn.Linear(features, dim, bias=False)
        self.heads = nn.ModuleList([nn.Sequential(nn.Dropout(dropout), nn.Linear(dim, classes)) for _ in range(branches)])
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(dim, classes))

    def instances(self, x: Tensor, keep: Tensor | None) -> Tensor:
        """h (B, N, dim) of x (B, N, features)."""
        if x.shape[1] == 0 or (keep is not None and not keep.any(1).all()):
            raise RegardError("a bag is empty; expected at least one instance in each")
        return torch.relu(self.reduce(x if keep is None else torch.where(keep[..., None], x, 0.0)))

    def hidden(self, scores: Tensor, keep: Tensor | None, draw: Tensor | None) -> Tensor:
        """Scores (B, ..., N), in training some of the largest at -1e9, of instances that are not at -inf."""
        keep = None if keep is None else keep.view(len(keep), *[1] * (scores.dim() - 2), -1)
        if self.training and self.masked:
            gone = stochastic_topk_mask(scores, self.masked, self.share, keep, draw)
            scores = scores.masked_fill(gone, max(-1e9, torch.finfo(scores.dtype).min))
        return scores if keep is None else scores.masked_fill(~keep, -torch.inf)

    def told(self, read: Tensor, bag: Tensor, scores: Tensor) -> Bags:
        """Of what branches read, (B, K, dim), and the bag, (B, dim)."""
        return Bags(torch.stack([head(read[:, k]) for k, head in enumerate(self.heads)], 1), self.head(bag), scores)


@register("acmil", kind="module")
class ACMIL(Branches):
    """Bags x (B, N, features) (keep (B, N) bool: instances that exist) -> `Bags`.

    dim: width of h. hidden: of the scores' net. masked, share: how many of the largest scores may be masked in training, and how many of these
    are. dropout: before the classifiers. At inference the bag's logits are the answer.
    """

    def __init__(
        self,
        features: int,
        classes: int,
        dim: int = 512,
        hidden: int = 128,
        branches: int = 5,
        masked: int = 10,
        share: float = 0.6,
        dropout: float = 0.0,
    ):
        super().__init__(features, classes, dim, branches, masked, share, dropout)
        self.score = GatedAttentionPool(dim, hidden, branches)

    @takes(x="batch instances features", keep="batch instances")
    def forward(self, x: Tensor, keep: Tensor | None = None, draw: Tensor | None = None) -> Bags:
        """draw: of `stochastic_topk_mask`, (B, K, min(masked, N)), in training."""
        h = self.instances(x, keep)
        scores = self.hidden(self.score(h), keep, draw)
        weights = scores.softmax(-1)
        return self.told(weights @ h, (weights.mean(1, keepdim=True) @ h)[:, 0], scores)


class HeadRead(nn.Module):
    """Weights (B, heads, 1, N) and instances h (B, N, dim) -> (B, dim): LN(dropout(W [weights_h V_h h]))."""

    def __init__(self, dim: int, heads: int, dropout: float):
        super().__init__()
        self.count, self.v, self.out = heads, nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.drop, self.norm = nn.Dropout(dropout), nn.LayerNorm(dim, eps=1e-6)

    def forward(self, weights: Tensor, h: Tensor) -> Tensor:
        v = self.v(h).unflatten(-1, (self.count, -1)).transpose(1, 2)
        return self.norm(self.drop(self.out((weights @ v).transpose(1, 2).flatten(-2))))[:, 0]  # type: ignore[no-any-return]


class MultiQueryACMIL(Branches):
    """ACMIL with multi-head attention: bags x (B, N, features) -> `Bags`, scores (B, queries' heads, K, N).

    heads: of each branch. attention_dropout: behind the output layers of attention. queries start near zero, as released.
    """

    def __init__(
        self,
        features: int,
        classes: int,
        dim: int = 512,
        heads: int = 8,
        branches: int = 5,
        masked: int = 10,
        share: float = 0.6,
        dropout: float = 0.0,
        attention_dropout: float = 0.1,
    ):
        super().__init__(features, classes, dim, branches, masked, share, dropout)
        if dim % heads:
            raise RegardError(f"dim={dim}, heads={heads}; expected a multiple of heads")
        self.width = dim // heads
        self.queries = nn.Parameter(nn.init.normal_(torch.empty(branches, dim), std=1e-6))
        self.q, self.k = (nn.ModuleList([nn.Linear(dim, dim) for _ in range(branches)]) for _ in range(2))
        self.read = nn.ModuleList([HeadRead(dim, heads, attention_dropout) for _ in range(branches)])
        self.whole = HeadRead(dim, heads, attention_dropout)

    @takes(x="batch instances features", keep="batch instances")
    def forward(self, x: Tensor, keep: Tensor | None = None, draw: Tensor | None = None) -> Bags:
        """draw: of `stochastic_topk_mask`, (B, heads, K, min(masked, N)), in training."""
        h = self.instances(x, keep)
        rows = []
        for query, q, k in zip(self.queries, self.q, self.k, strict=True):
            keys = k(h).unflatten(-1, (-1, self.width)).transpose(1, 2)
            rows.append((keys @ q(query).view(-1, self.width, 1)).mT / self.width**0.5)
        scores = self.hidden(torch.cat(rows, 2), keep, draw)
        weights = scores.softmax(-1)
        read = torch.stack([net(weights[:, :, at, None], h) for at, net in enumerate(self.read)], 1)
        return self.told(read, self.whole(weights.mean(2, keepdim=True), h), scores)


def diversity(weights: Tensor) -> Tensor:
    """Mean cosine of pairs of branches' weights (B, K, N) or (B, heads, K, N), over pairs, heads and bags; 0 with one branch."""
    k = weights.shape[-2]
    if k == 1:
        return weights.new_zeros(())
    first, second = torch.triu_indices(k, k, 1, device=weights.device)
    return F.cosine_similarity(weights[..., first, :], weights[..., second, :], dim=-1).mean()


def acmil_loss(out: Bags, labels: Tensor) -> Tensor:
    """CE(bag) + mean over branches of CE + diversity, labels (B,); of one branch CE(bag) alone, as released."""
    loss = F.cross_entropy(out.bag, labels)
    if out.branches.shape[1] == 1:
        return loss
    k = out.branches.shape[1]
    return loss + F.cross_entropy(out.branches.flatten(0, 1), labels.repeat_interleave(k)) + diversity(out.weights)


@torch.no_grad()
def concentration(weights: Tensor, count: int = 10) -> Tensor:
    """What the `count` largest of each bag's mean weights hold together, (B,), of weights (B, K, N) or (B, heads, K, N)."""
    mean = weights.flatten(1, -2).mean(1)
    return mean.topk(min(count, mean.shape[-1]), -1).values.sum(-1)
