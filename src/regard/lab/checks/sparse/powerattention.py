"""Checks of powerattention."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.algebra import BlockPowers, Causal, Dilated, Window
from regard.catalog import get
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.selected import qkv, s_attend
from regard.lab.verification import check
from regard.zoo.sparse.powerattention import blocks_read, receptive_field


@check(
    "powerattention",
    "keys the last of 513 tokens reaches after 1 .. 9 layers: difference from [11, 47, 131, 257, 383, 467, 503, 512, 513]",
    below=0,
    control="a window of the same degree",
)
def _() -> tuple[float, float]:
    known = torch.tensor([11, 47, 131, 257, 383, 467, 503, 512, 513])
    own, window = (receptive_field(mask, 513, 9).sum(-1) for mask in (Causal() & BlockPowers(1), Causal() & Window(11)))
    linear = torch.equal(window, 10 * torch.arange(1, 10) + 1)
    return float((own - known).abs().sum()), float((window - known).abs().sum()) * linear


@check(
    "powerattention",
    "odd distances the last of 513 tokens reaches in 9 layers: share",
    above=1.0,
    control="a window of 11 keys dilated by 2",
)
def _() -> tuple[float, float]:
    odd = (512 - torch.arange(513)) % 2 == 1
    return tuple(
        float(receptive_field(mask, 513, 9)[-1][odd].double().mean()) for mask in (Causal() & BlockPowers(1), Causal() & Dilated(11, 2))
    )  # type: ignore[return-value]


@check(
    "powerattention",
    "equals dense attention with the block rule spelled out, and the last row from its blocks alone",
    below=1e-12,
    control="distances 2^m + 1",
)
def _() -> tuple[float, float]:
    q, k, v = qkv(256)

    def pairs(shift: int) -> Tensor:
        u, w = torch.arange(256)[:, None] // 16, torch.arange(256) // 16
        powers = {0, *(2**m + shift for m in range(9))}
        near = torch.tensor([[int(a - b) in powers or 0 <= int(a - b) < 2 or (int(b) < 1) for b in w.flatten()] for a in u.flatten()])
        return near & torch.ones(256, 256, dtype=torch.bool).tril()

    out = attend(q, k, v, get("powerattention", block_size=16, window_blocks=2, sink_blocks=1))
    columns = torch.cat([torch.arange(w * 16, (w + 1) * 16) for w in blocks_read(255, 16, 2, 1)])
    last = attend(q[:, :, -1:], k[:, :, columns], v[:, :, columns])
    own = max(naive.gap(out, s_attend(q, k, v, pairs(0).expand(2, -1, -1))), naive.gap(last, out[:, :, -1:]))
    return own, naive.gap(out, s_attend(q, k, v, pairs(1).expand(2, -1, -1)))
