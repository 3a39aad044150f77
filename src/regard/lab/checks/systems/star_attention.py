"""Checks of star-attention."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from regard.algebra import Causal
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.verification import check
from regard.nn.attention import Attention
from regard.nn.decoder import Block, Decoder
from regard.zoo.systems.star_attention import StarState, star_decode, star_mask, star_prefill


def small() -> Decoder:
    return Decoder(vocab=40, dim=32, layers=3, heads=4, kv_heads=2).to(F64).eval()


def kept(state: StarState) -> Tensor:
    """All keys and values in the order of the context, side by side."""
    layers = range(len(state.model.blocks))
    return torch.stack([torch.cat([torch.cat(state.shards[h][n], -1) for h in sorted(state.shards)], 2) for n in layers])


@check("star-attention", "one block: logits of the query equal full attention", below=1e-10, control="two blocks without an anchor")
@torch.no_grad()
def _() -> tuple[float, float]:
    model, ids = small(), torch.randint(40, (2, 70))
    truth = model(ids)[:, 60:]
    own = [star_decode(star_prefill(model, ids[:, :60], block, anchor), ids[:, 60:]) for block, anchor in ((60, None), (30, 0))]
    return naive.gap(own[0], truth), naive.gap(own[1], truth)


@check(
    "star-attention",
    "keys and values of the first phase, ragged last block, anchors of 8 and 16: equal one dense forward under the star mask by loops",
    below=1e-9,
    control="no anchor",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    model, ids, gaps = small(), torch.randint(40, (2, 53)), []
    for anchor in (8, 16):
        seen = torch.zeros(53, 53, dtype=torch.bool)
        for i in range(53):
            for j in range(i + 1):
                seen[i, j] = i // 16 == j // 16 or j < anchor
        x, pairs = model.embed(ids), []
        for block in cast(list[Block], list(model.blocks)):
            layer, y = cast(Attention, block.mixer), block.norm1(x)
            q, k, v, _ = layer.heads_of(y, y, 0, None)
            pairs.append(torch.cat((k, v), -1))
            k, v = (z.repeat_interleave(2, 1) for z in (k, v))
            p = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~seen, -torch.inf).softmax(-1)
            x = x + block.scale1(layer.close(p @ v, y))
            x = x + block.scale2(block.mlp(block.norm2(x)))
        truth = torch.stack(pairs)
        gaps.append([naive.gap(kept(star_prefill(model, ids, 16, a, hosts=2)), truth) for a in (anchor, 0)])
    return max(gaps[0][0], gaps[1][0]), min(gaps[0][1], gaps[1][1])


@check(
    "star-attention",
    "2, 4 and 7 hosts (two without keys of the context): the query's prefill and 20 steps equal one host",
    below=1e-10,
    control="one host's part left out",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    model, ids = small(), torch.randint(40, (1, 109))

    def answers(hosts: int, drop: bool = False) -> Tensor:
        state = star_prefill(model, ids[:, :80], 16, hosts=hosts)
        if drop:
            state.shards[1] = [(k[:, :, :0], v[:, :, :0]) for k, v in state.shards[1]]
        outs = [star_decode(state, ids[:, 80:89])]
        return torch.cat(outs + [star_decode(state, ids[:, t : t + 1]) for t in range(89, 109)], 1)

    truth = answers(1)
    return max(naive.gap(answers(n), truth) for n in (2, 4, 7)), naive.gap(answers(4, True), truth)


@check(
    "star-attention",
    "numbers a host sends for 9 query tokens: largest difference from layers Lq H (d + 1), contexts of 64 and 256",
    below=0,
    control="gathering the keys and values",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    model, wrong, gathered = small(), [], []
    for length in (64, 256):
        state = star_prefill(model, torch.randint(40, (1, length)), 32, hosts=2)
        gathered.append(sum(k.numel() + v.numel() for k, v in state.shards[0]))
        star_decode(state, torch.randint(40, (1, 9)))
        wrong.append(abs(state.sent - 3 * 9 * 4 * (8 + 1)))
    return float(max(wrong)), float(max(abs(n - 3 * 9 * 4 * 9) for n in gathered))


@check(
    "star-attention",
    "planted sink at token 0: error of blocks with an anchor of 16 tokens over that without",
    below=0.5,
    control="an anchor from which the sink is missing",
)
def _() -> tuple[float, float]:
    q, k, v = (torch.randn(1, 4, 256, 16, dtype=F64) for _ in range(3))
    sink = torch.randn(1, 4, 1, 16, dtype=F64)
    q = q + sink
    k[:, :, :1], v[:, :, :1] = 2 * sink, 0.0
    truth = attend(q, k, v, mask=Causal())[:, :, 64:]

    def error(k: Tensor, anchor: int) -> float:
        return float((attend(q, k, v, mask=star_mask(64, anchor))[:, :, 64:] - truth).norm())

    without = k.clone()
    without[:, :, :1] = torch.randn(1, 4, 1, 16, dtype=F64)
    return error(k, 16) / error(k, 0), error(without, 16) / error(k, 0)
