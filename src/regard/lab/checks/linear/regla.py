"""Checks of regla."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from regard.catalog import get
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64, streamed
from regard.lab.checks.shared.layers import drawn, joined, misshapen, rms, split
from regard.lab.checks.shared.weighted import qkv
from regard.lab.verification import check
from regard.nn.attention import Attention
from regard.zoo.linear.regla import refined, safe_query


@check("regla", "200000 draws, m = 64: |log std(a sum_d exp(q_d + k_d))|", below=0.05, control="without a")
def _() -> tuple[float, float]:
    q, k = torch.randn(2, 200000, 64, dtype=F64)

    def miss(scaled: bool) -> float:
        factor = safe_query(q[:1], scaled) / safe_query(q[:1], False)
        return abs(math.log(float((factor[:, :1] * torch.exp(q + k).sum(-1)).std())))

    return miss(True), miss(False)


def regla_loop(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, rescale: bool = True) -> Tensor:
    """The recurrence with the largest key so far, the state rescaled whenever it grows; without the variance factor."""
    state = torch.zeros(*k.shape[:2], k.shape[-1], v.shape[-1], dtype=k.dtype)
    top, outs = torch.full((*k.shape[:2], 1, 1), -math.inf, dtype=k.dtype), []
    for t in range(k.shape[2]):
        new = torch.maximum(top, k[:, :, t].amax(-1)[..., None, None])
        state = state * (torch.exp(top - new) if rescale else 1.0) * gate[:, :, t, :, None]
        state = state + torch.exp(k[:, :, t, :, None] - new) * v[:, :, t, None, :]
        phi = torch.exp(q[:, :, t] - q[:, :, t].amax(-1, keepdim=True))
        outs.append((phi[..., None, :] @ state)[..., 0, :])
        top = new
    return torch.stack(outs, 2)


@check(
    "regla",
    "chunks, matrix and streams == the loop, with a key of +30 at the end; its last row is the form with the global maximum",
    below=1e-8,
    control="without rescaling the state",
)
def _() -> tuple[float, float]:
    q, k, v = qkv(60)
    k[:, :, -1, 0] += 30
    gate = torch.rand(1, 2, 60, 8, dtype=F64)
    mechanism = get("regla", scaled=False)
    truth = regla_loop(q, k, v, gate)
    found = [attend(q, k, v, mechanism, executor=e, log_decay=gate.log()) for e in ("chunk", "parallel")]
    found.append(streamed(mechanism, q, k, v, log_decay=gate.log()))
    total = gate.log().cumsum(2)
    pairs = torch.exp(total[:, :, -1:] - total) * torch.exp(k - k.amax((-1, -2), keepdim=True))
    last = (torch.exp(q[:, :, -1:] - q[:, :, -1:].amax(-1, keepdim=True)) * pairs).sum(-1)[:, :, None] @ v
    gaps = [naive.gap(x, truth) for x in found] + [naive.gap(found[0][:, :, -1:], last)]
    return max(gaps), naive.gap(regla_loop(q, k, v, gate, rescale=False), truth)


@check("regla", "the refined gate at g = 0.999, r = 0: its slope over the sigmoid's", above=1.99, control="at r = 1/2")
def _() -> tuple[float, float]:
    g, r = torch.rand(2, 10000, dtype=F64)
    found = refined(g, r)
    inside = bool(((found >= g * g - 1e-15) & (found <= 2 * g - g * g + 1e-15)).all()) and naive.gap(refined(g, 0 * r + 0.5), g) < 1e-12

    def slope(r: float) -> float:
        logit = torch.tensor(math.log(0.999 / 0.001), dtype=F64, requires_grad=True)
        gate = torch.sigmoid(logit)
        return float(torch.autograd.grad(refined(gate, torch.tensor(r, dtype=F64)), logit)[0] / (0.999 * 0.001))

    return slope(0.0) if inside else math.nan, slope(0.5)


@check(
    "regla",
    "the layer == its formula by hand: both gates from one projection of low rank, the factor a, a norm a head",
    below=1e-9,
    control="r in place of 2 r",
)
def _() -> tuple[float, float]:
    layer = Attention(16, 2, get("regla", rank=5))
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (16, 16) for name in ("q", "k", "v", "out")}
    shapes |= {"inputs.projected.log_decay.down.weight": (5, 16), "inputs.projected.log_decay.up.weight": (32, 5)}
    bad = misshapen(layer, shapes | {"inputs.projected.log_decay.up.bias": (32,), "out_norm.weight": (8,)})
    project = layer.inputs.projected["log_decay"]
    bad = max(bad, naive.gap(project.up.bias, torch.full((32,), 3.0)))  # type: ignore[arg-type, union-attr]
    layer, x = drawn(layer), torch.randn(2, 9, 16, dtype=F64)
    logits = x @ project.down.weight.T @ project.up.weight.T + project.up.bias  # type: ignore[union-attr, operator]
    g, r = (1 / (1 + torch.exp(-y)) for y in split(logits, 2).chunk(2, -1))
    q, k, v = (split(y(x), 2) for y in (layer.q, layer.k, layer.v))

    def truth(gate: Tensor) -> Tensor:
        o = regla_loop(q, k, v, gate) / (math.e * math.sqrt(8 * (math.e**2 - 1)))
        return layer.out(joined(rms(o, 1e-6, layer.out_norm.weight)))  # type: ignore[arg-type, no-any-return]

    refining = (1 - r) * g**2 + r * (1 - (1 - g) ** 2)
    return max(bad, naive.gap(layer(x), truth(refining))), naive.gap(layer(x), truth(g * (g + r * (1 - g))))
