"""Checks of recycled-attention."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.cache.layer import KeptLayer
from regard.cache.policies import Full, StreamingLLM
from regard.cache.policy import Policy
from regard.cache.view import View
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.decoding import llama
from regard.lab.verification import check
from regard.zoo.systems.recycled_attention import RecycledAttention, recycled_mask


def stream(policy: Policy, q: Tensor, k: Tensor, v: Tensor, prompt: int) -> Tensor:
    """Outputs (H, L - prompt, D) of the steps after a prompt: q (H, L, D), k, v (Hkv, L, D), one layer."""
    policy.begin(1, len(k))
    layer, outs = KeptLayer(), []
    for start, stop in [(0, prompt), *((t, t + 1) for t in range(prompt, q.shape[1]))]:
        layer.update(k[None, :, start:stop], v[None, :, start:stop])
        layer.take(torch.ones(1, stop - start, dtype=torch.bool))
        part = layer.parts[0]
        query = q[None, :, start:stop].unflatten(1, (len(k), -1))
        view = View(0, 1, start == 0, prompt, part, query, q.shape[-1] ** -0.5, None, layer.memory)
        outs.append(policy.compute(view, torch.arange(start, stop)).flatten(1, 2)[0])
        policy.run(layer, 0, view)
    return torch.cat(outs[1:], 1)


def by_hand(q: Tensor, k: Tensor, v: Tensor, prompt: int, stride: int, top: int, join: str, keep: bool = True) -> tuple[Tensor, list[int]]:
    """The same in loops. keep=False: tokens since the last full step are not read."""
    group, outs, reads = len(q) // len(k), [], []
    chosen: list[list[int]] = [[] for _ in k]
    for t in range(prompt - 1, q.shape[1]):
        step = t - prompt
        full = step < 0 or step % stride == 0
        rows = []
        for g in range(len(k)):
            keys = list(range(t + 1)) if full else [*chosen[g], t]
            weights = []
            for h in range(g * group, (g + 1) * group):
                p = naive.softmax(torch.stack([(q[h, t] * k[g, j]).sum() * q.shape[-1] ** -0.5 for j in keys]))
                rows.append(p @ v[g, keys])
                weights.append(p)
            if full:
                score = torch.stack(weights).sum(0) if join == "sum" else torch.stack(weights).amax(0)
                chosen[g] = sorted({*score.sort(descending=True).indices[:top].tolist(), t})
            elif keep:
                chosen[g] = keys
        if step >= 0:
            outs.append(torch.stack(rows))
            reads.append(max(t + 1 if full else len(c) for c in chosen))
    return torch.stack(outs, 1), reads


@check(
    "recycled-attention",
    "steps after a prompt of 40, strides 3 and 5, sums and maxima of heads: gap to loops, and keys read",
    below=1e-10,
    control="tokens since the full step forgotten",
)
def _() -> tuple[float, float]:
    own, other = 0.0, []
    for stride, top, join in ((5, 8, "sum"), (3, 12, "max")):
        q, k, v = 2 * torch.randn(4, 63, 8, dtype=F64), torch.randn(2, 63, 8, dtype=F64), torch.randn(2, 63, 8, dtype=F64)
        policy = RecycledAttention(stride, top, join=join)
        found = stream(policy, q, k, v, 40)
        truth, reads = by_hand(q, k, v, 40, stride, top, join)
        assert policy.reads[0] == reads
        short = [n for t, n in enumerate(reads) if t % stride]
        assert max(short) <= top + stride
        own = max(own, naive.gap(found, truth))
        other.append(naive.gap(found, by_hand(q, k, v, 40, stride, top, join, keep=False)[0]))
    return own, min(other)


@check(
    "recycled-attention",
    "a stride of 1, or all keys chosen: gap of a model's logits to full decoding",
    below=1e-10,
    control="8 keys, stride 5",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    model, ids = llama(sharp=2), torch.randint(1, 50, (2, 30))

    def logits(policy: Policy) -> Tensor:
        with policy(model):
            out = model.generate(ids, max_new_tokens=12, do_sample=False, output_logits=True, return_dict_in_generate=True)
        return torch.stack(out.logits, 1)

    truth = logits(Full())
    own = max(naive.gap(logits(RecycledAttention(*x)), truth) for x in ((1, 4), (7, 100)))
    return own, naive.gap(logits(RecycledAttention(5, 8)), truth)


@check(
    "recycled-attention",
    "query_sim, thresholds of 1, 0.3, 0 and -1, looked at every step and every third: full steps that loops over cosines do not have",
    below=0.0,
    control="a fixed stride",
)
def _() -> tuple[float, float]:
    q, k = torch.randn(4, 60, 8, dtype=F64), torch.randn(2, 60, 8, dtype=F64)
    own = other = 0
    for tau, every in ((1.01, 1), (0.3, 1), (0.0, 1), (0.0, 3), (-1.01, 1)):
        policies = RecycledAttention(5, 6, "query_sim", tau, every), RecycledAttention(5, 6)
        found = []
        for policy in policies:
            stream(policy, q, k, k, 30)
            found.append([n == 31 + t for t, n in enumerate(policy.reads[0])])
        truth, asked = [], q[:, 29]
        for t in range(30):
            near = sum(float((q[h, 30 + t] * asked[h]).sum() / (q[h, 30 + t].norm() * asked[h].norm())) for h in range(4)) / 4
            truth.append(t == 0 or (t % every == 0 and near < tau))
            asked = q[:, 30 + t] if truth[-1] else asked
        assert tau != 1.01 or all(truth)
        own += sum(a != b for a, b in zip(found[0], truth, strict=True))
        other += sum(a != b for a, b in zip(found[1], truth, strict=True))
    return float(own), float(other)


@check(
    "recycled-attention",
    "one key that ten queries in a row ask for, far from the window, L = 512, K = 16, S = 5: mass kept at the steps after the first",
    above=0.95,
    control="first and newest tokens, as many",
)
def _() -> tuple[float, float]:
    direction = torch.zeros(16, dtype=F64)
    direction[0] = 1
    q, k = 0.1 * torch.randn(1, 512, 16, dtype=F64), 0.3 * torch.randn(1, 512, 16, dtype=F64)
    k[0, 100] = 40 * direction
    q[0, 502:] = direction + 0.05 * torch.randn(10, 16, dtype=F64)
    v = torch.zeros(1, 512, 1, dtype=F64)
    v[0, 100] = 1
    truth = (q[0, 503:] @ k[0].T / 4)[:, 100]
    assert float(truth.min()) > 5
    return tuple(float(stream(policy, q, k, v, 502)[0, 1:, 0].min()) for policy in (RecycledAttention(5, 16), StreamingLLM(21)))


@check("recycled-attention", "training mask by loops: pairs that differ", below=0.0, control="rows since the full one not read")
def _() -> tuple[float, float]:
    p = torch.randn(2, 2, 17, 17, dtype=F64).masked_fill(~torch.ones(17, 17, dtype=torch.bool).tril(), -torch.inf).softmax(-1)
    found, truth = recycled_mask(p, 4, 3), torch.zeros(2, 2, 17, 17, dtype=torch.bool)
    late = truth.clone()
    for b in range(2):
        for h in range(2):
            for t in range(17):
                base = t // 4 * 4
                best = [j for j in p[b, h, base].sort(descending=True).indices[:3].tolist() if j <= base]
                truth[b, h, t, list(range(t + 1)) if t == base else best + list(range(base, t + 1))] = True
                late[b, h, t, list(range(t + 1)) if t == base else [*best, t]] = True
    return float((found != truth).sum()), float((found != late).sum())
