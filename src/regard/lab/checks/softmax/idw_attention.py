"""Checks of idw-attention."""

from __future__ import annotations

from regard.catalog import get
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.weighted import qkv
from regard.lab.verification import check


@check("idw-attention", "softmax(-log d) == (1/d) / sum 1/d, d = eps + |q - k|^2", below=1e-12, control="negative distance")
def _() -> tuple[float, float]:
    q, k, v = qkv(21)
    k[:, :, 3] = q[:, :, 4]  # a key on top of a query
    truth = naive.attention(q, k, v, lambda d: (1 / d) / (1 / d).sum(), score=lambda a, c: 1e-3 + ((a - c) ** 2).sum())
    return naive.gap(attend(q, k, v, "idw-attention"), truth), naive.gap(attend(q, k, v, get("idw-attention", link="negative")), truth)


@check("idw-attention", "as eps -> 0 a query on a key reads that key's value", below=1e-6, control="dot-product attention")
def _() -> tuple[float, float]:
    _, k, v = qkv(21)
    return naive.gap(attend(k, k, v, get("idw-attention", eps=1e-9)), v), naive.gap(attend(k, k, v, "softmax"), v)
