"""Checks of flashmoba."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from regard.catalog import get
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.selected import qkv
from regard.lab.verification import check
from regard.zoo.sparse.flashmoba import KeyConv, flash_moba, flash_top_k, moba_snr, routing_trial


@check(
    "flashmoba",
    "score gap of a planted key, 20,000 trials, four (B, d): largest relative error of the SNR, and failures within 0.02 of Phi(-SNR)",
    below=0.08,
    control="SNR without the square root of d",
)
def _() -> tuple[float, float]:
    worst = other = 0.0
    for block, dim in ((32, 64), (64, 64), (128, 64), (64, 128)):
        found = routing_trial(block, dim, 0.5)
        snr, failure = moba_snr(block, dim, 0.5)
        worst = max(worst, abs(found.snr / snr - 1), math.inf if abs(found.failure - failure) > 0.02 else 0.0)
        other = max(other, abs(found.snr / (0.5 * math.sqrt(1 / (2 * block))) - 1))
    return worst, other


@check("flashmoba", "three related keys in a block: the mean gap over 3 x 0.5 / B, minus one", below=0.08, control="one key's")
def _() -> tuple[float, float]:
    mean = routing_trial(64, 64, 0.5, related=3).mean
    return abs(mean * 64 / 1.5 - 1), abs(mean * 64 / 0.5 - 1)


@check(
    "flashmoba", "B = 8, k = 4, L = 300, packed too: equals mechanism moba, with gradients and the same blocks", below=1e-9, control="k = 3"
)
def _() -> tuple[float, float]:
    leaves = tuple(x.requires_grad_() for x in qkv(300, 8, 4, 2))
    q, k, v = leaves
    seed = torch.randn(1, 4, 300, 8, dtype=F64)

    def both(out: Tensor) -> tuple[Tensor, ...]:
        return out, *torch.autograd.grad((out * seed).sum(), leaves)

    truth = both(attend(q, k, v, get("moba", block_size=8, top_k=4)))
    own, other = (
        max(naive.gap(a, b) for a, b in zip(both(flash_moba(q, k, v, block_size=8, top_k=n)), truth, strict=True)) for n in (4, 3)
    )
    parts = (90, 203, 7)
    separate = torch.cat(
        [attend(*one, get("moba", block_size=8, top_k=4)) for one in zip(*(x.split(parts, 2) for x in leaves), strict=True)], 2
    )
    own = max(own, naive.gap(flash_moba(q, k, v, block_size=8, top_k=4, lengths=parts), separate))
    centroids = k[:, :, :296].unflatten(2, (37, 8)).mean(3).repeat_interleave(2, 1)
    gate = (q @ centroids.transpose(-1, -2)).masked_fill(torch.arange(37) >= torch.arange(300)[:, None] // 8, -math.inf)
    best = gate.topk(3, -1)
    plain = best.indices.masked_fill(best.values == -math.inf, -1).sort(-1).values
    wrong = float((flash_top_k(q, centroids, 3, 8, tile=5).sort(-1).values != plain).sum())
    return own + wrong, other


@check("flashmoba", "key convolution: zero taps change nothing, a loop's values, causal", below=1e-12, control="taps reversed")
def _() -> tuple[float, float]:
    conv, k = KeyConv(2, 8, 3).double(), torch.randn(1, 2, 20, 8, dtype=F64)
    zero = naive.gap(conv(k), k)
    torch.nn.init.normal_(conv.taps)

    def loop(order: int) -> Tensor:
        out = k.clone()
        for t in range(20):
            mixed = (
                sum(
                    (conv.taps[:, lag][:, None] * k[:, :, t - lag : t - lag + 1] for lag in range(3) if t >= lag),
                    torch.zeros_like(k[:, :, :1]),
                )
                if order == 1
                else sum(
                    (conv.taps[:, 2 - lag][:, None] * k[:, :, t - lag : t - lag + 1] for lag in range(3) if t >= lag),
                    torch.zeros_like(k[:, :, :1]),
                )
            )
            out[:, :, t : t + 1] = k[:, :, t : t + 1] + torch.nn.functional.silu(mixed)
        return out.detach()

    moved = k.clone()
    moved[:, :, 10:] += 1
    ahead = naive.gap(conv(moved)[:, :, :10], conv(k)[:, :, :10])
    return max(zero, ahead, naive.gap(conv(k), loop(1))), naive.gap(conv(k), loop(2))


@check(
    "flashmoba",
    "the SNR with related keys equals (gap + (m - 1)(cluster - noise)) sqrt(d / 2B); trials are unit directions, repeatable by their seed",
    below=1e-9,
    control="a single related key",
)
def _() -> tuple[float, float]:
    snr, failure = moba_snr(64, 128, 0.5, related=3, cluster=0.4, noise=0.1)
    truth = (0.5 + 2 * 0.3) * math.sqrt(128 / 128)
    phi = math.erfc(truth / math.sqrt(2)) / 2
    first, second, third = (routing_trial(16, 8, 0.5, trials=2000, seed=seed) for seed in (1, 1, 2))
    again = float(first != second) + float(first == third)
    return abs(snr - truth) + abs(failure - phi) + again, abs(moba_snr(64, 128, 0.5)[0] - truth)
