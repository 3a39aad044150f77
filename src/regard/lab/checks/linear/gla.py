"""Checks of gla."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from regard.algebra import Recurrent
from regard.catalog import get
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.layers import drawn, joined, misshapen, rms, short_conv, silu, split
from regard.lab.checks.shared.recurrent import forms, gradient_gap, qkv
from regard.lab.verification import check
from regard.nn.attention import Attention


def gla_inputs(n: int, strength: float = 1.0) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    q, k, v = qkv(n)
    return q, k, v, {"log_decay": -strength * torch.rand(1, 2, n, 8, dtype=F64)}


@check(
    "gla",
    "parallel, chunked and secondary-chunked forms equal the recurrence, weak and strong gates",
    below=1e-10,
    control="one gate a token",
)
def _() -> tuple[float, float]:
    mechanism = get("gla")
    assert isinstance(mechanism, Recurrent)
    own = other = 0.0
    for strength in (0.1, 8.0):
        q, k, v, inputs = gla_inputs(64, strength)
        truth = naive.recurrence(q / math.sqrt(8), k, v, inputs["log_decay"])[0]
        own = max([own, *[naive.gap(out, truth) for chunk in (16, 64) for out in forms(mechanism, q, k, v, chunk, **inputs)]])
        mean = inputs["log_decay"].mean(-1, keepdim=True).expand_as(inputs["log_decay"])
        other = max(other, naive.gap(forms(mechanism, q, k, v, log_decay=mean)[1], truth))
    return own, other


@check("gla", "gradients, the gate's included, equal those of the token loop", below=1e-8, control="scale left out")
def _() -> tuple[float, float]:
    q, k, v, inputs = gla_inputs(64)
    mechanism = get("gla")
    assert isinstance(mechanism, Recurrent)
    return (
        gradient_gap(mechanism, q, k, v, inputs, lambda q, k, v, g: naive.recurrence(q / math.sqrt(8), k, v, g)[0]),
        gradient_gap(mechanism, q, k, v, inputs, lambda q, k, v, g: naive.recurrence(q, k, v, g)[0]),
    )


@check("gla", "strong gates (about -4 a token) in float32 match float64: relative error", below=1e-4, control="naive Q e^B, K e^-B")
def _() -> tuple[float, float]:
    q, k, v = (x.float() for x in qkv(64))
    g = -4 - 0.5 * torch.rand(1, 2, 64, 8)
    truth = naive.recurrence(q.double() / math.sqrt(8), k.double(), v.double(), g.double())[0]
    own = naive.gap(attend(q, k, v, "gla", log_decay=g).double(), truth) / float(truth.abs().max())
    total = g.cumsum(-2)
    apart = ((q * torch.exp(total) / math.sqrt(8)) @ (k * torch.exp(-total)).transpose(-1, -2)).tril() @ v
    # Whatever is no number counts as 1: such a form's output is worthless, and a control must be a number.
    return own, float((apart.double() - truth).abs().nan_to_num(nan=1.0, posinf=1.0, neginf=1.0).max() / truth.abs().max())


@check(
    "gla", "equal gates in all channels are Lightning's scalar decay, alpha = 1 plain linear attention", below=1e-10, control="other gates"
)
def _() -> tuple[float, float]:
    q, k, v, inputs = gla_inputs(50)
    g = torch.tensor([-0.1, -0.3], dtype=F64)
    same = attend(q, k, v, "gla", scale=1.0, log_decay=g[None, :, None, None].expand(1, 2, 50, 8))
    light = attend(q, k, v, "lightning-attention-2", log_decay=g)
    plain = attend(q, k, v, "gla", scale=1.0, log_decay=torch.zeros(1, 2, 50, 8, dtype=F64))
    own = max(naive.gap(same, light), naive.gap(plain, (q @ k.transpose(-1, -2)).tril() @ v))
    return own, naive.gap(attend(q, k, v, "gla", scale=1.0, **inputs), light)


def by_hand(layer: Attention, x: Tensor, tau: float, low: float, eps: float, gated: bool = True) -> Tensor:
    """A layer of two heads, 16 channels each, that share one key head: the gate a key head, a norm a head, silu(x W) times it."""
    made = [layer.q(x), layer.k(x), layer.v(x)]
    if len(layer.convs):
        made = [silu(short_conv(y, c.weight)) for y, c in zip(made, layer.convs, strict=True)]  # type: ignore[arg-type]
    q, k, v = split(made[0], 2), *(split(y, 1).expand(-1, 2, -1, -1) for y in made[1:])
    project = layer.inputs.projected["log_decay"]
    logits = x @ project.down.weight.T @ project.up.weight.T + project.up.bias  # type: ignore[union-attr, operator]
    g = (-torch.log(1 + torch.exp(-logits)) / tau).clamp_min(low)
    o = naive.recurrence(q / math.sqrt(8), k, v, split(g, 1).expand(-1, 2, -1, -1))[0]
    o = joined(rms(o, eps, layer.out_norm.weight))  # type: ignore[arg-type]
    assert layer.gate is not None
    return layer.out(o * silu(layer.gate(x)) if gated else o)  # type: ignore[no-any-return]


@check(
    "gla",
    "the layer, plain and with convolutions, other temperature and clamped gates == its formula by hand; its parameters are the paper's",
    below=1e-10,
    control="without the output gate",
)
def _() -> tuple[float, float]:
    gate = {"inputs.projected.log_decay.down.weight": (16, 32), "inputs.projected.log_decay.up.weight": (8, 16)}
    shapes: dict[str, tuple[int, ...]] = {"q.weight": (16, 32), "k.weight": (8, 32), "v.weight": (16, 32), "out.weight": (32, 32), **gate}
    shapes |= {"inputs.projected.log_decay.up.bias": (8,), "out_norm.weight": (16,), "gate.weight": (32, 32)}
    convs = {f"convs.{at}.weight": (width, 1, 3) for at, width in enumerate((16, 8, 16))}
    plain = Attention(32, 2, "gla", kv_heads=1)
    other = Attention(32, 2, get("gla", tau=4.0, gate_bias=1.5, clamp_min=-0.3, norm_eps=1e-2, short_conv=3), kv_heads=1)
    start = [float(layer.inputs.projected["log_decay"].up.bias.detach().mean()) for layer in (plain, other)]  # type: ignore[union-attr, operator]
    bad = misshapen(plain, shapes) + misshapen(other, shapes | convs) + abs(start[0]) + abs(start[1] - 1.5)
    x = torch.randn(2, 9, 32, dtype=F64)
    plain, other = drawn(plain), drawn(other)
    gaps = naive.gap(plain(x), by_hand(plain, x, 16.0, -math.inf, 1e-5)), naive.gap(other(x), by_hand(other, x, 4.0, -0.3, 1e-2))
    return max(bad, *gaps), naive.gap(plain(x), by_hand(plain, x, 16.0, -math.inf, 1e-5, gated=False))
