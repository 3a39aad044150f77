"""Checks of lssar."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.algebra import Causal
from regard.engine import step
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.weighted import qkv
from regard.lab.verification import check


def lssar_row(n: int, i: int, cosines: Tensor, d: int, p: float) -> Tensor:
    s = torch.log1p(torch.exp(math.log(d) * math.log(n) * cosines))
    a = s / (s.sum() + 1e-8)
    r = (n * a - (0.0 if i < 3 else 1.0)).clamp_min(0) ** p
    return r / (r.sum() + 1e-8)


@check("lssar", "causal == a loop over rows, the first three included", below=1e-10, control="the global length in place of the row's")
def _() -> tuple[float, float]:
    q, k, v = qkv(23)
    unit_q, unit_k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)

    def truth(length: bool) -> Tensor:
        out = torch.zeros_like(v)
        for h in range(2):
            for i in range(23):
                w = lssar_row(23 if length else i + 1, i, unit_k[0, h, : i + 1] @ unit_q[0, h, i], 8, 15.0)
                out[0, h, i] = w @ v[0, h, : i + 1]
        return out

    out = attend(q, k, v, "lssar", mask=Causal())
    return naive.gap(out, truth(False)), naive.gap(out, truth(True))


@check(
    "lssar",
    "weight on a key equal to the query among n - 1 random ones, least over n = 1k, 4k, 16k (D = 64)",
    above=0.99,
    control="softmax",
)
def _() -> tuple[float, float]:
    def needle(name: str) -> float:
        found = []
        for n in (1024, 4096, 16384):
            k = torch.randn(1, 1, n, 64, dtype=F64)
            at_seven = (torch.arange(n) == 7).to(F64)[None, None, :, None]
            found.append(float(attend(k[:, :, 7:8], k, at_seven, name)))
        return min(found)

    return needle("lssar"), needle("softmax")


@check("lssar", "token-by-token decoding == prefill", below=1e-10, control="every row told the final length")
def _() -> tuple[float, float]:
    q, k, v = qkv(23)
    whole, state, outs = attend(q, k, v, "lssar", mask=Causal()), None, []
    for t in range(23):
        out, state = step(*[x[:, :, t : t + 1] for x in (q, k, v)], "lssar", state)
        outs.append(out)
    frozen = attend(q, k, v, "lssar", mask=lambda b, h, i, j: j <= 22)
    return naive.gap(torch.cat(outs, 2), whole), naive.gap(frozen, whole)
