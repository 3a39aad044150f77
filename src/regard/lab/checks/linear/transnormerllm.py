"""Checks of transnormerllm."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from regard.algebra import Rope
from regard.catalog import get
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64, streamed
from regard.lab.checks.shared.layers import drawn, joined, misshapen, rms, silu, split
from regard.lab.checks.shared.weighted import qkv
from regard.lab.verification import check
from regard.nn.attention import Attention
from regard.zoo.linear.transnormerllm import transnormer_model


def lrpe_product(q: Tensor, k: Tensor, v: Tensor, theta: Tensor, rate: Tensor) -> Tensor:
    """sum_s lambda^(t-s) (sum_c q_tc k_sc cos(theta_c (t - s))) v_s in loops over pairs."""
    n = q.shape[2]
    out = torch.zeros_like(v)
    for t in range(n):
        for s in range(t + 1):
            w = (q[:, :, t] * k[:, :, s] * torch.cos(theta * (t - s))).sum(-1) * torch.exp(rate * (t - s))
            out[:, :, t] += w[..., None] * v[:, :, s]
    return out


@check(
    "transnormerllm",
    "cosines and decay: chunks, steps and the matrix == loops over pairs",
    below=1e-10,
    control="a rotation of channel pairs",
)
def _() -> tuple[float, float]:
    q, k, v = qkv(40)
    theta, rate = torch.rand(2, 8, dtype=F64), -torch.tensor([0.3, 0.05], dtype=F64)
    mechanism = get("transnormerllm")
    truth = lrpe_product(q, k, v, theta, rate)
    found = [attend(q, k, v, mechanism, executor=e, theta=theta, log_decay=rate) for e in ("chunk", "parallel", "step")]
    found.append(streamed(mechanism, q, k, v, theta=theta, log_decay=rate))
    at = torch.arange(40)
    turned = attend(Rope().rotate(q, at), Rope().rotate(k, at), v, "lightning-attention-2", log_decay=rate)
    return max(naive.gap(x, truth) for x in found), naive.gap(turned, truth)


@check(
    "transnormerllm",
    "float32, T = 4096, lambda = 1/2: share of entries that are no number, or farther than 1e-4 of the largest from float64",
    below=0.0,
    control="a recurrence with factors lambda^-s",
)
def _() -> tuple[float, float]:
    q, k, v = (torch.randn(1, 2, 4096, 16) for _ in range(3))
    rate = torch.full((2,), math.log(0.5))
    mechanism = get("transnormerllm", layer=1, layers=2)
    truth = attend(q.double(), k.double(), v.double(), mechanism, log_decay=rate.double())
    size = truth.abs().max()
    t = torch.arange(4096.0)[:, None]
    raw = torch.exp(rate[0] * t) * (q @ ((k * torch.exp(-rate[0] * t)).mT[..., :, :, None] * v[:, :, None]).cumsum(-2)[:, :, :, -1])

    def off(out: torch.Tensor) -> float:
        return float((~((out - truth).abs() <= 1e-4 * size)).double().mean())

    return max(off(attend(q, k, v, mechanism, executor=e, log_decay=rate)) for e in ("chunk", "step")), off(raw)


@check("transnormerllm", "v x 1000 changes the layer by", below=1e-3, control="without the norm")
def _() -> tuple[float, float]:
    layer = Attention(32, 4, "transnormerllm")
    bare = Attention(32, 4, replace(get("transnormerllm"), recipe=replace(layer.recipe, merge_norm="")))  # type: ignore[type-var]
    bare.load_state_dict(layer.state_dict())
    x = torch.randn(2, 20, 32)

    def change(layer: Attention) -> float:
        before = layer(x)
        layer.v.weight.data.mul_(1000)
        return naive.gap(layer(x), before)

    return change(layer), change(bare)


@check(
    "transnormerllm",
    "decays: the first head of layer 0 forgets fastest, the last layer keeps all: largest log decay there",
    below=1e-4,
    control="in layer 0",
)
def _() -> tuple[float, float]:
    rates = [Attention(64, 8, get("transnormerllm", layer=layer, layers=4)).inputs.fixed_log_decay for layer in range(4)]
    truth = torch.stack([-torch.tensor([2.0**-h * (1 - layer / 3 + 1e-5) for h in range(1, 9)]) for layer in range(4)])
    same = naive.gap(torch.stack(rates), truth)  # type: ignore[arg-type]
    falling = bool((rates[0].diff() > 0).all())  # type: ignore[union-attr, operator]
    return max(same, float(rates[3].abs().max())) if falling else math.inf, float(rates[0].abs().max())  # type: ignore[union-attr, operator]


@check(
    "transnormerllm",
    "the layers == their formula by hand: silu of q and k, cosines in the first alone, a norm over all heads without factors, times x U",
    below=1e-9,
    control="silu of the gate",
)
def _() -> tuple[float, float]:
    x, gaps, other = torch.randn(2, 9, 16, dtype=F64), [], math.inf
    for at in (0, 1):
        layer = Attention(16, 2, get("transnormerllm", layer=at, layers=3))
        shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (16, 16) for name in ("q", "k", "v", "out", "gate")}
        gaps.append(misshapen(layer, shapes | ({} if at else {"inputs.learned.theta": (2, 8)})))
        layer = drawn(layer)
        rate = -torch.tensor([2.0**-4, 2.0**-8], dtype=F64) * (1 - at / 2 + 1e-5)
        theta = torch.zeros(2, 8, dtype=F64) if at else layer.inputs.learned["theta"]
        q, k, v = silu(split(layer.q(x), 2)), silu(split(layer.k(x), 2)), split(layer.v(x), 2)
        o = rms(joined(lrpe_product(q, k, v, theta, rate)), 1e-6)
        assert layer.gate is not None
        gaps.append(naive.gap(layer(x), layer.out(o * layer.gate(x))))
        other = min(other, naive.gap(layer(x), layer.out(o * silu(layer.gate(x)))))
    return max(gaps), other


@check(
    "transnormerllm",
    "angles start at 10000^(-2 c / (H D)), c counting the channels of all heads",
    below=1e-6,
    control="c counted a head",
)
def _() -> tuple[float, float]:
    theta = Attention(16, 2, "transnormerllm").inputs.learned["theta"].double()
    truths = [torch.tensor([[10000 ** (-2 * (own * h * 8 + c) / 16) for c in range(8)] for h in range(2)], dtype=F64) for own in (1, 0)]
    return naive.gap(theta, truths[0]), naive.gap(theta, truths[1])


@check(
    "transnormerllm",
    "the model == x + layer(norm x), x + W3 (W1 x * W2 x) of norm x, norm, by hand; token by token too",
    below=1e-9,
    control="silu inside the unit",
)
def _() -> tuple[float, float]:
    model, tokens = drawn(transnormer_model(20, 16, 3, 2)), torch.randint(20, (2, 9))

    def truth(activated: bool) -> Tensor:
        x = model.embed(tokens)
        for block in model.blocks:
            x = x + block.mixer(rms(x, 1e-6))
            z = rms(x, 1e-6)
            left = z @ block.mlp.gate.weight.T
            x = x + ((silu(left) if activated else left) * (z @ block.mlp.up.weight.T)) @ block.mlp.down.weight.T
        return rms(x, 1e-6) @ model.embed.weight.T  # type: ignore[no-any-return]

    y, states, outs = model(tokens), None, []
    for t in range(9):
        out, states = model.step(tokens[:, t : t + 1], states)
        outs.append(out)
    return max(naive.gap(y, truth(False)), naive.gap(torch.cat(outs, 1), y)), naive.gap(y, truth(True))
