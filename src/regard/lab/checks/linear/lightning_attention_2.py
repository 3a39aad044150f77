"""Checks of lightning-attention-2."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.algebra import Recurrent
from regard.catalog import get
from regard.engine import step
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.layers import drawn, joined, misshapen, rms, silu, split
from regard.lab.checks.shared.recurrent import gradient_gap, qkv
from regard.lab.verification import check
from regard.nn.attention import Attention
from regard.zoo.linear.lightning_attention_2 import lightning_in_parts


@check(
    "lightning-attention-2",
    "chunks == masked product for N in {1, 63, 64, 65, 200}, s in {0, 0.05, 1}",
    below=1e-10,
    control="decay left out",
)
def _() -> tuple[float, float]:
    own = other = 0.0
    for n in (1, 63, 64, 65, 200):
        for s in (0.0, 0.05, 1.0):
            q, k, v = qkv(n)
            i = torch.arange(n, dtype=F64)
            past = torch.exp(-s * (i[:, None] - i).clamp_min(0)).tril()
            truth = ((q @ k.transpose(-1, -2)) * past) @ v
            out = attend(q, k, v, "lightning-attention-2", log_decay=torch.full((2,), -s, dtype=F64))
            own = max(own, naive.gap(out, truth))
            other = max(other, naive.gap(((q @ k.transpose(-1, -2)).tril()) @ v, truth) if s else 0.0)
    return own, other


@check("lightning-attention-2", "parts side by side, states joined by a scan, equal one pass", below=1e-10, control="parts left apart")
def _() -> tuple[float, float]:
    q, k, v = qkv(101)
    rate = -torch.tensor([0.05, 0.3], dtype=F64)
    truth = attend(q, k, v, "lightning-attention-2", log_decay=rate)
    own = max(naive.gap(lightning_in_parts(q, k, v, rate, parts), truth) for parts in (1, 2, 5, 8, 101))
    cuts = [[x[:, :, at : at + 20] for x in (q, k, v)] for at in range(0, 101, 20)]
    apart = [attend(a, b, c, "lightning-attention-2", log_decay=rate) for a, b, c in cuts]
    return own, naive.gap(torch.cat(apart, 2), truth)


@check("lightning-attention-2", "random segments with carried state equal one pass", below=1e-10, control="state dropped between segments")
def _() -> tuple[float, float]:
    q, k, v = qkv(200)
    slopes = {"log_decay": torch.tensor([-0.05, -0.2], dtype=F64)}
    whole = attend(q, k, v, "lightning-attention-2", **slopes)
    kept, dropped, state = [], [], None
    for start, stop in ((0, 13), (13, 14), (14, 90), (90, 200)):
        piece = [x[:, :, start:stop] for x in (q, k, v)]
        out, state = step(*piece, "lightning-attention-2", state, **slopes)
        kept.append(out)
        dropped.append(attend(*piece, "lightning-attention-2", **slopes))
    return naive.gap(torch.cat(kept, 2), whole), naive.gap(torch.cat(dropped, 2), whole)


@check("lightning-attention-2", "gradients equal those of the token loop", below=1e-9, control="decay off by one token")
def _() -> tuple[float, float]:
    q, k, v = qkv(65)
    inputs = {"log_decay": torch.tensor([-0.05, -0.7], dtype=F64)}
    mechanism = get("lightning-attention-2")
    assert isinstance(mechanism, Recurrent)

    def loop(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        return naive.recurrence(q, k, v, g[None, :, None, None].expand(1, 2, 65, 1))[0]

    def late(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        return naive.recurrence(q, k * torch.exp(g)[None, :, None, None], v, g[None, :, None, None].expand(1, 2, 65, 1))[0]

    return gradient_gap(mechanism, q, k, v, inputs, loop), gradient_gap(mechanism, q, k, v, inputs, late)


@check(
    "lightning-attention-2",
    "the layer == its formula by hand: silu of q and k, slopes 2^(-8 h / H) (1 - layer / layers) fixed, a norm a head, a silu gate",
    below=1e-9,
    control="slopes of layer 0",
)
def _() -> tuple[float, float]:
    layer = Attention(24, 3, get("lightning-attention-2", layer_share=0.25))
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (24, 24) for name in ("q", "k", "v", "out", "gate")}
    bad = misshapen(layer, shapes | {"out_norm.weight": (8,)})
    layer, x, i = drawn(layer), torch.randn(2, 9, 24, dtype=F64), torch.arange(9, dtype=F64)
    q, k, v = silu(split(layer.q(x), 3)), silu(split(layer.k(x), 3)), split(layer.v(x), 3)
    slopes = torch.tensor([2.0**-4, 2.0**-8, 2.0**-2], dtype=F64)  # three heads: those of two, and the first of four
    assert layer.gate is not None
    gate = silu(layer.gate(x))

    def truth(share: float) -> Tensor:
        past = torch.exp(-slopes[:, None, None] * (1 - share) * (i[:, None] - i).clamp_min(0)).tril()
        return layer.out(joined(rms((q @ k.mT * past) @ v, 1e-6, layer.out_norm.weight)) * gate)  # type: ignore[arg-type, no-any-return]

    past = torch.exp(-slopes[:, None, None] * 0.75 * (i[:, None] - i).clamp_min(0)).tril()
    bare = naive.gap(attend(q, k, v, get("lightning-attention-2", layer_share=0.25)), (q @ k.mT * past) @ v)
    return max(bad, bare, naive.gap(layer(x), truth(0.25))), naive.gap(layer(x), truth(0.0))
