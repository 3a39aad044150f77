"""Checks of selective-self-attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from regard.algebra import Causal, Dot, Input, Projected, Weighted
from regard.catalog import get
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.weighted import qkv
from regard.lab.verification import check
from regard.nn.attention import Attention
from regard.zoo.softmax.selective_self_attention import tempered_values


@check(
    "selective-self-attention",
    "row i's logits are (1 + sigmoid(a) log i) times the plain ones, and tau_value scales values",
    below=1e-10,
    control="plain softmax",
)
def _() -> tuple[float, float]:
    q, k, v = qkv(23)
    rate, tau = torch.sigmoid(torch.tensor([0.3, -1.0], dtype=F64)), 1 + torch.tanh(torch.randn(1, 2, 23, dtype=F64))
    truth = torch.zeros_like(v)
    for h in range(2):
        for i in range(23):
            s = (1 + rate[h] * math.log(i + 1)) * (k[0, h, : i + 1] @ q[0, h, i]) / math.sqrt(8)
            truth[0, h, i] = naive.softmax(s) @ (tau[0, h, : i + 1, None] * v[0, h, : i + 1])
    out = attend(q, k, v, "selective-self-attention", mask=Causal(), tau_rate=rate, tau_value=tau)
    return naive.gap(out, truth), naive.gap(attend(q, k, v, mask=Causal()), truth)


@check("selective-self-attention", "with w = 0 and a = -40 the layer is plain attention", below=1e-10, control="a = 0")
def _() -> tuple[float, float]:
    x = torch.randn(2, 19, 32, dtype=F64)

    def gap(a: float) -> float:
        layer, plain = Attention(32, 4, get("selective-self-attention", init=a)).double(), Attention(32, 4).double()
        plain.load_state_dict(layer.state_dict(), strict=False)
        return naive.gap(layer(x), plain(x))

    return gap(-40.0), gap(0.0)


def added_one(n: Tensor, tau_query: Tensor) -> Tensor:
    return 1 + tau_query


@check(
    "selective-self-attention",
    "parameters added to a 12-layer, 768-wide, 12-head model, share",
    below=0.005,
    control="a network of width 768 for each temperature",
)
def _() -> tuple[float, float]:
    def share(mechanism: str | Weighted) -> float:
        return 12 * sum(p.numel() for p in Attention(768, 12, mechanism).inputs.parameters()) / 124e6

    wide = Projected(torch.tanh, rank=768)
    own = Input("tau_query", "bhq", layer=wide), Input("tau_value", "bgk", layer=wide)
    return share("selective-self-attention"), share(Weighted(score=Dot(added_one, own[:1]), values=tempered_values, inputs=own[1:]))


@check(
    "selective-self-attention",
    "two queries of one direction, targets softmax(0.2 z) and softmax(8 z): largest KL after training tau alone",
    below=1e-2,
    control="the best single temperature",
)
def _() -> tuple[float, float]:
    z = torch.randn(64, dtype=F64)
    targets = torch.stack([(0.2 * z).softmax(-1), (8 * z).softmax(-1)])
    k, v = torch.eye(64, dtype=F64)[None, None], torch.eye(64, dtype=F64)[None, None]
    q = z.expand(1, 1, 2, 64)

    def kl(tau: Tensor) -> Tensor:
        w = attend(q, k, v, "selective-self-attention", scale=1.0, tau_query=tau - 1)[0, 0]
        return torch.special.xlogy(targets, targets / w.clamp_min(1e-300)).sum(-1)

    tau = torch.ones(1, 1, 2, dtype=F64, requires_grad=True)
    optimizer = torch.optim.Adam([tau], 0.1)
    for _ in range(300):
        optimizer.zero_grad()
        kl(tau).sum().backward()
        optimizer.step()
    shared = min(float(kl(torch.full((1, 1, 2), t, dtype=F64)).max()) for t in torch.linspace(0.1, 10, 100).tolist())
    return float(kl(tau).max().detach()), shared
