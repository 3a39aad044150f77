"""Checks of transnormer."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from regard.algebra import Causal, FeatureMap, Recurrent
from regard.catalog import get
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64, gap_with_gradients, streamed
from regard.lab.checks.shared.weighted import qkv
from regard.lab.verification import check
from regard.zoo.linear.transnormer import diagonal, transnormer_layers


@check(
    "transnormer", "largest gradient of keys x c: growth from c = 1e-8 to 1e-11", below=10, control="linear attention divided by its sum"
)
def _() -> tuple[float, float]:
    q, k, v = (x.abs() for x in qkv(32))
    seed = torch.randn(1, 2, 32, 5, dtype=F64)

    def growth(normed: bool) -> float:
        found = []
        for c in (1e-8, 1e-11):
            leaf = (c * k).requires_grad_()
            base = get("transnormer") if normed else Recurrent(readout="sum", eps=0.0, scaled=False)
            assert isinstance(base, Recurrent)
            out = attend(q, leaf, v[..., :5], replace(base, feature=FeatureMap(torch.relu)))
            found.append(float(torch.autograd.grad((out * seed).sum(), leaf)[0].abs().max()))
        return found[1] / found[0]

    return growth(True), growth(False)


@check(
    "transnormer",
    "both directions and causal, with gradients == x / (rms + eps) of the sums; streams too",
    below=1e-9,
    control="divided by its sum",
)
def _() -> tuple[float, float]:
    leaves = q, k, v = tuple(x.requires_grad_() for x in qkv(50))
    own, other = 0.0, math.inf
    for causal in (False, True):
        w = torch.where(q > 0, q + 1, torch.exp(q)) @ torch.where(k > 0, k + 1, torch.exp(k)).mT
        w = w.tril() if causal else w
        x = w @ v
        truth = x / (x.square().mean(-1, keepdim=True).sqrt() + 1e-6)
        out = attend(q, k, v, "transnormer", mask=Causal() if causal else None)
        own = max(own, gap_with_gradients(out, truth, leaves))
        other = min(other, naive.gap(out, x / w.sum(-1, keepdim=True)))
        if causal:
            own = max(own, naive.gap(streamed("transnormer", q, k, v), truth))
    return own, other


@check("transnormer", "DiagAttention: Jacobian across blocks of 16; the model has it in its first half", below=0, control="NormAttention")
def _() -> tuple[float, float]:
    q, k, v = qkv(48)
    layers = transnormer_layers(4, "T2", 16)
    if layers != [diagonal(16)] * 2 + [get("transnormer")] * 2:
        return math.nan, math.nan
    other = v.clone()
    other[:, :, :16] += 1
    found = [
        naive.gap(attend(q, k, other, m)[:, :, 16:], attend(q, k, v, m)[:, :, 16:])
        for m in (diagonal(16), diagonal(16, "rela"), layers[-1])
    ]
    return max(found[:2]), found[2]


@check("transnormer", "norm='all': over all heads' channels together; another eps", below=1e-10, control="over a head's")
def _() -> tuple[float, float]:
    q, k, v = qkv(20)
    x = torch.where(q > 0, q + 1, torch.exp(q)) @ torch.where(k > 0, k + 1, torch.exp(k)).mT @ v
    out = attend(q, k, v, get("transnormer", norm="all", eps=0.5))
    size = x.square().mean((1, 3), keepdim=True).sqrt()
    return naive.gap(out, x / (size + 0.5)), naive.gap(out, x / (x.square().mean(-1, keepdim=True).sqrt() + 0.5))


@check(
    "transnormer", "DiagAttention == attention inside blocks by hand, softmax's (T2) and ReLA's (T1)", below=1e-10, control="over all keys"
)
def _() -> tuple[float, float]:
    q, k, v = qkv(20)
    at = torch.arange(20) // 8
    own = at[:, None] == at
    s = q @ k.mT / math.sqrt(8)
    layers = [transnormer_layers(5, kind, 8) for kind in ("T1", "T2")]
    same = all(one[2:] == [get("transnormer")] * 3 and one[0] == one[1] for one in layers)
    found = [attend(q, k, v, one[0]) for one in layers]
    truths = [(s.clamp_min(0) * own) @ v, s.masked_fill(~own, -math.inf).softmax(-1) @ v]
    gap = max(naive.gap(x, y) for x, y in zip(found, truths, strict=True))
    return gap if same else math.inf, min(naive.gap(found[0], s.clamp_min(0) @ v), naive.gap(found[1], s.softmax(-1) @ v))
