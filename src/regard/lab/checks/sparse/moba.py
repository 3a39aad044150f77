"""Checks of moba."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from regard.algebra import Causal
from regard.catalog import get
from regard.engine import step
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.selected import qkv, selection_of
from regard.lab.verification import check


def moba_mask(q: Tensor, k: Tensor, size: int, top: int) -> Tensor:
    """Which pairs MoBA keeps, written as loops over heads and queries."""
    _, heads, n, _ = q.shape
    group = heads // k.shape[1]
    mask = torch.zeros(heads, n, n, dtype=torch.bool)
    for h in range(heads):
        for t in range(n):
            own = t // size
            gates = [(float(q[0, h, t] @ k[0, h // group, b * size : (b + 1) * size].mean(0)), b) for b in range(own)]
            chosen = [b for _, b in sorted(gates, reverse=True)[: top - 1]] + [own]
            for b in chosen:
                mask[h, t, b * size : (b + 1) * size] = True
            mask[h, t, t + 1 :] = False
    return mask


@check(
    "moba",
    "equals attention under the mask of a loop, L = 203 (ragged), c = 16, k = 3, grouped heads, with dq, dk, dv",
    below=1e-9,
    control="dense causal attention",
)
def _() -> tuple[float, float]:
    q, k, v = (x.requires_grad_() for x in qkv(203, heads=4, kv=2))
    out = attend(q, k, v, get("moba", block_size=16, top_k=3))
    mask = moba_mask(q.detach(), k.detach(), 16, 3)
    s = (q @ k.repeat_interleave(2, 1).transpose(-1, -2) / math.sqrt(8)).masked_fill(~mask, -math.inf)
    truth = s.softmax(-1) @ v.repeat_interleave(2, 1)
    seed = torch.randn_like(truth)
    pairs = zip(
        (out, *torch.autograd.grad((out * seed).sum(), (q, k, v))),
        (truth, *torch.autograd.grad((truth * seed).sum(), (q, k, v))),
        strict=True,
    )
    return max(naive.gap(a, b) for a, b in pairs), naive.gap(attend(q, k, v, "softmax", mask=Causal()), truth)


@check("moba", "k >= number of blocks is dense causal attention", below=1e-10, control="k = 2")
def _() -> tuple[float, float]:
    q, k, v = qkv(203)
    truth = attend(q, k, v, "softmax", mask=Causal())
    return naive.gap(attend(q, k, v, get("moba", block_size=16, top_k=13)), truth), naive.gap(
        attend(q, k, v, get("moba", block_size=16, top_k=2)), truth
    )


@check(
    "moba",
    "changing tokens after t leaves outputs up to t as they were, t inside a block",
    below=1e-12,
    control="a gate that averages the whole block",
)
def _() -> tuple[float, float]:
    q, k, v = qkv(203)
    later = [x.clone() for x in (q, k, v)]
    for x in later:
        x[:, :, 101:] = torch.randn_like(x[:, :, 101:])
    mechanism = get("moba", block_size=16, top_k=3)
    own = naive.gap(attend(*later, mechanism)[:, :, :101], attend(q, k, v, mechanism)[:, :, :101])

    def leaky(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        means = torch.nn.functional.pad(k, (0, 0, 0, 5)).unflatten(2, (13, 16)).mean(3)
        gate = (q @ means.transpose(-1, -2)).masked_fill(torch.arange(13) > torch.arange(203)[:, None] // 16, -math.inf)
        keep = torch.zeros_like(gate, dtype=torch.bool).scatter_(-1, gate.topk(3, -1).indices, True).repeat_interleave(16, -1)[..., :203]
        return attend(q, k, v, "softmax", mask=keep & torch.ones(203, 203, dtype=torch.bool).tril())

    return own, naive.gap(leaky(*later)[:, :, :101], leaky(q, k, v)[:, :, :101])


@check("moba", "decoding token by token equals the parallel rows", below=1e-10, control="the last block always complete")
def _() -> tuple[float, float]:
    q, k, v = qkv(67)
    mechanism = get("moba", block_size=8, top_k=3)
    whole, state, outs = attend(q, k, v, mechanism), None, []
    for t in range(67):
        out, state = step(*[x[:, :, t : t + 1] for x in (q, k, v)], mechanism, state)
        outs.append(out)
    last = attend(q[:, :, -1:], k[:, :, :64], v[:, :, :64], mechanism)
    return naive.gap(torch.cat(outs, 2), whole), naive.gap(last, whole[:, :, -1:])


@check(
    "moba", "every query keeps exactly min(k, available) blocks, its own among them: queries that do not", below=0, control="k - 1 blocks"
)
def _() -> tuple[float, float]:
    q, k, _ = qkv(203)

    def off(top: int) -> float:
        selector = get("moba", block_size=16, top_k=top).select  # type: ignore[attr-defined]
        keep = selection_of(selector, q, k).keep
        own = torch.arange(203) // 16
        count = keep.sum(-1)
        return float((count != (own + 1).clamp(max=3)).sum() + (~keep.gather(-1, own.expand(1, 2, -1)[..., None])).sum())

    return off(3), off(2)
