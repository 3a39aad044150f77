"""Checks of deltanet."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.algebra import Recurrent
from regard.catalog import get
from regard.engine import step
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.layers import drawn, joined, misshapen, rms, short_conv, silu, split, unit
from regard.lab.checks.shared.recurrent import forms, gradient_gap, qkv
from regard.lab.verification import check
from regard.nn.attention import Attention
from regard.zoo.linear.deltanet import gated_deltanet


def delta_inputs(n: int = 64) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    q, k, v = qkv(n)
    return q, F.normalize(k, dim=-1), v, {"beta": torch.rand(1, 2, n, dtype=F64)}


@check("deltanet", "parallel and chunked (WY) forms equal the recurrence", below=1e-10, control="additive writes")
def _() -> tuple[float, float]:
    mechanism = get("deltanet")
    assert isinstance(mechanism, Recurrent)
    q, k, v, inputs = delta_inputs()
    truth = naive.recurrence(q / math.sqrt(8), k, v, beta=inputs["beta"])[0]
    own = max(naive.gap(out, truth) for out in forms(mechanism, q, k, v, **inputs))
    return own, naive.gap(naive.recurrence(q / math.sqrt(8), k, inputs["beta"][..., None] * v)[0], truth)


@check("deltanet", "gradients, beta's included, equal those of the token loop", below=1e-8, control="additive writes")
def _() -> tuple[float, float]:
    q, k, v, inputs = delta_inputs()
    mechanism = get("deltanet")
    assert isinstance(mechanism, Recurrent)
    return (
        gradient_gap(mechanism, q, k, v, inputs, lambda q, k, v, b: naive.recurrence(q / math.sqrt(8), k, v, beta=b)[0]),
        gradient_gap(mechanism, q, k, v, inputs, lambda q, k, v, b: naive.recurrence(q / math.sqrt(8), k, b[..., None] * v)[0]),
    )


@check(
    "deltanet",
    "8 orthonormal keys written 64 times with beta = 1: each read gives the LAST value written",
    below=1e-12,
    control="additive writes",
)
def _() -> tuple[float, float]:
    basis = torch.linalg.qr(torch.randn(8, 8, dtype=F64))[0]
    order = torch.cat([torch.randperm(8) for _ in range(8)])
    k, v = basis[order][None, None], torch.randn(1, 1, 64, 5, dtype=F64)
    last = torch.stack([v[0, 0, int((order == key).nonzero().max())] for key in range(8)])
    reads = basis[None, None]
    queries = torch.cat((torch.zeros(1, 1, 64, 8, dtype=F64), reads), 2)
    keys, values = torch.cat((k, torch.zeros(1, 1, 8, 8, dtype=F64)), 2), torch.cat((v, torch.zeros(1, 1, 8, 5, dtype=F64)), 2)

    def read(mechanism: Recurrent, **inputs: Tensor) -> float:
        return naive.gap(attend(queries, keys, values, mechanism, scale=1.0, **inputs)[0, 0, 64:], last)

    delta = get("deltanet")
    assert isinstance(delta, Recurrent)
    return read(delta, beta=torch.ones(1, 1, 72, dtype=F64)), read(
        replace(delta, write="add", decay="head", inputs=()), log_decay=torch.zeros(1, dtype=F64)
    )


@check("deltanet", "beta = 0 leaves a carried state unchanged", below=0.0, control="beta = 0.5")
def _() -> tuple[float, float]:
    q, k, v, inputs = delta_inputs()
    _, before = step(q, k, v, "deltanet", **inputs)

    def moved(beta: float) -> float:
        _, after = step(q, k, v, "deltanet", before, beta=torch.full((1, 2, 64), beta, dtype=F64))
        return naive.gap(after.s, before.s)  # type: ignore[union-attr]

    return moved(0.0), moved(0.5)


LAYERS: dict[str, dict[str, Any]] = {
    "default": {},
    "options": {"negative_eigenvalues": True, "conv_bias": True, "out_gate": "silu", "key_dim": 4, "norm_eps": 1e-2},
    "sum": {"short_conv": 0, "activation": "elu+1", "qk_norm": "sum"},
}


def delta_layer(layer: Attention, x: Tensor, kind: str, unit_keys: bool = True) -> Tensor:
    """A layer of two heads: convolutions, silu (or elu + 1), rows of length (or sum) one, beta, a norm a head, perhaps a gate."""
    flat = [layer.q(x), layer.k(x), layer.v(x)]
    if kind != "sum":
        flat = [short_conv(y, c.weight, c.bias) for y, c in zip(flat, layer.convs, strict=True)]  # type: ignore[arg-type]
    q, k, v = (split(y, 2) for y in flat)
    if kind == "sum":
        q, k = (torch.where(y > 0, y + 1, torch.exp(y)) for y in (q, k))
        q, k = (y / y.sum(-1, keepdim=True) for y in (q, k))
    else:
        q, k = unit(silu(q), 1e-6), unit(silu(k), 1e-6) if unit_keys else silu(k)
    beta = 1 / (1 + torch.exp(-(x @ layer.inputs.projected["beta"].up.weight.T)))  # type: ignore[union-attr, operator]
    beta = (2 if kind == "options" else 1) * beta.transpose(1, 2)
    o = naive.recurrence(q / math.sqrt(q.shape[-1]), k, silu(v), beta=beta)[0]
    o = joined(rms(o, 1e-2 if kind == "options" else 1e-5, layer.out_norm.weight))  # type: ignore[arg-type]
    return layer.out(o if layer.gate is None else o * silu(layer.gate(x)))  # type: ignore[no-any-return]


@check(
    "deltanet",
    "the layer, with its options too == its formula by hand: convolutions, silu, unit q and k, beta, norm, gate",
    below=1e-10,
    control="keys not of unit length",
)
def _() -> tuple[float, float]:
    x, gaps, other = torch.randn(2, 9, 16, dtype=F64), [], math.inf
    for kind, options in LAYERS.items():
        layer = Attention(16, 2, get("deltanet", **options))
        key = 8 if kind == "options" else 16
        shapes: dict[str, tuple[int, ...]] = {"q.weight": (key, 16), "k.weight": (key, 16), "v.weight": (16, 16), "out.weight": (16, 16)}
        shapes |= {"inputs.projected.beta.up.weight": (2, 16), "out_norm.weight": (8,)}
        if kind != "sum":
            shapes |= {f"convs.{at}.weight": (width, 1, 4) for at, width in enumerate((key, key, 16))}
        if kind == "options":
            shapes |= {"gate.weight": (16, 16), **{f"convs.{at}.bias": (width,) for at, width in enumerate((key, key, 16))}}
        gaps.append(misshapen(layer, shapes))
        layer = drawn(layer)
        gaps.append(naive.gap(layer(x), delta_layer(layer, x, kind)))
        if kind != "sum":
            other = min(other, naive.gap(layer(x), delta_layer(layer, x, kind, unit_keys=False)))
    return max(gaps), other


@check(
    "deltanet",
    "gated DeltaNet: the layer == its formula by hand, the state faded before it is corrected; its gate starts near one",
    below=1e-10,
    control="without the decay",
)
def _() -> tuple[float, float]:
    layer = Attention(16, 2, gated_deltanet())
    start = layer.inputs.projected["log_decay"].up.bias.detach()  # type: ignore[operator, union-attr]
    bad = naive.gap(start, torch.full((2,), 2.0))  # type: ignore[arg-type]
    layer, x = drawn(layer), torch.randn(2, 9, 16, dtype=F64)
    flat = [short_conv(y(x), c.weight) for y, c in zip((layer.q, layer.k, layer.v), layer.convs, strict=True)]  # type: ignore[arg-type]
    q, k, v = (silu(split(y, 2)) for y in flat)
    project = layer.inputs.projected
    beta, a = (1 / (1 + torch.exp(-project[name](x)[..., 0])) for name in ("beta", "log_decay"))
    assert layer.gate is not None

    def truth(log_decay: Tensor) -> Tensor:
        o = naive.recurrence(unit(q, 1e-6) / math.sqrt(8), unit(k, 1e-6), v, log_decay[..., None], beta)[0]
        return layer.out(joined(rms(o, 1e-5, layer.out_norm.weight)) * silu(layer.gate(x)))  # type: ignore[arg-type, misc, no-any-return]

    return max(bad, naive.gap(layer(x), truth(a.log() / 16))), naive.gap(layer(x), truth(0 * a))
