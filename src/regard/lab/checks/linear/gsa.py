"""Checks of gsa."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.algebra import Causal, Mechanism
from regard.catalog import get
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64, gap_with_gradients, streamed
from regard.lab.checks.shared.layers import drawn, joined, misshapen, rms, short_conv, silu, split
from regard.lab.checks.shared.slots import slot_inputs, slot_loop
from regard.lab.checks.shared.weighted import qkv
from regard.lab.verification import check
from regard.nn.attention import Attention
from regard.nn.decoder import Decoder


@check(
    "gsa",
    "two chained scans with gradients, and streams == the recurrence, with weak and strong gates",
    below=1e-7,
    control="writes of strength 1",
)
def _() -> tuple[float, float]:
    own = []
    for strength in (0.3, 60.0):
        leaves = q, k, v, g = tuple(x.requires_grad_() for x in slot_inputs(90, strength))
        truth = slot_loop(q, k, v, g.exp(), 1 - g.exp())
        out = attend(q, k, v, "gsa", log_forget=g)
        own += [gap_with_gradients(out, truth, leaves), naive.gap(streamed("gsa", q, k, v, log_forget=g), truth)]
    other = attend(q, k, v, "gsa", log_forget=g, write=torch.ones_like(g))
    return max(own), naive.gap(other, truth)


@check(
    "gsa",
    "one-hot writes to as many slots as tokens, unwritten ones left out == causal softmax",
    below=1e-12,
    control="softmax over two tokens a slot",
)
def _() -> tuple[float, float]:
    q, k, v = qkv(12)
    truth = attend(q, k, v, mask=Causal(), scale=1.0)

    def last_row(slots: int) -> float:
        write = F.one_hot(torch.arange(12) % slots, slots).to(F64).expand(1, 2, -1, -1)
        out = attend(q, k, v, "gsa", log_forget=torch.zeros_like(write), write=write)
        return naive.gap(out[:, :, -1], truth[:, :, -1])  # all slots are written by then

    return last_row(12), last_row(6)


@check("gsa", "gates from sums (ABC): K is each slot's softmax average of keys", below=1e-10, control="without the running divisor")
def _() -> tuple[float, float]:
    q, k, v = qkv(50)
    s = 3 * torch.randn(1, 2, 50, 6, dtype=F64)
    mechanism = get("gsa", gates="sum")
    rows: list[Tensor] = []
    other: list[Tensor] = []
    for t in range(50):
        for share, to in ((torch.softmax(s[:, :, : t + 1], 2), rows), (torch.exp(s[:, :, : t + 1]), other)):
            keys, values = share.mT @ k[:, :, : t + 1], share.mT @ v[:, :, : t + 1]
            to.append(torch.softmax(keys @ q[:, :, t, :, None], -2).mT @ values)
    truth = torch.cat(rows, 2)
    own = max(naive.gap(attend(q, k, v, mechanism, write=s), truth), naive.gap(streamed(mechanism, q, k, v, write=s), truth))
    return own, naive.gap(torch.cat(other, 2), truth)


@check(
    "gsa",
    "a decoder of gated slots generates the tokens that full passes would; bytes of its state at 40 and 80 tokens differ by",
    below=0,
    control="softmax's",
)
def _() -> tuple[float, float]:
    def grown(mechanism: str | Mechanism) -> float:
        model = Decoder(mechanism, vocab=20, dim=32, layers=2, heads=2)
        prompt = torch.randint(20, (1, 40))
        out = model.generate(prompt, 3)
        full = model(out[:, :-1])[:, 39:].argmax(-1)
        if not torch.equal(full, out[:, 40:]):
            return math.nan
        sizes = [sum(s.bytes for s in model.step(torch.randint(20, (1, n)))[1]) for n in (40, 80)]
        return float(sizes[1] - sizes[0])

    return grown(get("gsa", slots=8)), grown("softmax")


@check(
    "gsa",
    "the layer with two kinds of features and grouped keys == its formula by hand: silu, gates, silu, a norm over all heads",
    below=1e-10,
    control="the norm a head",
)
def _() -> tuple[float, float]:
    x, gaps, other = torch.randn(2, 11, 16, dtype=F64), [], math.inf
    for options, tau, eps in (({}, 8.0, 1e-5), ({"tau": 2.0, "norm_eps": 1e-2, "short_conv": 3, "feature_map": "t2r"}, 2.0, 1e-2)):
        made = Attention(16, 2, get("gsa", slots=6, **options), kv_heads=1)
        shapes: dict[str, tuple[int, ...]] = {"q.weight": (16, 16), "k.weight": (8, 16), "v.weight": (8, 16), "out.weight": (16, 16)}
        shapes |= {"inputs.projected.log_forget.up.weight": (6, 16), "merge_norm.weight": (16,)}
        if options:
            shapes |= {"feature.weight": (8, 8), **{f"convs.{at}.weight": (width, 1, 3) for at, width in enumerate((16, 8, 8))}}
        gaps.append(misshapen(made, shapes))
        layer = drawn(made)
        flat = [layer.q(x), layer.k(x), layer.v(x)]
        flat = [silu(short_conv(y, c.weight)) for y, c in zip(flat, layer.convs, strict=True)] if options else flat  # type: ignore[arg-type]
        q, k, v = split(flat[0], 2), *(split(y, 1).expand(-1, 2, -1, -1) for y in flat[1:])
        q, k = ((y @ layer.feature.weight.T).clamp_min(0) if options else silu(y) for y in (q, k))  # type: ignore[union-attr, operator]
        f = (1 / (1 + torch.exp(-x @ layer.inputs.projected["log_forget"].up.weight.T))) ** (1 / tau)  # type: ignore[union-attr, operator]
        f = split(f, 1).expand(-1, 2, -1, -1)
        o = silu(slot_loop(q, k, silu(v), f, 1 - f))
        gaps.append(naive.gap(layer(x), layer.out(rms(joined(o), eps, layer.merge_norm.weight))))  # type: ignore[arg-type]
        other = min(other, naive.gap(layer(x), layer.out(joined(rms(o, eps)) * layer.merge_norm.weight)))  # type: ignore[operator]
    return max(gaps), other


@check("gsa", "scaled: scores times D^-1/2, as the released operator's default", below=1e-12, control="scores as they are")
def _() -> tuple[float, float]:
    q, k, v, g = slot_inputs(20)
    out = attend(q, k, v, get("gsa", scaled=True), log_forget=g)
    truths = [slot_loop(q, k, v, g.exp(), 1 - g.exp(), scale=scale) for scale in (8**-0.5, 1.0)]
    return naive.gap(out, truths[0]), naive.gap(out, truths[1])


@check(
    "gsa",
    "the layer without gates (ABC): a logit a slot and key head, K and V softmax averages over time, by hand",
    below=1e-10,
    control="with gates",
)
def _() -> tuple[float, float]:
    x, made = torch.randn(2, 9, 16, dtype=F64), Attention(16, 2, get("gsa", slots=6, gates="sum"), kv_heads=1)
    shapes: dict[str, tuple[int, ...]] = {"q.weight": (16, 16), "k.weight": (8, 16), "v.weight": (8, 16), "out.weight": (16, 16)}
    bad, layer = misshapen(made, shapes | {"inputs.projected.write.up.weight": (6, 16), "merge_norm.weight": (16,)}), drawn(made)
    q, k, v = silu(split(layer.q(x), 2)), *(silu(split(y(x), 1)).expand(-1, 2, -1, -1) for y in (layer.k, layer.v))
    s = split(x @ layer.inputs.projected["write"].up.weight.T, 1).expand(-1, 2, -1, -1)  # type: ignore[union-attr, operator]
    rows = []
    for t in range(9):
        share = torch.softmax(s[:, :, : t + 1], 2)
        keys, values = share.mT @ k[:, :, : t + 1], share.mT @ v[:, :, : t + 1]
        rows.append(torch.softmax(keys @ q[:, :, t, :, None], -2).mT @ values)

    def closed(o: Tensor) -> Tensor:
        return layer.out(rms(joined(silu(o)), 1e-5, layer.merge_norm.weight))  # type: ignore[arg-type, no-any-return]

    f = torch.sigmoid(s) ** (1 / 8)
    return max(bad, naive.gap(layer(x), closed(torch.cat(rows, 2)))), naive.gap(layer(x), closed(slot_loop(q, k, v, f, 1 - f)))
