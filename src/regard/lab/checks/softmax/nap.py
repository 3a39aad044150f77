"""Checks of nap."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.algebra import Padding
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.rows import nap_row
from regard.lab.checks.shared.weighted import identity_values, qkv, weights_of
from regard.lab.verification import check


@check(
    "nap", "n = 33 with 9 padded keys == a loop over rows, and == the unpadded call", below=1e-12, control="statistics over padded keys too"
)
def _() -> tuple[float, float]:
    q, k, v = qkv(33)
    keep = torch.arange(33)[None] < 24
    given = {"gain": torch.tensor(1.3, dtype=F64), "shift": torch.tensor(0.2, dtype=F64)}
    padded = attend(q, k, v, "nap", mask=Padding(), keep=keep, **given)
    truth = naive.attention(q, k[:, :, :24], v[:, :, :24], nap_row, scale=1.0)
    whole = attend(q, k, v * keep[0, :, None], "nap", **given)
    short = attend(q, k[:, :, :24], v[:, :, :24], "nap", **given)
    return max(naive.gap(padded, truth), naive.gap(padded, short)), naive.gap(whole, truth)


@check("nap", "rows have mean b_h and standard deviation g_h", below=1e-3, control="softmax rows")
def _() -> tuple[float, float]:
    s = 3 * torch.randn(20, 40, dtype=F64)

    def off(name: str, **given: Tensor) -> float:
        w = weights_of(s, name, **given)
        return max(float((w.mean(-1) - 0.2).abs().max()), float((w.std(-1, correction=0) - 1.3).abs().max()))

    return off("nap", gain=torch.tensor(1.3, dtype=F64), shift=torch.tensor(0.2, dtype=F64)), off("softmax")


@check("nap", "values in [0, 1], gain 3: largest excursion of outputs from [0, 1]", above=0.1, control="softmax stays in the hull")
def _() -> tuple[float, float]:
    q, k, _ = qkv(33)
    v = torch.rand(1, 2, 33, 8, dtype=F64)

    def outside(out: Tensor) -> float:
        return float(torch.maximum(-out, out - 1).max())

    return outside(attend(q, k, v, "nap", gain=torch.tensor(3.0, dtype=F64))), outside(attend(q, k, v, "softmax"))


@check(
    "nap",
    "logits * 0.1: spread over queries of LayerNorm(output) stays within 20% from n = 16 to 1024",
    below=1.2,
    control="softmax's output fades like n^-1/2",
)
def _() -> tuple[float, float]:
    def ratio(name: str, norm: bool) -> float:
        spreads = []
        for n in (16, 1024):
            s, v = 0.1 * torch.randn(n, n, dtype=F64), torch.randn(1, 1, n, 64, dtype=F64)
            out = attend(s[None, None], identity_values(n), v, name, scale=1.0)
            out = F.layer_norm(out, (64,)) if norm else out
            spreads.append(float(out.std(-2).mean()))
        return max(spreads) / min(spreads)

    return ratio("nap", True), ratio("softmax", False)
