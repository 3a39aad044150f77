"""Checks of nha."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.algebra import Causal
from regard.catalog import get
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64, gap_with_gradients, streamed
from regard.lab.checks.shared.layers import drawn, joined, misshapen, split
from regard.lab.checks.shared.slots import slot_inputs, slot_loop
from regard.lab.verification import check
from regard.nn.attention import Attention


@check("nha", "w = 8 with gradients, and streams == the loop", below=1e-9, control="tokens written on arrival")
def _() -> tuple[float, float]:
    leaves = q, k, v, g = tuple(x.requires_grad_() for x in slot_inputs(40))
    mechanism = get("nha", window=8, rope=None)
    truth = slot_loop(q, k, v, g.exp(), 1 - g.exp(), 8, 8**-0.5)
    out = attend(q, k, v, mechanism, log_forget=g)
    own = max(gap_with_gradients(out, truth, leaves), naive.gap(streamed(mechanism, q, k, v, log_forget=g), truth))
    return own, naive.gap(out, slot_loop(q, k, v, g.exp(), 1 - g.exp(), 8, 8**-0.5, arrival=True))


@check("nha", "w >= length is causal softmax attention, w = 0 gated slots", below=1e-12, control="w = 8 for both")
def _() -> tuple[float, float]:
    q, k, v, g = slot_inputs(40)
    full = attend(q, k, v, mask=Causal())
    slots = attend(q, k, v, get("gsa", scaled=True), log_forget=g)

    def out(window: int) -> Tensor:
        return attend(q, k, v, get("nha", window=window, rope=None), log_forget=g)

    return max(naive.gap(out(40), full), naive.gap(out(0), slots)), min(naive.gap(out(8), full), naive.gap(out(8), slots))


@check(
    "nha",
    "what a value inside the window gives: softmax's share of the window, times what the slots leave",
    below=1e-9,
    control="softmax's share alone",
)
def _() -> tuple[float, float]:
    q, k, v, g = slot_inputs(40)
    v.requires_grad_()
    out = attend(q, k, v, get("nha", window=8, rope=None), log_forget=g)
    got = torch.autograd.grad(out[0, 0, 30, 0], v)[0][0, 0, 23:31, 0]
    near = 8**-0.5 * k[0, 0, 23:31] @ q[0, 0, 30]
    keys = torch.zeros(6, 8, dtype=F64)
    for e in range(23):
        keys = g[0, 0, e].exp()[:, None] * keys + (1 - g[0, 0, e].exp())[:, None] * k[0, 0, e]
    far = 8**-0.5 * keys @ q[0, 0, 30]
    left = near.logsumexp(0).exp() / (near.logsumexp(0).exp() + far.logsumexp(0).exp())
    return naive.gap(got, left * near.softmax(0)), naive.gap(got, near.softmax(0))


def turned(x: Tensor, at: int, base: float) -> Tensor:
    """Rotary: channels c and c + D / 2 of x (..., D) turned by at base^(-2 c / D)."""
    half = x.shape[-1] // 2
    angle = at * base ** (-torch.arange(half, dtype=F64) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()), -1)


def rotated_loop(q: Tensor, k: Tensor, v: Tensor, f: Tensor, window: int, base: float, slots_turn: bool = False) -> Tensor:
    """Slots without positions beside a window whose pairs turn by their distance, a token at a time."""
    n, d = q.shape[2:]
    outs = []
    keys, values = (torch.zeros(*q.shape[:2], f.shape[-1], d, dtype=q.dtype) for _ in range(2))
    for t in range(n):
        e = t - window
        if e >= 0:
            gone = turned(k[:, :, e], e, base) if slots_turn else k[:, :, e]
            fade, write = f[:, :, e, :, None], (1 - f[:, :, e])[..., None]
            keys, values = fade * keys + write * gone[:, :, None], fade * values + write * v[:, :, None, e]
        near = range(max(0, e + 1), t + 1)
        s = [(turned(q[:, :, t], t, base) * turned(k[:, :, j], j, base)).sum(-1)[..., None] for j in near]
        s = [(keys @ q[:, :, t, :, None])[..., 0], *s] if e >= 0 else s
        read = torch.cat((values, v[:, :, near.start : t + 1]), 2) if e >= 0 else v[:, :, : t + 1]
        outs.append((torch.softmax(torch.cat(s, -1) * d**-0.5, -1)[:, :, None] @ read)[:, :, 0])
    return torch.stack(outs, 2)


@check(
    "nha",
    "the layer with rotary positions == its formula by hand: window keys turned, slots not; token by token too",
    below=1e-9,
    control="slots turned as well",
)
def _() -> tuple[float, float]:
    layer = Attention(16, 2, get("nha", window=4, slots=6, tau=2.0, rope=100.0))
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (16, 16) for name in ("q", "k", "v", "out")}
    bad = misshapen(layer, shapes | {"inputs.projected.log_forget.up.weight": (12, 16)})
    layer, x = drawn(layer), torch.randn(2, 11, 16, dtype=F64)
    q, k, v = (split(y(x), 2) for y in (layer.q, layer.k, layer.v))
    f = split(1 / (1 + torch.exp(-x @ layer.inputs.projected["log_forget"].up.weight.T)), 2) ** 0.5  # type: ignore[union-attr, operator]
    truth, other = (layer.out(joined(rotated_loop(q, k, v, f, 4, 100.0, turn))) for turn in (False, True))
    y, state, outs = layer(x), None, []
    for t in range(11):
        out, state = layer.step(x[:, t : t + 1], state)
        outs.append(out)
    return max(bad, naive.gap(y, truth), naive.gap(torch.cat(outs, 1), truth)), naive.gap(y, other)
