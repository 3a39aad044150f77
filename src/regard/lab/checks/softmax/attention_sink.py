"""Checks of attention-sink."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.algebra import Causal
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.learned import learned
from regard.lab.verification import check
from regard.zoo.softmax.attention_sink import KeyValueBias, sink_metric, studied, trained


@check("attention-sink", "the metric equals its definition in loops on random causal maps", below=1e-12, control="means over all queries")
def _() -> tuple[float, float]:
    maps = torch.randn(4, 3, 2, 16, 16, dtype=F64).mul(3).masked_fill(~torch.ones(16, 16).tril().bool(), -torch.inf).softmax(-1)

    def loops(seen_only: bool) -> Tensor:
        found = torch.zeros(16, dtype=F64)
        for k in range(16):
            for one in maps.flatten(0, 2):
                found[k] += float(sum(one[i, k] for i in range(k, 16)) / (16 - k if seen_only else 16)) > 0.3
        return 100 * found / 24

    return naive.gap(sink_metric(maps), loops(True)), naive.gap(sink_metric(maps), loops(False))


@check("attention-sink", "KV-bias with v* = 0 == softmax with the extra logit q.k*, causal", below=1e-12, control="v* = 1")
def _() -> tuple[float, float]:
    x = torch.randn(2, 13, 16, dtype=F64)
    layer = KeyValueBias(16, 2, value=False).double()
    torch.nn.init.normal_(layer.key_bias)
    q, k, v, _ = layer.heads_of(x, x, 1, None)  # position 1: without the pair
    extra = (q * layer.key_bias[:, None]).sum(-1) * 8**-0.5
    truth = layer.close(attend(q, k, v, studied("k-bias"), mask=Causal(), sink=extra), x)
    own = naive.gap(layer(x), truth)
    layer.value_bias.data.fill_(1.0)
    return own, naive.gap(layer(x), truth)


@check(
    "attention-sink",
    "tiny task, two seeds, copies right in >= 95%: share of samples in which softmax's busiest sink keeps over 0.3 on the first token",
    above=0.9,
    control="sigmoid",
)
def _() -> tuple[float, float]:
    def rate(name: str, seeds: tuple[int, ...]) -> float:
        return sum(max(run.head_rates) for run in learned([trained(name, seed) for seed in seeds])) / len(seeds)

    return rate("softmax", (0, 2)), rate("sigmoid", (0,))
