"""Checks of minimax-01."""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.algebra import Rope
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.layers import drawn, joined, rms, split
from regard.lab.checks.shared.minimax import small
from regard.lab.checks.shared.weighted import qkv
from regard.lab.verification import check
from regard.zoo.linear.minimax_01 import Experts, MiniMaxConfig, MiniMaxLike, lasp_plus, layer_factor, lightning_packed


@check(
    "minimax-01",
    "3 lightning to 1 softmax with experts, left padding: prefill and decoding with one state a layer == the full pass",
    below=1e-9,
    control="padding read as tokens",
)
def _() -> tuple[float, float]:
    model = small(alpha=(1.2, 1.1, 1.3), beta=(0.7, 0.8, 0.9))
    tokens = torch.randint(30, (2, 21))
    keep = torch.ones(2, 21, dtype=torch.bool)
    keep[0, :6] = False
    whole = model(tokens, keep=keep)
    out, states = model.step(tokens[:, :13], keep=keep[:, :13])
    outs = [out]
    for t in range(13, 21):
        out, states = model.step(tokens[:, t : t + 1], states, keep=keep[:, : t + 1])
        outs.append(out)
    alone = model(tokens[:1, 6:])
    rest = keep[..., None]
    gaps = [naive.gap(torch.cat(outs, 1) * rest, whole * rest), naive.gap(whole[:1, 6:], alone)]
    return max(gaps), naive.gap(model(tokens)[:1, 6:], alone)


@check(
    "minimax-01",
    "the first block by hand: silu of q, k, v, slopes, norm of all heads, sigmoid gate, scaled residuals",
    below=1e-7,
    control="without the gate",
)
def _() -> tuple[float, float]:
    model = small(experts=1, alpha=(1.0, 1.3, 1.1), beta=(1.0, 0.6, 0.9))
    block, x = model.blocks[0], torch.randn(1, 12, 32, dtype=F64)
    mixer = block.mixer
    h = block.norm1(x)  # type: ignore[operator]
    q, k, v = (F.silu(layer(h)).unflatten(-1, (4, 8)).transpose(1, 2) for layer in (mixer.q, mixer.k, mixer.v))  # type: ignore[operator, union-attr]
    i = torch.arange(12, dtype=F64)
    rate = torch.tensor([2 ** (-8 * (n + 1) / 4) * (1 - 0 + 1e-5) for n in range(4)], dtype=F64)
    past = torch.exp(-rate[:, None, None] * (i[:, None] - i).clamp_min(0)).tril()
    o = ((q @ k.mT * past) @ v).transpose(1, 2).flatten(-2)
    normed = o / (o.square().mean(-1, keepdim=True) + 1e-6).sqrt() * mixer.merge_norm.weight  # type: ignore[union-attr]

    def truth(gate: Tensor | float) -> Tensor:
        y = mixer.out(normed * gate)  # type: ignore[operator, union-attr]
        h2 = block.norm2(1.3 * h + 0.6 * y)  # type: ignore[operator]
        return 1.1 * h2 + 0.9 * block.mlp(h2)  # type: ignore[operator, no-any-return]

    out = block(x, None)
    return naive.gap(out, truth(torch.sigmoid(mixer.gate(h)))), naive.gap(out, truth(1.0))  # type: ignore[operator, union-attr]


