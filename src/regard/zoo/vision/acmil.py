"""ACMIL: bags of instances pooled by several attentions that must differ, with the largest weights sometimes masked (id 218; Zhang et al., 2023).

h_i = relu(W f_i),  a_ki = w_k . (tanh(V h_i) sigmoid(U h_i)),  A_k = softmax_i a_k,  z_k = sum_i A_ki h_i, a classifier each
bag: mean_k A_k read once, with a classifier of its own;  training: of each branch's 10 largest scores int(0.6 10) at random become -1e9
loss = CE(bag) + mean_k CE(branch k) + 2 / (K (K - 1)) sum_{j < k} cos(A_j, A_k).  One branch, no masking: ABMIL.
Not built: the form with several queries of multi-head attention.
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
    """branches (B, K, classes), bag (B, classes): logits; scores (B, K, N), masked as they were used."""

    branches: Tensor
    bag: Tensor
    scores: Tensor

    @property
    def weights(self) -> Tensor:
        """(B, K, N), softmax over the instances."""
        return self.scores.softmax(-1)


@register("acmil", kind="module")
class ACMIL(nn.Module):
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
        super().__init__()
        if branches < 1 or masked < 0 or not 0 <= share <= 1:
            raise RegardError(f"branches={branches}, masked={masked}, share={share}; expected at least 1, at least 0, and 0 to 1")
        self.features, self.masked, self.share = features, masked, share
        self.reduce, self.score = nn.Linear(features, dim, bias=False), GatedAttentionPool(dim, hidden, branches)
        self.heads = nn.ModuleList([nn.Sequential(nn.Dropout(dropout), nn.Linear(dim, classes)) for _ in range(branches)])
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(dim, classes))

    @takes(x="batch instances features", keep="batch instances")
    def forward(self, x: Tensor, keep: Tensor | None = None, draw: Tensor | None = None) -> Bags:
        """draw: of `stochastic_topk_mask`, (B, K, min(masked, N)), in training."""
        if x.shape[1] == 0 or (keep is not None and not keep.any(1).all()):
            raise RegardError("a bag is empty; expected at least one instance in each")
        x = x if keep is None else torch.where(keep[..., None], x, 0.0)
        h = torch.relu(self.reduce(x))
        scores = self.score(h)
        if self.training and self.masked:
            hidden = stochastic_topk_mask(scores, self.masked, self.share, None if keep is None else keep[:, None], draw)
            scores = scores.masked_fill(hidden, max(-1e9, torch.finfo(scores.dtype).min))
        scores = scores if keep is None else scores.masked_fill(~keep[:, None], -torch.inf)
        weights = scores.softmax(-1)
        read = weights @ h
        branches = torch.stack([head(read[:, k]) for k, head in enumerate(self.heads)], 1)
        return Bags(branches, self.head((weights.mean(1, keepdim=True) @ h)[:, 0]), scores)


def diversity(weights: Tensor) -> Tensor:
    """Mean cosine of pairs of branches' weights (B, K, N), over pairs and bags; 0 with one branch."""
    k = weights.shape[1]
    if k == 1:
        return weights.new_zeros(())
    first, second = torch.triu_indices(k, k, 1, device=weights.device)
    return F.cosine_similarity(weights[:, first], weights[:, second], dim=-1).mean()


def acmil_loss(out: Bags, labels: Tensor) -> Tensor:
    """CE(bag) + mean over branches of CE + diversity, labels (B,); of one branch CE(bag) alone, as released."""
    loss = F.cross_entropy(out.bag, labels)
    if out.branches.shape[1] == 1:
        return loss
    k = out.branches.shape[1]
    return loss + F.cross_entropy(out.branches.flatten(0, 1), labels.repeat_interleave(k)) + diversity(out.weights)


@torch.no_grad()
def concentration(weights: Tensor, count: int = 10) -> Tensor:
    """What the `count` largest of each bag's mean weights hold together, (B,), of weights (B, K, N)."""
    mean = weights.mean(1)
    return mean.topk(min(count, mean.shape[-1]), -1).values.sum(-1)
