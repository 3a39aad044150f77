"""Checks of nalaformer."""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch
from torch import Tensor

from regard.catalog import get
from regard.engine import weights
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import gap_with_gradients
from regard.lab.checks.shared.weighted import qkv
from regard.lab.verification import check


def norm_aware_weights(q: Tensor, k: Tensor, power: float | None = None, source: str = "q") -> Tensor:
    """NaLaFormer's row-normalised weights, feature by feature."""
    norm = q.square().sum(-1, keepdim=True).sqrt()
    p = 3 * (0.5 + torch.tanh(norm)) if power is None else torch.full_like(norm, power)
    fq = torch.cat(((q / norm).clamp_min(0).pow(p), (-q / norm).clamp_min(0).pow(p)), -1)
    fk = torch.cat(((k**3).clamp_min(0), (-(k**3)).clamp_min(0)), -1)
    w = fq @ fk.mT
    return w / w.sum(-1, keepdim=True)


@check("nalaformer", "linear path with gradients == its matrix written out", below=1e-8, control="power 3 for every query")
def _() -> tuple[float, float]:
    leaves = q, k, v = tuple(x.requires_grad_() for x in qkv(64, 16))
    out = attend(q, k, v, get("nalaformer", eps=0.0))
    return gap_with_gradients(out, norm_aware_weights(q, k) @ v, leaves), naive.gap(out, norm_aware_weights(q, k, 3.0) @ v)


@check("nalaformer", "mean entropy of rows falls from |q| x 0.05 to x 1, in nats", above=0.3, control="ReLU linear attention")
def _() -> tuple[float, float]:
    q, k, _ = qkv(64, 16)

    def drop(mechanism: str) -> float:
        h = [float(-torch.special.xlogy(w, w).sum(-1).mean()) for w in (weights(c * q, k, mechanism) for c in (0.05, 0.2, 0.5, 1.0))]  # type: ignore[arg-type]
        falling = all(a > b for a, b in itertools.pairwise(h))
        return h[0] - h[-1] if falling else 0.0

    return drop("nalaformer"), drop("slab")


@check("nalaformer", "keys of opposite signs in every channel: unnormalised scores", below=0, control="keys of the same signs")
def _() -> tuple[float, float]:
    q, k, _ = qkv(20, 16)
    mechanism = replace(get("nalaformer"), readout="none")  # type: ignore[type-var]
    found = [float(weights(q, sign * q.sign() * k.abs(), mechanism).diagonal(dim1=-2, dim2=-1).abs().max()) for sign in (-1, 1)]  # type: ignore[union-attr]
    return found[0], found[1]
