"""Checks of pbs-attn."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from regard.algebra import Causal, Chosen, bind
from regard.algebra.blocks import probabilities
from regard.catalog import get
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.selected import masked_softmax, qkv, selection_of
from regard.lab.verification import check
from regard.zoo.sparse.pbs_attn import order_of, pbs_plan


@check("pbs-attn", "threshold 1 is dense causal attention, L = 1000, and gradients", below=1e-12, control="threshold 0.3")
def _() -> tuple[float, float]:
    q, k, v = (x.requires_grad_() for x in qkv(1000))
    truth = attend(q, k, v, mask=Causal())
    seed = torch.randn_like(truth)
    expected = (truth, *torch.autograd.grad((truth * seed).sum(), (q, k, v)))
    gaps = []
    for threshold in (1.0, 0.3):
        out = attend(q, k, v, get("pbs-attn", threshold=threshold, block_size=32, segment=128))
        gaps.append(max(naive.gap(a, b) for a, b in zip((out, *torch.autograd.grad((out * seed).sum(), (q, k, v))), expected, strict=True)))
    return gaps[0], gaps[1]


@check(
    "pbs-attn",
    "threshold 1: tokens changed from a place inside a segment on change nothing before it",
    below=1e-12,
    control="threshold 0.3, whose choice looks at the last queries",
)
def _() -> tuple[float, float]:
    x, gaps = qkv(300), []
    later = tuple(torch.cat((y[:, :, :150], torch.randn_like(y[:, :, 150:])), 2) for y in x)
    for threshold in (1.0, 0.3):
        mechanism = get("pbs-attn", threshold=threshold, block_size=16, segment=64)
        gaps.append(naive.gap(attend(*later, mechanism)[:, :, :150], attend(*x, mechanism)[:, :, :150]))
    return gaps[0], gaps[1]


def permuted_pairs(q: Tensor, k: Tensor, size: int, segment: int, threshold: float, first: bool) -> Tensor:
    """(H, L, L) bool: pairs read, tokens in their own order, a loop over heads and blocks of queries."""
    length = q.shape[2]
    pairs = torch.zeros(q.shape[1], length, length, dtype=torch.bool)
    for h in range(q.shape[1]):
        keys, whole = k[0, h // (q.shape[1] // k.shape[1])], length // segment * segment
        last = [(keys[:whole] @ row / math.sqrt(q.shape[3])).softmax(0) for row in q[0, h, -size:]]
        mass = torch.stack(last).mean(0).tolist()
        order = [j for a in range(0, whole, segment) for j in sorted(range(a, a + segment), key=lambda j: -mass[j])]
        order += list(range(whole, length))
        blocks = [order[a : a + size] for a in range(0, length, size)]
        for u in range(len(blocks)):
            rows = list(range(u * size, min((u + 1) * size, length)))
            past = [w for w in range(len(blocks)) if w * size // segment < u * size // segment]
            s = [float(q[0, h, rows].sum(0) @ keys[blocks[w]].sum(0)) / size**2 / math.sqrt(q.shape[3]) for w in past]
            total, kept, read = sum(math.exp(x) for x in s), 0.0, set()
            for x, w in sorted(zip(s, past, strict=True), reverse=True):
                if kept < threshold:
                    read.add(w)
                kept += math.exp(x) / total
            if first and past:
                read.add(next(w for w in range(len(blocks)) if 0 in blocks[w]))
            read |= {w for w in range(len(blocks)) if w * size // segment == u * size // segment}
            for w in read:
                for i in rows:
                    pairs[h, i, [j for j in blocks[w] if j <= i]] = True
    return pairs


@check(
    "pbs-attn",
    "output equals softmax over the pairs of a loop that sorts and chooses by itself: ragged, grouped heads, first block or not",
    below=1e-10,
    control="another threshold",
)
def _() -> tuple[float, float]:
    q, k, v = qkv(205, 8, 4, 2)
    q = 2 * q
    own = 0.0
    for threshold, first in ((0.3, True), (0.7, False), (0.9, True)):
        truth = masked_softmax(q, k, v, permuted_pairs(q, k, 8, 32, threshold, first))
        found = attend(q, k, v, get("pbs-attn", threshold=threshold, block_size=8, segment=32, first=first))
        own = max(own, naive.gap(found, truth))
    return own, naive.gap(attend(q, k, v, get("pbs-attn", threshold=0.5, block_size=8, segment=32)), truth)


def heavy(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(1, 1, 1024, 32, dtype=F64, generator=generator) for _ in range(2))
    direction = torch.nn.functional.normalize(torch.randn(32, dtype=F64, generator=generator), dim=0)
    q = q + 5 * direction
    k[:, :, torch.randperm(1024, generator=generator)[:48]] += 6 * direction
    return q, k


def far_density(q: Tensor, k: Tensor, permute: bool) -> tuple[float, float]:
    """(density outside own segments, mass captured) at threshold 0.9, blocks of 32, segments of 256."""
    order = order_of(q / math.sqrt(32), k, 32, 256).order if permute else torch.arange(1024).expand(1, 1, -1)
    sorted_k = k.gather(2, order[..., None].expand_as(k))
    plan = Chosen(bind(pbs_plan, threshold=0.9, block_size=32, segment=256))
    keep = selection_of(plan, q, sorted_k, since=order[:, :, None]).keep
    u, w = torch.arange(32)[:, None] // 8, torch.arange(32) // 8
    pairs = keep.repeat_interleave(32, -2).repeat_interleave(32, -1)
    causal = order[:, :, None] <= torch.arange(1024)[:, None]
    p = probabilities(q @ sorted_k.transpose(-1, -2) / math.sqrt(32), causal)
    return float(keep[..., w < u].double().mean()), float((p * pairs).sum(-1).mean())


@check(
    "pbs-attn",
    "48 heavy keys: density outside own segments at captured mass >= 0.95, the largest of 3 draws",
    below=0.65,
    control="three quarters of the unpermuted one's, the smallest of 3",
)
def _() -> tuple[float, float]:
    own, plain = [], []
    for seed in range(3):
        q, k = heavy(seed)
        density, mass = far_density(q, k, True)
        own.append(density if mass >= 0.95 else math.inf)
        plain.append(far_density(q, k, False)[0])
    return max(own), 0.75 * min(plain)


@check("pbs-attn", "the inverse permutation restores keys exactly", below=0, control="applied twice")
def _() -> tuple[float, float]:
    q, k, _ = qkv(300)
    order = order_of(q, k, 32, 64)
    return naive.gap(order.invert(order.apply(k)), k), naive.gap(order.apply(order.apply(k)), k)