@check(
    "minimax-01",
    "LASP+ on 4 virtual ranks of unequal lengths, and packed documents == one device, decays 0.9 and 1",
    below=1e-10,
    control="prefixes without the decay between",
)
def _() -> tuple[float, float]:
    from regard.zoo.linear.lightning_attention_2 import lightning_blocks
    from regard.zoo.linear.minimax_01 import local_state

    own, other = [], 0.0
    for decay in (0.9, 1.0):
        q, k, v = qkv(60)
        slope = torch.full((2,), -math.log(decay), dtype=F64)
        edges = [0, 7, 30, 42, 60]
        shards = [tuple(x[:, :, a:b] for x in (q, k, v)) for a, b in itertools.pairwise(edges)]
        truth = lightning_blocks(q, k, v, slope)[0]
        outs, _moved = lasp_plus(shards, slope)  # type: ignore[arg-type]
        own.append(naive.gap(torch.cat(outs, 2), truth))
        packed = lightning_packed(q, k, v, slope, torch.tensor(edges))
        apart = torch.cat([lightning_blocks(*shard, slope)[0] for shard in shards], 2)  # type: ignore[arg-type]
        own.append(naive.gap(packed, apart))
        bare = torch.stack([local_state(k, v, slope) for _, k, v in shards[:3]]).sum(0)
        at = torch.arange(1, 19, dtype=F64)
        wrong = lightning_blocks(*shards[3], slope)[0] + (shards[3][0] * torch.exp(-slope[:, None] * at)[..., None]) @ bare  # type: ignore[arg-type]
        other = max(other, naive.gap(wrong, truth[:, :, 42:]))
    return max(own), other


@check(
    "minimax-01",
    "bytes of state: what 100 more tokens add, less the keys and values of one layer: one layer in four is softmax",
    below=0,
    control="every layer softmax",
)
def _() -> tuple[float, float]:
    def added(period: int) -> float:
        model = small(period=period)
        sizes = [sum(s.bytes for s in model.step(torch.randint(30, (1, n)))[1]) for n in (50, 150)]
        return abs(sizes[1] - sizes[0] - 100 * 2 * 2 * 8 * 8)

    return added(4), added(1)


def half_turned(x: Tensor, base: float) -> Tensor:
    """Rotary on the first half of a head's channels: c and c + D / 4 turn together."""
    n, d = x.shape[-2:]
    quarter = d // 4
    angle = torch.arange(n, dtype=F64)[:, None] * base ** (-torch.arange(quarter, dtype=F64) / quarter)
    a, b, rest = x.split([quarter, quarter, d - 2 * quarter], -1)
    return torch.cat((a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos(), rest), -1)


@check(
    "minimax-01",
    "the fourth block by hand: softmax over grouped keys, rotary on half of each head, scaled residuals, experts",
    below=1e-9,
    control="rotary on whole heads",
)
def _() -> tuple[float, float]:
    model = drawn(small(alpha=(1.3, 1.0, 1.1), beta=(0.6, 1.0, 0.9), rope_base=50.0), 0.1)
    kinds = ("lightning", "lightning", "lightning", "softmax")
    block, x = model.blocks[3], torch.randn(1, 12, 32, dtype=F64)
    mixer, h = block.mixer, rms(x, 1e-6, block.norm1.weight)  # type: ignore[arg-type, union-attr]
    q, k, v = split(mixer.q(h), 4), *(split(y(h), 2).repeat_interleave(2, 1) for y in (mixer.k, mixer.v))  # type: ignore[operator, union-attr]
    past = torch.ones(12, 12, dtype=torch.bool).triu(1)

    def truth(whole: bool) -> Tensor:
        a, b = (Rope(50.0).rotate(y, torch.arange(12)) if whole else half_turned(y, 50.0) for y in (q, k))
        o = (a @ b.mT / 8**0.5).masked_fill(past, -math.inf).softmax(-1) @ v
        h2 = rms(1.3 * h + 0.6 * mixer.out(joined(o)), 1e-6, block.norm2.weight)  # type: ignore[arg-type, operator, union-attr]
        return 1.1 * h2 + 0.9 * block.mlp(h2)  # type: ignore[operator, no-any-return]

    bad = 0.0 if model.config.layer_types == kinds else math.inf
    return max(bad, naive.gap(block(x, None), truth(False))), naive.gap(block(x, None), truth(True))


