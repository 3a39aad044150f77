"""Checks of rala."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.catalog import get
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64, gap_with_gradients
from regard.lab.checks.shared.grids import elu
from regard.lab.checks.shared.weighted import qkv
from regard.lab.verification import check


@check("rala", "linear path with gradients == phi(q).alpha phi(k) over its row sums", below=1e-10, control="every token equally relevant")
def _() -> tuple[float, float]:
    leaves = q, k, v = tuple(x.requires_grad_() for x in qkv(50, 16))
    fq, fk = elu(q), elu(k)
    alpha = torch.softmax(16**-0.5 * (fk * fq.mean(-2, keepdim=True)).sum(-1), -1)[..., None]

    def truth(alpha: Tensor) -> Tensor:
        w = fq @ (alpha * fk).mT
        return w / 50 / (w.mean(-1, keepdim=True) + 1e-6) @ v

    out = attend(q, k, v, "rala")
    return gap_with_gradients(out, truth(50 * alpha), leaves), naive.gap(out, truth(torch.ones_like(alpha)))


@check("rala", "q of no relevance (phi(q) = 0 on average): plain elu + 1 attention", below=1e-5, control="the same with relevance")
def _() -> tuple[float, float]:
    q, k, v = qkv(50, 16)
    fk = elu(k)

    def miss(q: Tensor) -> float:
        w = elu(q) @ fk.mT
        return naive.gap(attend(q, k, v, get("rala", eps=0.0)), w / w.sum(-1, keepdim=True) @ v)

    return miss(q - 15), miss(q)


@check("rala", "v of rank 4: rank of outputs after the gate", above=16, control="before it")
def _() -> tuple[float, float]:
    q, k, _ = qkv(196, 16)
    v = torch.randn(1, 2, 196, 4, dtype=F64) @ torch.randn(1, 2, 4, 16, dtype=F64)
    o = attend(q, k, v, "rala")[0, 0]
    gate = torch.randn(196, 16, dtype=F64) @ torch.randn(16, 16, dtype=F64)
    return int(torch.linalg.matrix_rank(o * gate)), int(torch.linalg.matrix_rank(o))
