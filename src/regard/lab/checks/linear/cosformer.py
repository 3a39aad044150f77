"""Checks of cosformer."""

from __future__ import annotations

import torch

from regard.algebra import Causal
from regard.catalog import get
from regard.engine import step, weights
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.feature_maps import cosine_matrix, normalised
from regard.lab.checks.shared.grids import elu
from regard.lab.checks.shared.recurrent import qkv
from regard.lab.verification import check
from regard.nn.attention import Attention


@check(
    "cosformer",
    "linear path == explicit relu x cosine matrix: bidirectional, causal, cross 20 x 33",
    below=1e-10,
    control="cos(i - j), no pi/2m",
)
def _() -> tuple[float, float]:
    own = other = 0.0
    for n, m, mask in ((40, 40, None), (40, 40, Causal()), (20, 33, None)):
        q, k, v = qkv(n, m=m)
        horizon = float(max(n, m))
        a, wrong = cosine_matrix(q, k, horizon), cosine_matrix(q, k, 1.0, 1.0)
        if mask:
            a, wrong = a.tril(), wrong.tril()
        out = attend(q, k, v, "cosformer", mask=mask)
        own, other = max(own, naive.gap(out, normalised(a, v))), max(other, naive.gap(out, normalised(wrong, v)))
    return own, other


@check("cosformer", "weights are never negative when m = max(Lq, Lk), Lq = 20, Lk = 33", above=-1e-15, control="m = 5")
def _() -> tuple[float, float]:
    q, k, _ = qkv(20, m=33)
    found = [weights(q, k, get("cosformer", horizon=m)) for m in (None, 5.0)]
    assert found[0] is not None and found[1] is not None
    return float(found[0].min()), float(found[1].min())


@check("cosformer", "elu + 1, other eps and horizon == the explicit matrix; a layer's m is its context length", below=1e-10, control="relu")
def _() -> tuple[float, float]:
    q, k, v = qkv(20)
    i = torch.arange(20, dtype=q.dtype)
    w = elu(q) @ elu(k).mT * torch.cos(torch.pi / 2 * (i[:, None] - i) / 25)
    out = attend(q, k, v, get("cosformer", feature="elu+1", horizon=25.0))
    small = attend(1e-3 * q, k, v, get("cosformer", eps=0.1))
    few = cosine_matrix(1e-3 * q, k, 20.0)
    gaps = [naive.gap(out, normalised(w, v)), naive.gap(small, few @ v / few.sum(-1, keepdim=True).clamp_min(0.1))]
    gaps.append(abs(float(Attention(16, 2, "cosformer", context_len=77).inputs.fixed_horizon) - 77))  # type: ignore[arg-type]
    return max(gaps), naive.gap(attend(q, k, v, get("cosformer", horizon=25.0)), normalised(w, v))


@check("cosformer", "the recurrence with fixed m gives the parallel output token by token", below=1e-10, control="m re-set at every step")
def _() -> tuple[float, float]:
    q, k, v = qkv()
    whole = attend(q, k, v, "cosformer", mask=Causal())
    outs, drifting = [], []
    state = drift = None
    for t in range(40):
        piece = [x[:, :, t : t + 1] for x in (q, k, v)]
        out, state = step(*piece, "cosformer", state, horizon=40.0)
        outs.append(out)
        out, drift = step(*piece, "cosformer", drift, horizon=float(t + 1))
        drifting.append(out)
    return naive.gap(torch.cat(outs, 2), whole), naive.gap(torch.cat(drifting, 2), whole)


@check("cosformer", "m = 1e9 is plain ReLU linear attention", below=1e-6, control="m = 40")
def _() -> tuple[float, float]:
    q, k, v = qkv()
    plain = normalised(q.relu() @ k.relu().transpose(-1, -2), v)
    return naive.gap(attend(q, k, v, get("cosformer", horizon=1e9)), plain), naive.gap(attend(q, k, v, "cosformer"), plain)
