"""Checks of hip."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from regard.algebra import Causal
from regard.algebra.part import Sizes
from regard.catalog import get
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.selected import masked_softmax, qkv, s_attend
from regard.lab.planted import autoregressive
from regard.lab.verification import check
from regard.zoo.sparse.hip import CachedHip, tree


def descent(q: Tensor, k: Tensor, searched: int, kept: int, block_k: int, middle: bool = False) -> tuple[list[int], set[int]]:
    """The `kept` blocks of keys k[:searched] (n, D) that a tree finds for queries q, group by group, and the keys it has looked at."""
    blocks, seen = math.ceil(searched / block_k), set()
    groups = [(n * blocks // kept, (n + 1) * blocks // kept - n * blocks // kept) for n in range(kept)]
    while max(size for _, size in groups) > 1:
        halves = [half for start, size in groups for half in ((start, size // 2), (start + size // 2, size - size // 2)) if half[1]]
        scores = {}
        for start, size in halves:
            block = start + size // 2 if middle else start
            keys = range(block * block_k, min((block + 1) * block_k, searched))
            seen |= set(keys)
            scores[start, size] = max(float(q[i] @ k[j]) for i in range(len(q)) for j in keys)
        groups = sorted(halves, key=lambda half: -scores[half])[:kept]
    return [start for start, _ in groups], seen


def hip_pairs(
    q: Tensor, k: Tensor, mask_k: int, block_q: int, block_k: int, sinks: int, window: int, stride: int, middle: bool = False
) -> Tensor:
    """(H, Lq, Lk) bool: the pairs HiP reads, a loop over heads and blocks of queries at the end of the keys."""
    heads, length, keys = q.shape[1], q.shape[2], k.shape[2]
    pairs, first = torch.zeros(heads, length, keys, dtype=torch.bool), keys - length
    for h in range(heads):
        one = k[0, h // (heads // k.shape[1])]
        for begin in range(0, length, block_q):
            rows = list(range(begin, min(begin + block_q, length)))
            near = max(first + begin - window + 1, 0)  # where the window of the block's first query starts
            searched = near if window else first + rows[-1] + 1
            if searched <= mask_k:
                chosen = set(range(math.ceil(searched / block_k)))
            else:
                chosen = set(descent(q[0, h, rows][::stride], one, searched, mask_k // block_k, block_k, middle)[0])
            for j in range(keys):
                block = j // block_k
                read = block in chosen or block * block_k < sinks or (block + 1) * block_k > near
                for i in rows:
                    pairs[h, i, j] = read and j <= first + i
    return pairs


@check("hip", "a prompt of at most mask_k tokens is dense causal attention", below=1e-12, control="mask_k = L / 4")
def _() -> tuple[float, float]:
    q, k, v = qkv(128, 16)
    truth = attend(q, k, v, mask=Causal())
    outs = [attend(q, k, v, get("hip", mask_k=size, sinks=1, window=1)) for size in (128, 32)]
    return naive.gap(outs[0], truth), naive.gap(outs[1], truth)


@check(
    "hip",
    "one descent, T = 2048, mask_k = 256, counts 2 mask_k log2(T / mask_k) keys and looks at no others: all others are NaN, the choice as before",
    below=0,
    control="T = 1024, a round less",
)
def _() -> tuple[float, float]:
    q, k, _ = qkv(2048, 16, 1)
    q = q[:, :, -32:]

    def off(length: int) -> float:
        keep, reads = tree(q, k[:, :, :length], length - 32, 256, 32, 2, 0, 0, 2, "first")
        blocks, seen = descent(q[0, 0, ::2], k[0, 0], length, 128, 2)
        unread = torch.full_like(k, math.nan)
        unread[:, :, sorted(seen)] = k[:, :, sorted(seen)]
        again = tree(q, unread[:, :, :length], length - 32, 256, 32, 2, 0, 0, 2, "first")[0]
        truth = {*blocks, *range((length - 32) // 2, length // 2)}  # the queries' own blocks too
        found = [set(one.keep[0, 0, 0].nonzero().flatten().tolist()) for one in (keep, again)]
        return float(abs(reads[0] - 2 * 256 * 3) + (found[0] != truth) + (found[1] != truth) + (len(seen) > 2 * 256 * 3))

    return off(2048), off(1024)


def captured(q: Tensor, k: Tensor) -> tuple[float, float]:
    """Mass in HiP's 256 keys, and in 256 random ones, over that of each query's best 256."""
    own, random = [], []
    for i in range(8):
        p = (k[0, 0] @ q[0, 0, i] / math.sqrt(32)).softmax(0)
        keep = tree(q[:, :, i : i + 1], k, 2047, 256, 1, 2, 0, 0, 1, "first")[0].keep[0, 0, 0]
        best = float(p.topk(256).values.sum())
        own.append(float(p.unflatten(0, (-1, 2)).sum(-1)[keep].sum()) / best)
        random.append(float(p[torch.randperm(2048)[:256]].sum()) / best)
    return sum(own) / 8, sum(random) / 8


@check("hip", "slowly drifting keys: mass captured over the exact top 256's", above=0.95, control="256 random keys")
def _() -> tuple[float, float]:
    k = autoregressive(2048, 32, 0.98)[None, None]
    return captured(2 * torch.randn(1, 1, 8, 32, dtype=F64), k)


@check(
    "hip",
    "keys without locality: the tree misses much of the mass (so it has not scored everything)",
    below=0.9,
    control="slowly drifting keys",
)
def _() -> tuple[float, float]:
    q = 2 * torch.randn(1, 1, 8, 32, dtype=F64)
    return captured(q, torch.randn(1, 1, 2048, 32, dtype=F64))[0], captured(q, autoregressive(2048, 32, 0.98)[None, None])[0]


@check(
    "hip",
    "equals dense attention under the pairs of a loop over groups: both representatives, every 1, 2, 3 queries scored, grouped heads, ragged, one query",
    below=1e-10,
    control="groups shown by their middle block instead of their first",
)
def _() -> tuple[float, float]:
    q, k, v = qkv(147, 8, 4, 2)
    sizes = {"mask_k": 24, "block_q": 8, "block_k": 2, "sinks": 4, "window": 12}
    own = other = 0.0
    for stride, middle, changes in (
        (2, False, {}),
        (1, True, {"block_k": 4, "sinks": 0}),
        (3, False, {"window": 0, "block_q": 9}),
    ):
        given = {**sizes, **changes}
        truth = s_attend(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), hip_pairs(q, k, **given, stride=stride, middle=middle))
        outs = [
            attend(q, k, v, get("hip", **given, query_stride=stride, representative=name))
            for name in (("middle", "first") if middle else ("first", "middle"))
        ]
        own, other = max(own, naive.gap(outs[0], truth)), naive.gap(outs[1], truth)
    alone, last = attend(q[:, :, -1:], k, v, get("hip", **sizes)), q[:, :, -1:]
    pairs = hip_pairs(last, k, **sizes, stride=1)
    return max(own, naive.gap(alone, s_attend(last, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), pairs))), other


@check(
    "hip",
    "the cost a plan counts: 2 D products of each scored query with two halves of mask_k keys a round, log2(L / mask_k) rounds",
    below=0,
    control="every query scored",
)
def _() -> tuple[float, float]:
    sizes = Sizes(2, 4, 2, 512, 2048, 16, 16)
    truth = 2 * 16 * 2 * 4 * (512 // 2) * (2 * 128) * 4

    def off(stride: int) -> float:
        return abs(float(get("hip", mask_k=128, query_stride=stride).select.flops(sizes)) - truth)  # type: ignore[attr-defined]

    return off(2), off(1)


@check(
    "hip",
    "decoding that descends every third token equals a loop that keeps the blocks found last, sinks and the present window; refresh = 1 decodes as ever",
    below=1e-10,
    control="a descent every token",
)
def _() -> tuple[float, float]:
    q, k, v = qkv(80, 8, 4, 2)
    sizes: dict[str, int] = {"mask_k": 16, "block_k": 2, "sinks": 4, "window": 7}
    outs: dict[int, list[Tensor]] = {1: [], 3: []}
    caches = {refresh: CachedHip(refresh, **sizes) for refresh in outs}
    truth, plain, kept = [], [], torch.zeros(0)
    for t in range(60, 80):
        now = [x[:, :, : t + 1] for x in (k, v)]
        for refresh, cache in caches.items():
            outs[refresh].append(cache.step(q[:, :, t : t + 1], *now))
        if (t - 60) % 3 == 0:
            kept = hip_pairs(q[:, :, t : t + 1], now[0], **sizes, block_q=1, stride=1)
        near = (torch.arange(t + 1) // 2 + 1) * 2 > t + 1 - 7
        pairs = torch.nn.functional.pad(kept, (0, t + 1 - kept.shape[-1])) | near
        truth.append(masked_softmax(q[:, :, t : t + 1], *now, pairs))
        plain.append(attend(q[:, :, t : t + 1], *now, get("hip", **sizes)))
    own = max(naive.gap(torch.cat(outs[3], 2), torch.cat(truth, 2)), naive.gap(torch.cat(outs[1], 2), torch.cat(plain, 2)))
    count = abs(caches[3].descents - 7) + abs(caches[1].descents - 20)
    return own + count, naive.gap(torch.cat(outs[1], 2), torch.cat(truth, 2))
