"""Checks of token-pooling."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.lab import naive
from regard.lab.checks.shared.comparing import F64, gap_with_gradients
from regard.lab.checks.shared.planes import layer_norm
from regard.lab.checks.shared.shipped_vit import accuracy, shipped, unseen
from regard.lab.checks.shared.vits import mlp_of, out_of, projected, scores, small_vit, tokens_by_hand
from regard.lab.verification import check
from regard.zoo.vision.token_pooling import PooledViT, clustering_loss, softmax_as_gaussian_filter, token_pool


def start(x: Tensor, count: int, w: Tensor | None) -> list[int]:
    if w is not None:
        return sorted(range(len(x)), key=lambda i: -float(w[i]))[:count]
    taken = [0]
    while len(taken) < count:
        taken.append(max(range(len(x)), key=lambda i: min(float((x[i] - x[j]).detach().norm()) for j in taken)))
    return taken


def by_hand(x: Tensor, count: int, w: Tensor | None, method: str, iters: int) -> Tensor:
    """One cloud x (N, C), token by token."""
    at = start(x, count, w)
    weight = [1.0] * len(x) if w is None else [float(y) for y in w]
    centres = [x[i] for i in at]
    for _ in range(iters):
        groups: list[list[int]] = [[] for _ in range(count)]
        for i in range(len(x)):
            groups[min(range(count), key=lambda j: float((x[i] - centres[j]).detach().norm()))].append(i)
        for j, group in enumerate(groups):
            if not group or (method == "kmeans" and sum(weight[i] for i in group) == 0):
                continue
            if method == "kmeans":
                total = sum(weight[i] for i in group)
                centres[j] = torch.stack([weight[i] / total * x[i] for i in group]).sum(0)
            else:
                best = min(group, key=lambda m: sum(weight[i] * float((x[i] - x[m]).detach().norm()) for i in group))
                centres[j] = x[best]
    return torch.stack(centres)


@check(
    "token-pooling",
    "weighted and plain k-means and k-medoids after 0, 1 and 5 rounds, and gradients of means == token by token",
    below=1e-10,
    control="weights left out",
)
def _() -> tuple[float, float]:
    x, w, gaps = torch.randn(2, 20, 3, dtype=F64, requires_grad=True), torch.rand(2, 20, dtype=F64), []
    for method in ("kmeans", "kmedoids"):
        for given in (w, None):
            for iters in (0, 1, 5):
                truth = torch.stack([by_hand(x[b], 6, None if given is None else given[b], method, iters) for b in range(2)])
                gaps.append(gap_with_gradients(token_pool(x, 6, given, method, iters).tokens, truth, (x,)))
    plain = torch.stack([by_hand(x[b], 6, None, "kmeans", 5) for b in range(2)])
    return max(gaps), naive.gap(token_pool(x, 6, w).tokens, plain)


def clouds() -> tuple[Tensor, Tensor]:
    """100 clouds of 128 points about 16 centres in 32 dimensions, and random weights."""
    generator = torch.Generator().manual_seed(0)
    centres = 2 * torch.randn(100, 16, 32, generator=generator)
    at = torch.randint(16, (100, 128), generator=generator)
    x = centres.gather(1, at[..., None].expand(-1, -1, 32)) + torch.randn(100, 128, 32, generator=generator)
    return x, torch.rand(100, 128, generator=generator)


@check(
    "token-pooling",
    "loss after 5 rounds of weighted k-means over the start's, mean of 100 clouds",
    below=0.6,
    control="the tokens of largest weight",
)
def _() -> tuple[float, float]:
    x, w = clouds()
    first = clustering_loss(x, token_pool(x, 32, w, "topk").tokens, w)
    return tuple(float((clustering_loss(x, token_pool(x, 32, w, m).tokens, w) / first).mean()) for m in ("kmeans", "topk"))  # type: ignore[return-value]


@check(
    "token-pooling", "largest rise of the loss from one round to the next, over it, in 100 clouds", below=1e-5, control="rounds in reverse"
)
def _() -> tuple[float, float]:
    x, w = clouds()
    losses = torch.stack([clustering_loss(x, token_pool(x, 32, w, iters=n).tokens, w) for n in range(6)])
    return float(((losses[1:] - losses[:-1]) / losses[:-1]).max()), float(((losses[:-1] - losses[1:]) / losses[1:]).max())


@check("token-pooling", "medoids that are no rows of the input, and what K = N changes", below=0.0, control="means")
def _() -> tuple[float, float]:
    x, w = clouds()

    def strangers(method: str) -> float:
        y = token_pool(x, 32, w, method).tokens
        return float((torch.cdist(y, x, compute_mode="donot_use_mm_for_euclid_dist").amin(2) > 0).sum())

    return strangers("kmedoids") + naive.gap(token_pool(x, 128, w).tokens, x), strangers("kmeans")


@check(
    "token-pooling",
    "a ViT pooled behind the attention of blocks 0 and 2, weights from the columns of that attention == by hand",
    below=1e-9,
    control="weights of one",
)
def _() -> tuple[float, float]:
    vit, images = small_vit(3), torch.randn(2, 3, 16, 16, dtype=F64)

    def by_hand_vit(weighted: bool) -> Tensor:
        x, keep = tokens_by_hand(vit, images), {0: 9, 2: 4}
        for at, block in enumerate(vit.blocks):
            q, k, v = projected(block.attn, layer_norm(x, block.norm1, 1e-6))
            p = scores(block.attn, q, k).softmax(-1)
            x = x + out_of(block.attn, p @ v)
            x = x + mlp_of(block, x)
            if at in keep:
                w = p.sum((1, 2))[:, 1:] if weighted else torch.ones_like(p[:, 0, 0, 1:])
                pooled = [by_hand(x[b, 1:], keep[at], w[b], "kmeans", 5) for b in range(2)]
                x = torch.cat((x[:, :1], torch.stack(pooled)), 1)
        return layer_norm(x, vit.norm, 1e-6)[:, 0] @ vit.head.weight.T + vit.head.bias

    pooled = PooledViT(vit, {0: 9, 2: 4})
    return naive.gap(pooled(images), by_hand_vit(True)), naive.gap(pooled(images), by_hand_vit(False))


@check("token-pooling", "attention over keys of one norm, off the Gaussian filter of the values", below=1e-10, control="keys of any norm")
def _() -> tuple[float, float]:
    q, k, v = (torch.randn(2, n, 8, dtype=F64) for n in (5, 9, 9))
    unit = k / k.norm(dim=-1, keepdim=True)
    filtered = torch.stack([torch.exp(-0.35 * (q[:, i : i + 1] - unit).square().sum(-1)) for i in range(5)], 1)
    truth = filtered / filtered.sum(-1, keepdim=True) @ v
    own = softmax_as_gaussian_filter(q, unit, v, 0.7)
    return max(naive.gap(own[0], truth), naive.gap(own[1], truth)), naive.gap(*softmax_as_gaussian_filter(q, k, v, 0.7))


@check(
    "token-pooling",
    "accuracy that the ViT on digits loses, without training, when 64 patches become 16 clusters behind block 2",
    below=0.065,
    control="means of stretches of patches",
)
def _() -> tuple[float, float]:
    vit, drawn = shipped(), unseen(500)
    whole = accuracy(vit, drawn)
    lost = [whole - accuracy(PooledViT(vit, {2: 16}, method), drawn) for method in ("kmeans", "grid")]
    return lost[0], lost[1]
