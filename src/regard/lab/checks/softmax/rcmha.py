"""Checks of rcmha."""

from __future__ import annotations

import torch
from torch import nn

from regard.algebra import Causal
from regard.algebra.pairings import Relative
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.relations import tables
from regard.lab.checks.shared.weighted import qkv
from regard.lab.verification import check
from regard.zoo.softmax.rcmha import RelativeConvMHA


@check(
    "rcmha", "relative scores in tiles, n = 13 and n_k > n_q == gathered by i - j in loops", below=1e-12, control="gathered by i - j + 1"
)
def _() -> tuple[float, float]:
    from regard.algebra import Weighted

    t = tables(40, 2, 8)
    gaps: list[float] = []
    others: list[float] = []
    for n, m in ((13, 13), (9, 31)):
        q, k, v = qkv(n, m=m)
        out = attend(q, k, v, Weighted(score=Relative(40)), mask=Causal(), **t)
        for into, shift in ((gaps, 0), (others, 1)):
            truth = torch.zeros(1, 2, n, 8, dtype=F64)
            for h in range(2):
                for i in range(n):
                    at = i + m - n
                    terms = [
                        (
                            (q[0, h, i] + t["content"][h]) @ k[0, h, j]
                            + q[0, h, i] @ t["table"][at - j + shift + 40, h]
                            + t["apart"][at - j + shift + 40, h]
                        )
                        for j in range(at + 1)
                    ]
                    truth[0, h, i] = naive.softmax(torch.stack(terms) / 8**0.5) @ v[0, h, : at + 1]
            into.append(naive.gap(out, truth))
    return max(gaps), min(others)


@check("rcmha", "delta kernel and zero tables == plain causal attention", below=1e-12, control="random kernels")
def _() -> tuple[float, float]:
    layer = RelativeConvMHA(2, 16, max_rel=32).double()
    x = torch.randn(2, 13, 16, dtype=F64)
    q, k, v = (y.unflatten(-1, (2, 8)).transpose(1, 2) for y in (layer.q(x), layer.k(x), layer.v(x)))
    truth = layer.close(attend(q, k, v, mask=Causal()), x)
    own = naive.gap(layer(x), truth)
    return own, naive.gap(random_conv(layer)(x), truth)


def random_conv(layer: RelativeConvMHA) -> RelativeConvMHA:
    for parameter in [*layer.head_convs.parameters(), *layer.inputs.parameters()]:
        nn.init.normal_(parameter, std=0.5)
    return layer


@check(
    "rcmha", "decoding == the pass, and changing token 9 changes nothing before it", below=1e-10, control="without the convolutions' state"
)
def _() -> tuple[float, float]:
    layer = random_conv(RelativeConvMHA(2, 16, max_rel=32)).double()
    x = torch.randn(1, 13, 16, dtype=F64)
    other = x.clone()
    other[:, 9] += 1
    leak = naive.gap(layer(other)[:, :9], layer(x)[:, :9])

    def gap(keep: bool) -> float:
        state, outs = None, []
        for t in range(13):
            out, state = layer.step(x[:, t : t + 1], state)
            state.conv = state.conv if keep else ()
            outs.append(out)
        return naive.gap(torch.cat(outs, 1), layer(x))

    return max(leak, gap(True)), gap(False)
