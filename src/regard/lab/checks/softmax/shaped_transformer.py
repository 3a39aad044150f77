"""Checks of shaped-transformer."""

from __future__ import annotations

import math

import torch

from regard.algebra import Causal
from regard.catalog import get
from regard.engine import weights
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.weighted import qkv
from regard.lab.verification import check
from regard.zoo.softmax import shaped_transformer as shaped


@check(
    "shaped-transformer", "weights == I + softmax(Y / (tau0 sqrt(n))) - 1 / m, full and causal", below=1e-12, control="without the centring"
)
def _() -> tuple[float, float]:
    q, k, _ = qkv(13)
    mechanism = get("shaped-transformer", width=64, tau0=1.5)
    own, other = 0.0, 0.0
    for causal in (False, True):
        seen = torch.ones(13, 13, dtype=torch.bool).tril() if causal else torch.ones(13, 13, dtype=torch.bool)
        w = weights(q, k, mechanism, mask=Causal() if causal else None)
        s = (q @ k.transpose(-1, -2) / (math.sqrt(8) * 1.5 * 8)).masked_fill(~seen, -torch.inf).softmax(-1)
        even = seen.double() / seen.sum(-1, keepdim=True)
        assert w is not None
        own, other = max(own, naive.gap(w, torch.eye(13) + s - even)), max(other, naive.gap(w, torch.eye(13) + s))
    return own, other


@check(
    "shaped-transformer",
    "n = 128, 4000 antithetic draws of a layer: relative error of n (E[V'] - V) against the drift b(V)",
    below=0.15,
    control="the drift of softmax layers",
)
def _() -> tuple[float, float]:
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(5), dtype=F64)
    x[1] = 0.6 * x[0] + 0.8 * x[1]
    b = shaped.drift(shaped.covariance(x))
    off = [float((shaped.measured_drift(x, shaped.Layer(kind=kind), 4000) - b).norm() / b.norm()) for kind in ("shaped", "softmax")]
    return off[0], off[1]


@check(
    "shaped-transformer", "64 layers, width 128, 8 tokens: mean |cos| between tokens", below=0.75, control="softmax with the same residual"
)
def _() -> tuple[float, float]:
    return shaped.token_cosine("shaped"), shaped.token_cosine("softmax")