@check(
    "minimax-01",
    "experts with room for 0.6 of an even share: each takes its first tokens in order, the rest go without; balance by hand",
    below=1e-9,
    control="room for all",
)
def _() -> tuple[float, float]:
    layer, x = Experts(16, 24, 4, 2, capacity=0.6).double(), torch.randn(20, 16, dtype=F64)
    out, p = layer(x), torch.softmax(x @ layer.router.weight.T, -1).detach()

    def truth(room: int) -> Tensor:
        found, taken = torch.zeros_like(x), [0] * 4
        for t in range(20):
            best = sorted(range(4), key=lambda e, t=t: -float(p[t, e]))[:2]  # type: ignore[misc]
            for e in best:
                taken[e] += 1
                if taken[e] <= room:
                    found[t] += p[t, e] / p[t, best].sum() * layer.experts[e](x[t])
        return found

    share = torch.zeros(4, dtype=F64)
    for t in range(20):
        share[p[t].topk(2).indices] += 1 / 40
    balance = abs(float(layer.balance.detach()) - 4 * float((share * p.mean(0)).sum()))
    return max(naive.gap(out, truth(6)), balance), naive.gap(out, truth(20))


@check(
    "minimax-01",
    "experts: equal to the sum over the top 2 by hand; balance is 1 for an even router; slopes fall to the last layer as released",
    below=1e-9,
    control="experts unweighed",
)
def _() -> tuple[float, float]:
    layer, x = Experts(16, 24, 4, 2).double(), torch.randn(3, 7, 16, dtype=F64)
    out = layer(x)
    p = torch.softmax(layer.router(x), -1)
    top, which = p.topk(2, -1)
    top = top / top.sum(-1, keepdim=True)

    def truth(weighed: bool) -> Tensor:
        every = torch.stack([e(x) for e in layer.experts], -2)
        got = every.gather(-2, which[..., None].expand(-1, -1, -1, 16))
        return (got * (top[..., None] if weighed else 0.5)).sum(-2)

    even = Experts(16, 24, 4, 2).double()
    even.router.weight.data.zero_()
    even(x)
    factors = abs(layer_factor(0, 80) - 1.00001) + abs(layer_factor(79, 80) - 1e-5 - 1e-5 / 79)
    balanced = abs(float(even.balance.detach()) - 1)
    return max(naive.gap(out, truth(True)), balanced, round(factors, 9)), naive.gap(out, truth(False))


@check(
    "minimax-01",
    "image patches stand before the text: logits with them == those of their features as tokens",
    below=1e-10,
    control="patches after the text",
)
def _() -> tuple[float, float]:
    model = small(patch_dim=6)
    tokens, patches = torch.randint(30, (1, 5)), torch.randn(1, 3, 6, dtype=F64)
    assert model.vision is not None

    def through(x: Tensor) -> Tensor:
        for block in model.blocks:
            x = block(x, None)
        return model.logits(x)

    image, text = model.vision(patches), model.embed(tokens)
    own = naive.gap(model(tokens, patches), through(torch.cat((image, text), 1)))
    return own, naive.gap(model(tokens, patches)[:, -5:], through(torch.cat((text, image), 1))[:, :5])


@check(
    "minimax-01",
    "operations of the next token: twice the weights it meets (two experts of three), and its reads of state and of keys and values",
    below=0,
    control="all experts counted",
)
def _() -> tuple[float, float]:
    config = MiniMaxConfig(vocab=30, dim=32, layers=4, heads=4, kv_heads=2, period=4, hidden=24, experts=3, top_k=2)
    model = MiniMaxLike(config)

    def counted(experts: int) -> int:
        total = 0
        for block in model.blocks:
            weights = [p for name, p in block.mixer.named_parameters() if p.dim() == 2]  # type: ignore[union-attr]
            own = list(block.mlp.experts[0].parameters())  # type: ignore[index, union-attr]
            total += 2 * sum(p.numel() for p in weights) + 2 * experts * sum(p.numel() for p in own)
        return total + 3 * 4 * 4 * 8 * 8 + 4 * 4 * 8 * 100  # three states of 4 heads, 8 x 8, written and read; scores and sums of 100 keys

    held = 4 * (3 * 4 * 8 * 8 + 2 * 2 * 8 * 100)  # bytes of three states, and of 100 keys and values of two heads
    found = model.cost(100)
    return abs(found[0] - counted(2)) + abs(found[1] - held), abs(found[0] - counted(3))
