"""Checks of log-linear-attention."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.algebra import Causal, FeatureMap, Input, LogLinear, Mechanism, Recurrent
from regard.catalog import get
from regard.engine import step
from regard.engine.door import attend
from regard.engine.recurrent import levels
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64, flops, gap_with_gradients, streamed
from regard.lab.checks.shared.layers import drawn, joined, misshapen, rms, short_conv, silu, split, unit
from regard.lab.checks.shared.weighted import qkv
from regard.lab.verification import check
from regard.nn.attention import Attention


def spans(base: str, n: int = 37) -> tuple[Mechanism, Tensor, Tensor, Tensor, dict[str, Tensor]]:
    q, k, v = qkv(n)
    inputs = {"log_decay": -torch.rand(1, 2, n, dtype=F64), "level_scales": torch.rand(1, 2, n, 7, dtype=F64)}
    if base == "gated-delta":
        k, inputs["beta"] = F.normalize(k, dim=-1), torch.rand(1, 2, n, dtype=F64)
    return get("log-linear-attention", base=base), q, k, v, inputs


def span_sums(q: Tensor, k: Tensor, v: Tensor, inputs: dict[str, Tensor], level: str = "fenwick") -> Tensor:
    """Each pair's product of transitions, times its level's scale, in loops over t and j."""
    n = q.shape[2]
    out = torch.zeros_like(v)
    for t in range(n):
        moved = q[:, :, t]  # q_t^T times the transitions after j
        for j in range(t, -1, -1):
            at = (t ^ j).bit_length() if level == "fenwick" else (t - j).bit_length()
            beta = inputs["beta"][:, :, j, None] if "beta" in inputs else 1.0
            w = (moved * k[:, :, j]).sum(-1, keepdim=True) * beta * inputs["level_scales"][:, :, t, at, None]
            out[:, :, t] += w * v[:, :, j]
            if "beta" in inputs:
                moved = moved - beta * (moved * k[:, :, j]).sum(-1, keepdim=True) * k[:, :, j]
            moved = moved * torch.exp(inputs["log_decay"][:, :, j, None])
    return out


@check(
    "log-linear-attention",
    "Mamba-2 and gated delta: the matrix, chunks of 8 and of 64, streams == loops over pairs",
    below=1e-10,
    control="levels by distance",
)
def _() -> tuple[float, float]:
    own, other = [], []
    for base in ("mamba2", "gated-delta"):
        mechanism, q, k, v, inputs = spans(base)
        truth = span_sums(q, k, v, inputs)
        scan, scales = levels.prepared(mechanism, Causal(), q, k, v, None, inputs, 0)  # type: ignore[arg-type]
        found = [levels.parallel(scan, scales), levels.chunked(scan, scales, 8)[0], attend(q, k, v, mechanism, **inputs)]
        found.append(streamed(mechanism, q, k, v, (20, 21, 36), **inputs))
        own += [naive.gap(x, truth) for x in found]
        other.append(naive.gap(found[0], span_sums(q, k, v, inputs, "distance")))
    return max(own), min(other)


@check("log-linear-attention", "gradients of chunks of 8 == those of the matrix", below=1e-9, control="one scale for all levels")
def _() -> tuple[float, float]:
    own = []
    for base in ("mamba2", "gated-delta"):
        mechanism, q, k, v, inputs = spans(base)
        leaves = tuple(x.requires_grad_() for x in (q, k, v, *inputs.values()))
        (scan, scales), again = (levels.prepared(mechanism, Causal(), q, k, v, None, inputs, 0) for _ in range(2))  # type: ignore[arg-type]
        own.append(gap_with_gradients(levels.chunked(scan, scales, 8)[0], levels.parallel(*again), leaves))
    flat = scales.mean(-1, keepdim=True).expand_as(scales)
    return max(own), naive.gap(levels.chunked(scan, flat, 8)[0], levels.parallel(scan, scales))


@check("log-linear-attention", "scales of one == the recurrence itself", below=1e-12, control="random scales")
def _() -> tuple[float, float]:
    own, other = [], []
    for base in ("mamba2", "gated-delta"):
        mechanism, q, k, v, inputs = spans(base)
        plain = attend(q, k, v, mechanism.inner, **{name: x for name, x in inputs.items() if name != "level_scales"})  # type: ignore[attr-defined]
        ones = {**inputs, "level_scales": torch.ones_like(inputs["level_scales"])}
        own.append(naive.gap(attend(q, k, v, mechanism, **ones), plain))
        other.append(naive.gap(attend(q, k, v, mechanism, **inputs), plain))
    return max(own), min(other)


@check(
    "log-linear-attention",
    "states alive after each of 100 tokens, less popcount(t) + 1: the largest miss",
    below=0,
    control="keys that softmax holds",
)
def _() -> tuple[float, float]:
    mechanism, q, k, v, inputs = spans("mamba2", 100)
    inputs["level_scales"] = torch.rand(1, 2, 100, 9, dtype=F64)
    state = held = None
    own = other = 0
    for t in range(100):
        part = {name: x[:, :, t : t + 1] for name, x in inputs.items()}
        one = [x[:, :, t : t + 1] for x in (q, k, v)]
        _, state = step(*one, mechanism, state, **part)
        _, held = step(*one, "softmax", held)
        alive = sum(x is not None for x in state.levels)  # type: ignore[union-attr]
        own, other = max(own, abs(alive - t.bit_count() - 1)), max(other, abs(held.k.shape[2] - t.bit_count() - 1))  # type: ignore[union-attr]
    return own, other


@check("log-linear-attention", "growth of operations from 256 to 1024 tokens, a doubling", below=2.3, control="the matrix")
def _() -> tuple[float, float]:
    def growth(run: Callable[..., object]) -> float:
        found = []
        for n in (256, 1024):
            q, k, v = (torch.randn(1, 1, n, 32) for _ in range(3))
            inputs = {"log_decay": -0.1 * torch.rand(1, 1, n), "level_scales": torch.rand(1, 1, n, 11)}
            scan, scales = levels.prepared(get("log-linear-attention"), Causal(), q, k, v, None, inputs, 0)  # type: ignore[arg-type]
            found.append(flops(functools.partial(run, scan, scales)))
        return (found[1] / found[0]) ** 0.5

    return growth(levels.chunked), growth(levels.parallel)


@check(
    "log-linear-attention",
    "the layer of both bases == its formula by hand: convolutions, silu, unit q and k, decay, scales of levels, norm, gate",
    below=1e-10,
    control="sigmoid scales",
)
def _() -> tuple[float, float]:
    x, gaps = torch.randn(2, 9, 16, dtype=F64), []
    other: list[float] = []
    for base in ("mamba2", "gated-delta"):
        layer = Attention(16, 2, get("log-linear-attention", base=base, levels=6, tau=4.0, short_conv=3))
        shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (16, 16) for name in ("q", "k", "v", "out", "gate")}
        shapes |= {f"convs.{at}.weight": (16, 1, 3) for at in range(3)} | {"out_norm.weight": (8,)}
        for name, width in (("log_decay", 2), ("level_scales", 12)):
            shapes |= {f"inputs.projected.{name}.up.weight": (width, 16), f"inputs.projected.{name}.up.bias": (width,)}
        gaps.append(misshapen(layer, shapes | ({"inputs.projected.beta.up.weight": (2, 16)} if base == "gated-delta" else {})))
        project = layer.inputs.projected
        gaps += [naive.gap(project[name].up.bias, torch.tensor(start)) for name, start in (("log_decay", 2.0), ("level_scales", 0.5))]  # type: ignore[arg-type, union-attr]
        layer = drawn(layer)
        flat = [short_conv(y(x), c.weight) for y, c in zip((layer.q, layer.k, layer.v), layer.convs, strict=True)]  # type: ignore[arg-type]
        q, k, v = (silu(split(y, 2)) for y in flat)
        inputs = {"log_decay": -torch.log(1 + torch.exp(-project["log_decay"](x)[..., 0])) / 4.0}
        if base == "gated-delta":
            inputs["beta"] = torch.sigmoid(project["beta"](x)[..., 0])
        made = project["level_scales"](x)
        assert layer.gate is not None
        gate = silu(layer.gate(x))
        for scales, to in ((torch.log(1 + torch.exp(made)), gaps), (torch.sigmoid(made), other)):
            o = span_sums(unit(q, 1e-6), unit(k, 1e-6), v, {**inputs, "level_scales": scales})
            to.append(naive.gap(layer(x), layer.out(joined(rms(o, 1e-5, layer.out_norm.weight)) * gate)))  # type: ignore[arg-type]
    return max(gaps), min(other)


@check(
    "log-linear-attention",
    "any decayed recurrence becomes log-linear: a decay a head, features and a scale of its own == the loops over pairs",
    below=1e-10,
    control="the recurrence itself",
)
def _() -> tuple[float, float]:
    q, k, v = qkv(23)
    g, scales = -torch.rand(2, dtype=F64), torch.rand(1, 2, 23, 6, dtype=F64)
    inner = Recurrent(FeatureMap(torch.relu), decay="head", scaled=False, inputs=(Input("log_decay", "h"),))
    out = attend(q, k, v, LogLinear(inner, (Input("level_scales", "bhkf"),)), log_decay=g, level_scales=scales)
    truth = torch.zeros_like(v)
    for t in range(23):
        for j in range(t + 1):
            w = (q[:, :, t].clamp_min(0) * k[:, :, j].clamp_min(0)).sum(-1) * torch.exp(g * (t - j))
            truth[:, :, t] += (w * scales[:, :, t, (t ^ j).bit_length()])[..., None] * v[:, :, j]
    return naive.gap(out, truth), naive.gap(attend(q, k, v, inner, log_decay=g), truth)
