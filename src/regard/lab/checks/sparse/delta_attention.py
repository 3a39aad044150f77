"""Checks of delta-attention."""

from __future__ import annotations

from itertools import pairwise

import torch

from regard.algebra import Causal
from regard.catalog import get
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.permuted import SPARSE
from regard.lab.checks.shared.selected import qkv
from regard.lab.planted import local_and_columns
from regard.lab.verification import check


@check("delta-attention", "stride 1 is dense causal attention", below=1e-12, control="stride 64")
def _() -> tuple[float, float]:
    q, k, v = qkv(400)
    truth = attend(q, k, v, mask=Causal())
    outs = [attend(q, k, v, get("delta-attention", sparse=SPARSE, stride=stride)) for stride in (1, 64)]
    return naive.gap(outs[0], truth), naive.gap(outs[1], truth)


@check(
    "delta-attention",
    "three sparse mechanisms, L = 1000, stride 64: equals the index formula, row by row",
    below=1e-12,
    control="rows recomputed, not held",
)
def _() -> tuple[float, float]:
    q, k, v = qkv(1000)
    dense = attend(q, k, v, mask=Causal())
    own = other = 0.0
    for sparse in (SPARSE, get("hip", mask_k=128, sinks=4, window=32), get("moba", block_size=64, top_k=2)):
        s = attend(q, k, v, sparse, mask=Causal())
        head = 1000 - (1000 % 64 + 128)
        truth = torch.stack(
            [dense[:, :, i] if i >= head else s[:, :, i] + dense[:, :, i // 64 * 64] - s[:, :, i // 64 * 64] for i in range(1000)], 2
        )
        outs = [attend(q, k, v, get("delta-attention", sparse=sparse, stride=64, mode=mode)) for mode in ("delta", "recompute")]
        own, other = max(own, naive.gap(outs[0], truth)), max(other, naive.gap(outs[1], truth))
    return own, other


def cosine_to_dense(mode: str, stride: int) -> float:
    """Mean cosine to the dense output over the corrected rows of planted local heads, three of them."""
    found = []
    for seed in range(3):
        q, k, v = local_and_columns(1024, 24, seed)
        truth = attend(q, k, v, mask=Causal())
        out = attend(q, k, v, get("delta-attention", sparse=SPARSE, stride=stride, mode=mode))
        found.append(float(torch.cosine_similarity(out, truth, -1)[:, :, :880].mean()))
    return sum(found) / 3


@check(
    "delta-attention",
    "planted local heads, stride 16: cosine to the dense rows, above the sparse ones' by",
    above=0.05,
    control="rows recomputed, not held",
)
def _() -> tuple[float, float]:
    base = cosine_to_dense("sparse-only", 16)
    return cosine_to_dense("delta", 16) - base, cosine_to_dense("recompute", 16) - base


@check("delta-attention", "the cosine grows as the stride falls 64, 16, 4, 1: falls", below=0, control="strides rising")
def _() -> tuple[float, float]:
    found = [cosine_to_dense("delta", stride) for stride in (64, 16, 4, 1)]
    return tuple(float(sum(b < a for a, b in pairwise(order))) for order in (found, found[::-1]))  # type: ignore[return-value]
