"""Checks of qada."""

from __future__ import annotations

import math
import random

import torch
from torch import Tensor

from regard import models
from regard.cache.moments import Moments
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.heads import source
from regard.lab.verification import check
from regard.models.needles import fact, question
from regard.taps import read
from regard.zoo.analysis.qada import QAdA, attend_adaptively, calibrate, sparsity_curve


@check(
    "qada",
    "4096 Gaussian keys of 32 channels: log of their mass from moments, greatest mean error over 200 queries of 3 seeds",
    below=0.15,
    control="from their mean alone, the least",
)
def _() -> tuple[float, float]:
    own, other = [], []
    for _ in range(3):
        mix = torch.randn(32, 32, dtype=F64) * 0.3
        k, q = torch.randn(4096, 32, dtype=F64) @ mix + 0.5 * torch.randn(32, dtype=F64), torch.randn(200, 32, dtype=F64)
        truth = (q @ k.T * 32**-0.5).logsumexp(1)
        found = Moments.of(k, torch.ones(4096).bool())
        own.append(float((found.log_mass(q, found.count, 32**-0.5) - truth).abs().mean()))
        other.append(float((found.log_mass(q, found.count, 32**-0.5, second=False) - truth).abs().mean()))
    return max(own), min(other)


def by_hand(
    q: Tensor, k: Tensor, v: Tensor, sink: int, local: int, tau: float, second: float, other: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """q (H, n, D) of the last n tokens, k, v (Hkv, T, D): outputs and decisions, a query at a time; other (Hkv, m, D): keys whose moments stand
    for those of the far ones."""
    heads, n, d = q.shape
    out, decided = torch.zeros_like(q), torch.zeros(heads, n)
    for h in range(heads):
        keys, values = k[h * len(k) // heads], v[h * len(k) // heads]
        for t in range(n):
            here = k.shape[1] - n + t
            s = [float(q[h, t] @ key) / math.sqrt(d) for key in keys[: here + 1]]
            near = [j for j in range(here + 1) if j < sink or j > here - local]
            far = [j for j in range(here + 1) if j not in near]
            mass = sum(math.exp(s[j]) for j in near)
            bulk = 0.0
            if far:
                x = keys[far] if other is None else other[h * len(k) // heads]
                mean = x.mean(0)
                cov = (x - mean).T @ (x - mean) / len(x)
                bulk = len(far) * math.exp(float(q[h, t] @ mean) / math.sqrt(d) + second * float(q[h, t] @ cov @ q[h, t]) / (2 * d))
            decided[h, t] = mass / (mass + bulk) >= tau
            seen = near if decided[h, t] else range(here + 1)
            w = torch.tensor([math.exp(s[j]) for j in seen], dtype=F64)
            out[h, t] = (w / w.sum()) @ values[list(seen)]
    return out, decided


@check(
    "qada",
    "decisions and outputs of the last 70 of 90 tokens, 4 heads over 2: loops over keys",
    below=1e-10,
    control="without the covariance",
)
def _() -> tuple[float, float]:
    q, k, v = torch.randn(4, 70, 6, dtype=F64) * 2, torch.randn(2, 90, 6, dtype=F64), torch.randn(2, 90, 6, dtype=F64)
    k[:, 20:30] += 1.0
    truth, decided = by_hand(q, k, v, 3, 12, 0.5, 1.0)
    policy = QAdA(3, 12, 0.5, report=True)
    out, local = attend_adaptively(q[None], k[None], v[None], policy)
    mixed = 0.1 < float(decided.mean()) < 0.9
    seen = sum(15 if x else 20 + t + 1 for row in decided.tolist() for t, x in enumerate(row))
    gap = max(naive.gap(out[0], truth), naive.gap(local[0].float(), decided), abs(policy.read - seen), 0.0 if mixed else 1.0)
    bare, _ = by_hand(q, k, v, 3, 12, 0.5, 0.0)
    return gap, naive.gap(out[0], bare)


@check(
    "qada",
    "two far clusters of 4096 keys, half the queries look far: share of decisions that are the oracle's (called local though far: at most 2%)",
    above=0.95,
    control="the best rule a head, whatever the query",
)
def _() -> tuple[float, float]:
    own, static = [], []
    for seed, share in enumerate((0.02, 0.1, 0.3)):
        draw = torch.Generator().manual_seed(seed)
        k, v = (torch.randn(1, 1, 4096, 32, generator=draw, dtype=F64) for _ in range(2))
        u, w = torch.linalg.qr(torch.randn(32, 2, generator=draw, dtype=F64)).Q.T
        k[:, :, 16 : 16 + int(4080 * share)] += 2.5 * u
        k[:, :, -256:] += 2.5 * w
        q = torch.randn(1, 400, 1, 32, generator=draw, dtype=F64)
        q = q + torch.where(torch.arange(400)[:, None, None] < 200, 12 * u, 12 * w)
        policy = QAdA(16, 256, report=True)
        out, local = attend_adaptively(q, k, v, policy)
        found, oracle = policy.found(), QAdA(16, 256, rule="oracle")
        _, truth = attend_adaptively(q, k, v, oracle)
        dense, _ = attend_adaptively(q, k, v, QAdA(16, 256, tau=1.1))
        near, _ = attend_adaptively(q, k, v, QAdA(16, 256, tau=0.0))
        bound = (near - dense).norm(dim=-1)[truth].max() <= 2 * 0.4 * v.norm(dim=-1).max()
        own.append(found["agreement"] if found["false_local"] <= 0.02 and bool(bound) and not bool((out - dense)[~local].any()) else 0.0)
        static.append(max(float(truth.double().mean()), 1 - float(truth.double().mean())))
    return min(own), max(static)


@check(
    "qada",
    "tiny model, left-padded batch: tau above 1 == plain decoding, moments of the steps == of the keys that left the window, rows as alone",
    below=1e-4,
    control="tau = 0",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    model = models.load("tiny")
    ids = source(1, 60)[:, :60]
    padded, mask = torch.cat((torch.zeros(1, 7).long(), ids[:, :53]), 1), torch.ones(2, 60).long()
    mask[0, :7] = 0
    batch = torch.cat((padded, ids))

    def run(policy: QAdA | None, ids: Tensor, mask: Tensor) -> tuple[Tensor, QAdA | None, list[dict[str, Tensor]], list[Tensor]]:
        options = {"max_new_tokens": 12, "do_sample": False, "output_logits": True, "return_dict_in_generate": True, "pad_token_id": 0}
        if policy is None:
            return torch.stack(model.generate(ids, attention_mask=mask, **options).logits), None, [], []
        with policy(model) as session:
            out = torch.stack(model.generate(ids, attention_mask=mask, **options).logits)
        layers = session.cache.layers
        return out, policy, [layer.memory for layer in layers], [layer.parts[0].keys for layer in layers]

    truth = run(None, batch, mask)[0]
    full, _, memory, keys = run(QAdA(4, 20, 1.1), batch, mask)
    gap = naive.gap(full, truth)
    for known, k in zip(memory, keys, strict=True):
        for row, first in ((0, 7), (1, 0)):
            x = k[row, :, first + 4 : 70 - 20 + 1].double()  # the last query stands at 70
            for name, own in (("count", torch.full((4,), x.shape[1])), ("total", x.sum(1)), ("outer", x.mT @ x)):
                gap = max(gap, naive.gap(known[name][row], own) / float(own.double().abs().max()))
    batched = run(QAdA(4, 20, 0.6), batch, mask)[0]
    for row, own in ((0, padded[:, 7:]), (1, ids)):
        gap = max(gap, naive.gap(batched[:, row], run(QAdA(4, 20, 0.6), own, torch.ones_like(own))[0][:, 0]))
    return gap, naive.gap(run(QAdA(4, 20, 0.0), batch, mask)[0], truth)


def needles(count: int, length: int) -> list[tuple[Tensor, Tensor]]:
    draw, text, out = random.Random(0), source(1, length * count)[0, 1:], []
    for at in range(count):
        one, hay = fact(draw), text[at * length : (at + 1) * length]
        cut = int((at + 0.5) / count * 0.7 * length)
        parts = (hay[:cut], torch.tensor(list(one.text)), hay[cut:], torch.tensor(list(question(one.name))))
        out.append((torch.cat((torch.tensor([0]), *parts)), torch.tensor(list(one.value.encode()))))
    return out


@check(
    "qada",
    "tiny model, needles of 5 digits in 300 bytes, window 64: digits found with over half of all decisions local",
    above=0.75,
    control="mean keys alone, no less local",
)
def _() -> tuple[float, float]:
    model, prompts = models.load("tiny"), needles(3, 300)
    _, sparse, found = sparsity_curve(model, prompts, [0.8], sink=4, local=64)[0]
    _, other, lost = sparsity_curve(model, prompts, [0.8], sink=4, local=64, rule="mean")[0]
    return found if sparse > 0.5 else 0.0, lost if other >= sparse else 1.0


@check(
    "qada",
    "moments found on other text (tiny model): of its keys by hand; decisions and outputs with them, by loops",
    below=1e-6,
    control="with running sums",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    model, text = models.load("tiny"), source(1, 400)
    found = calibrate(model, text[:, :400], 4, 64)
    with read(model, "k", layers=[2]) as seen:
        model(text[:, :400])
    k = seen["k", 2][0, 1, 4:336].double()
    gap = max(naive.gap(found[2].mean[1], k.mean(0)), naive.gap(found[2].covariance[1], torch.cov(k.T, correction=0)))
    q, k, v = torch.randn(4, 70, 6, dtype=F64) * 2, torch.randn(2, 90, 6, dtype=F64), torch.randn(2, 90, 6, dtype=F64)
    other = 0.4 * torch.randn(2, 50, 6, dtype=F64) + 0.5
    truth, decided = by_hand(q, k, v, 3, 12, 0.5, 1.0, other)
    moments = Moments.of(other, torch.ones(2, 50).bool())
    out, local = attend_adaptively(q[None], k[None], v[None], QAdA(3, 12, 0.5, moments=[moments]))
    mixed = 0.1 < float(decided.mean()) < 0.9
    running, _ = attend_adaptively(q[None], k[None], v[None], QAdA(3, 12, 0.5))
    return max(gap, naive.gap(out[0], truth), naive.gap(local[0].float(), decided)) if mixed else 1.0, naive.gap(running[0], truth)
