"""Token pooling: a ViT's patches become the centres of their clusters (id 23; Marin et al., 2021).

minimise sum_i w_i min_j |f_i - c_j|^2, w_i what attention token i received: sum over heads and queries of A[h, l, i]
start: the K tokens of largest w (farthest points without weights);  5 times: nearest centre, then the weighted mean of its tokens
(k-means; an empty cluster keeps its centre) or the token with the least weighted distance to its cluster (k-medoids)
Not reproduced on the ViT on digits that comes with regard: better than the tokens of largest weight (16 of 64 patches: 63.6% right, and 63.2%)
Softmax attention over keys of one norm is a Gaussian filter of the values: softmax_j(s q.k_j) ~ exp(-s |q - k_j|^2 / 2)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from regard.algebra.clusters import between, farthest
from regard.catalog.registry import register
from regard.errors import RegardError
from regard.nn.images.vit_host import after_attention, attention, embedded, host_of, weights_of

METHODS = ("kmeans", "kmedoids", "topk", "random", "grid")


class Pooled(NamedTuple):
    """tokens (B, K, C), assign (B, N): the cluster of each token, centres (B, K): tokens that are, or are nearest to, the centres."""

    tokens: Tensor
    assign: Tensor
    centres: Tensor


def of(x: Tensor, at: Tensor) -> Tensor:
    """Rows `at` (B, K) of x (B, N, C)."""
    return x.gather(1, at[..., None].expand(-1, -1, x.shape[-1]))


def clustering_loss(x: Tensor, centres: Tensor, weights: Tensor | None = None) -> Tensor:
    """sum_i w_i min_j |x_i - c_j|^2, (B,)."""
    near = between(x, centres).amin(2).square()
    return (near if weights is None else weights * near).sum(1)


@torch.no_grad()
def clusters(x: Tensor, count: int, weights: Tensor | None, method: str, iters: int) -> tuple[Tensor, Tensor, Tensor]:
    """After `iters` rounds: the last round's member (B, N, K) with weights, zeros where a cluster keeps its centre; the centres (B, K, C); and
    the tokens (B, K) that they are, or started as."""
    distances = between(x, x)
    w = torch.ones_like(distances[..., 0]) if weights is None else weights
    at = farthest(x, count) if weights is None else weights.topk(count, 1).indices
    centres, shares = of(x, at), x.new_zeros(*x.shape[:2], count)
    for _ in range(iters):
        member = nn.functional.one_hot(between(x, centres).argmin(2), count).to(x.dtype) * w[..., None]
        if method == "kmeans":
            mass = member.sum(1, keepdim=True)
            shares = member / torch.where(mass > 0, mass, 1.0)
            centres = torch.where(mass.mT > 0, shares.mT @ x, centres)
        else:
            inside = nn.functional.one_hot(between(x, centres).argmin(2), count).bool()
            cost = torch.einsum("bnk,bnm->bmk", member, distances).masked_fill(~inside, torch.inf)
            at = torch.where(inside.any(1), cost.argmin(1), at)
            centres = of(x, at)
    return shares, centres, at


@register("token-pooling", kind="function")
def token_pool(
    x: Tensor, count: int, weights: Tensor | None = None, method: str = "kmeans", iters: int = 5, draw: Tensor | None = None
) -> Pooled:
    """x (B, N, C) -> `Pooled` of `count` tokens. weights (B, N) >= 0. Gradients pass through the averaged or gathered tokens alone.

    method: "kmeans", "kmedoids", or the baselines "topk" (largest weights), "random" (drawn without replacement by weight; draw (B, N): uniform
    numbers to use) and "grid" (means of `count` stretches of tokens).
    """
    if x.dim() != 3 or not 1 <= count <= x.shape[1] or method not in METHODS or iters < 0:
        raise RegardError(
            f"x {tuple(x.shape)}, count={count}, method={method!r}, iters={iters}; expected (B, N, C), 1 <= count <= N, one of {METHODS}"
        )
    if weights is not None and (weights.shape != x.shape[:2] or bool((weights < 0).any()) or not bool(weights.isfinite().all())):
        raise RegardError(f"weights {tuple(weights.shape)}; expected {tuple(x.shape[:2])}, finite and none below zero")
    if method == "topk" and weights is None:
        raise RegardError("method='topk' without weights; expected weights (B, N)")
    if count == x.shape[1]:
        whole = torch.arange(count, device=x.device).expand(len(x), -1)
        return Pooled(x, whole, whole)
    seen = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    weights = None if weights is None else weights.detach().to(seen.dtype)
    if method == "grid":
        assign = (torch.arange(x.shape[1], device=x.device) * count // x.shape[1]).expand(len(x), -1)
        shares = nn.functional.one_hot(assign, count).to(seen.dtype)
        tokens = (shares / shares.sum(1, keepdim=True)).to(x.dtype).mT @ x
        return Pooled(tokens, assign, between(tokens.detach().to(seen.dtype), seen).argmin(2))
    if method == "kmeans":
        shares, centres, at = clusters(seen, count, weights, method, iters)
        kept = (shares.sum(1) == 0)[..., None]
        tokens = torch.where(kept, centres.to(x.dtype), shares.to(x.dtype).mT @ x) if iters else of(x, at)
        return Pooled(tokens, between(seen, centres).argmin(2), between(centres, seen).argmin(2))
    if method == "kmedoids":
        at = clusters(seen, count, weights, method, iters)[2]
    elif method == "topk":
        assert weights is not None
        at = weights.topk(count, 1).indices
    else:
        draw = torch.rand(x.shape[:2], device=x.device) if draw is None else draw
        at = (draw.to(seen.dtype).log() / (1.0 if weights is None else weights.clamp_min(1e-12))).topk(count, 1).indices
    return Pooled(of(x, at), between(seen, of(seen, at)).argmin(2), at)


class PooledViT(nn.Module):
    """A timm ViT whose patches are pooled behind the attention of chosen blocks. keep: {block: how many patches go on}. Weights are what patches
    received in that block's attention; first tokens are never pooled. No training is needed; gradients pass."""

    def __init__(self, vit: nn.Module, keep: Mapping[int, int], method: str = "kmeans", iters: int = 5):
        super().__init__()
        self.vit = host_of(vit)
        if any(not 0 <= block < len(self.vit.blocks) for block in keep):
            raise RegardError(f"keep={dict(keep)}; expected blocks 0..{len(self.vit.blocks) - 1}")
        self.keep, self.method, self.iters = dict(keep), method, iters

    def forward(self, images: Tensor) -> Tensor:
        vit: Any = self.vit
        x, prefix = embedded(vit, images), vit.num_prefix_tokens
        for number, block in enumerate(vit.blocks):
            y = block.norm1(x)
            x = after_attention(block, x, attention(block.attn, y))
            if number in self.keep:
                received = weights_of(block.attn, y).sum((1, 2))[:, prefix:].detach()
                pooled = token_pool(x[:, prefix:], min(self.keep[number], x.shape[1] - prefix), received, self.method, self.iters)
                x = torch.cat((x[:, :prefix], pooled.tokens), 1)
        return vit.forward_head(vit.norm(x))  # type: ignore[no-any-return]


def softmax_as_gaussian_filter(q: Tensor, k: Tensor, v: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """(attention, Gaussian smoothing) of v: softmax(scale q k^T) v, and the mean of v by exp(-scale |q - k_j|^2 / 2). Equal where all keys of
    k (..., M, D) have one norm."""
    attended = torch.softmax(scale * q @ k.mT, -1) @ v
    kernel = torch.softmax(-scale / 2 * torch.cdist(q, k, compute_mode="donot_use_mm_for_euclid_dist").square(), -1)
    return attended, kernel @ v
