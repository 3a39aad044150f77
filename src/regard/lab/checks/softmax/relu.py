"""Checks of relu."""

from __future__ import annotations

import math

import torch

from regard.algebra import Causal, Weighted
from regard.catalog import get
from regard.engine import merge
from regard.engine.door import attend, attend_with_stats
from regard.lab import naive
from regard.lab.checks.shared.weighted import qkv
from regard.lab.verification import check


@check("relu", "equals L^-alpha relu(q.k/sqrt(d)) v, and its causal form with L = i, for every phi", below=1e-12, control="alpha = 0")
def _() -> tuple[float, float]:
    q, k, v = qkv(26)
    phis = {
        "relu": torch.relu,
        "relu2": lambda s: torch.relu(s) ** 2,
        "softplus": lambda s: torch.log1p(torch.exp(s)),
        "identity": lambda s: s,
    }
    own, other = 0.0, 0.0
    for name, phi in phis.items():
        truth = naive.attention(q, k, v, lambda s, phi=phi: phi(s) / len(s), naive.causal)  # type: ignore[misc]
        own = max(own, naive.gap(attend(q, k, v, get("relu", phi=name), mask=Causal()), truth))
        other = max(other, naive.gap(attend(q, k, v, get("relu", phi=name, alpha=0.0), mask=Causal()), truth))
    return own, other


@check("relu", "three key shards merge to the full output", below=1e-12, control="shards averaged by softmax's rule")
def _() -> tuple[float, float]:
    q, k, v = qkv(33)
    mechanism = get("relu")
    assert isinstance(mechanism, Weighted)
    cuts = [(0, 9), (9, 20), (20, 33)]
    parts = [attend_with_stats(q, k[:, :, a:c], v[:, :, a:c], mechanism) for a, c in cuts]
    truth = attend(q, k, v, mechanism)
    return naive.gap(merge(mechanism, parts)[0], truth), naive.gap(torch.stack([out for out, _ in parts]).sum(0), truth)


@check("relu", "mean row sum at unit-variance logits is 1/sqrt(2 pi) within 3% for L = 64..4096", below=0.03, control="alpha = 0")
def _() -> tuple[float, float]:
    def off(alpha: float) -> float:
        worst = 0.0
        for n in (64, 256, 1024, 4096):
            q, k = torch.randn(1, 8, 256, 64), torch.randn(1, 8, n, 64)
            mean = float(attend(q, k, torch.ones(1, 8, n, 1), get("relu", alpha=alpha)).mean())
            worst = max(worst, abs(mean * math.sqrt(2 * math.pi) - 1))
        return worst

    return off(1.0), off(0.0)
