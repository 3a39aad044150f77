"""Comateformer: attention that adds, subtracts or leaves out, from a likeness and an unlikeness (id 68; Li et al., 2024).

E_ij = q_i . k_j / sqrt(d),  N_ij = -|q_i - k_j|_1 / sqrt(d),  M = tanh(E) sigmoid(N), no softmax and no sum to one;  o_i = sum_j M_ij v_j
double: 2 sigmoid(N), so that equal vectors count in full.  own: N from projections of its own.
centre (a layer's): N less its mean over all visible pairs, which needs the whole matrix and all tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from regard.algebra import Padding, Pairwise, RowLocal, Weighted, bind, identity
from regard.catalog.registry import register
from regard.engine.door import attend
from regard.errors import RegardError
from regard.nn.parts import takes


def affinities(q: Tensor, k: Tensor, own: bool) -> tuple[Tensor, Tensor]:
    """E and N, (..., Lq, Lk); own: the second half of the channels is for N."""
    (q, far_q), (k, far_k) = ((x.chunk(2, -1) if own else (x, x)) for x in (q, k))
    scale = q.shape[-1] ** -0.5
    return scale * q @ k.mT, -scale * Apart.apply(far_q, far_k)


class Apart(torch.autograd.Function):
    """|q_i - k_j|_1, whose own differences are never held for all channels at once."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, q: Tensor, k: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(q, k)
        lead = torch.broadcast_shapes(q.shape[:-2], k.shape[:-2])
        wide = torch.promote_types(q.dtype, torch.float32)
        far_q, far_k = (x.to(wide).expand(*lead, *x.shape[-2:]).contiguous() for x in (q, k))
        return torch.cdist(far_q, far_k, p=1.0).to(q.dtype)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        q, k = ctx.saved_tensors  # type: ignore[attr-defined]
        dq, dk = [], []
        for c in range(q.shape[-1]):
            part = grad * torch.sign(q[..., c, None] - k[..., None, :, c])
            dq.append(part.sum(-1))
            dk.append(-part.sum(-2))
        return torch.stack(dq, -1).sum_to_size(q.shape), torch.stack(dk, -1).sum_to_size(k.shape)


def composed(q: Tensor, k: Tensor, double: bool, own: bool) -> Tensor:
    likeness, unlikeness = affinities(q, k, own)
    return torch.tanh(likeness) * torch.sigmoid(unlikeness) * (2 if double else 1)


@register("comateformer")
def comateformer(double: bool = False, own: bool = False) -> Weighted:
    """double: weights between -2 and 2. own: q and k are pairs side by side, of which the second makes N. `scale` is not used."""
    return Weighted(score=Pairwise(bind(composed, double=double, own=own)), normalizer=RowLocal(identity))


class CompositionalAttention(nn.Module):
    """x (B, Lq, dim), context (B, Lk, dim) (None: x), keep (B, Lk) bool -> (B, Lq, dim). centre: N less its mean over the visible pairs of a head.
    double, own: of `comateformer`."""

    def __init__(self, dim: int, heads: int, centre: bool = False, double: bool = False, own: bool = False, bias: bool = True):
        super().__init__()
        if dim % heads:
            raise RegardError(f"dim={dim} is no multiple of heads={heads}; expected one")
        self.dim, self.heads, self.centre, self.twice, self.own = dim, heads, centre, double, own
        self.q, self.k = (nn.Linear(dim, dim * (2 if own else 1), bias) for _ in range(2))
        self.v, self.out = nn.Linear(dim, dim, bias), nn.Linear(dim, dim, bias)

    def split(self, x: Tensor, parts: int) -> Tensor:
        """(B, H, L, parts * D): a head's channels of each part side by side."""
        return x.unflatten(-1, (parts, self.heads, -1)).permute(0, 3, 1, 2, 4).flatten(-2)

    @takes(x="batch length dim", context="batch keys dim", keep="batch keys")
    def forward(self, x: Tensor, context: Tensor | None = None, keep: Tensor | None = None) -> Tensor:
        source = x if context is None else context
        if keep is not None and keep.shape[1] != source.shape[1]:
            raise RegardError(f"keep has {keep.shape[1]} keys; expected {source.shape[1]}")
        source = source if keep is None else torch.where(keep[..., None], source, 0.0)
        parts = 2 if self.own else 1
        q, k, v = self.split(self.q(x), parts), self.split(self.k(source), parts), self.split(self.v(source), 1)
        if not self.centre:
            mechanism = comateformer(self.twice, self.own)
            read = attend(q, k, v, mechanism) if keep is None else attend(q, k, v, mechanism, mask=Padding(), keep=keep)
        else:
            likeness, unlikeness = affinities(q, k, self.own)
            seen = (
                torch.ones_like(unlikeness[:, :1, :, :]) if keep is None else keep[:, None, None].to(x.dtype).expand(-1, 1, x.shape[1], -1)
            )
            mean = (unlikeness * seen).sum((2, 3), keepdim=True) / seen.sum((2, 3), keepdim=True).clamp_min(1)
            weights = torch.tanh(likeness) * torch.sigmoid(unlikeness - mean) * (2 if self.twice else 1) * seen
            read = weights @ v
        return self.out(read.transpose(1, 2).flatten(-2))  # type: ignore[no-any-return]


class PairClassifier(nn.Module):
    """Tokens (B, L) of [class] a [between] b, kinds (B, L) 0 and 1 of the two sentences -> logits (B, classes): embeddings, blocks x + attention(LN x),
    x + MLP(LN x), and a linear layer of the class token. attention: width -> the layer."""

    def __init__(self, vocab: int, length: int, dim: int = 32, heads: int = 2, layers: int = 1, classes: int = 2, **options: bool):
        super().__init__()
        self.words, self.places, self.kinds = nn.Embedding(vocab, dim), nn.Embedding(length, dim), nn.Embedding(2, dim)
        self.norms = nn.ModuleList([nn.LayerNorm(dim) for _ in range(2 * layers)])
        self.attentions = nn.ModuleList([CompositionalAttention(dim, heads, **options) for _ in range(layers)])
        self.mlps = nn.ModuleList([nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)) for _ in range(layers)])
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, classes))

    def forward(self, tokens: Tensor, kinds: Tensor, keep: Tensor | None = None) -> Tensor:
        x = self.words(tokens) + self.kinds(kinds) + self.places.weight[: tokens.shape[1]]
        for at, (attention, mlp) in enumerate(zip(self.attentions, self.mlps, strict=True)):
            x = x + attention(self.norms[2 * at](x), None, keep)
            x = x + mlp(self.norms[2 * at + 1](x))
        return self.head(x[:, 0])  # type: ignore[no-any-return]
