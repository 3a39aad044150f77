"""Checks of lightnet."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.algebra import Causal, Padding
from regard.catalog import get
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64, gap_with_gradients, streamed
from regard.lab.checks.shared.layers import drawn, joined, misshapen, rms, short_conv, silu, split
from regard.lab.checks.shared.weighted import qkv
from regard.lab.verification import check
from regard.nn.attention import Attention
from regard.zoo.linear.lightnet import AxisMixing, LightNet


def lightnet_sum(q: Tensor, f: Tensor, v: Tensor) -> Tensor:
    """sum_s e^{f_s - z_t} v_s, one row at a time."""
    rows = []
    for t in range(q.shape[2]):
        share = torch.softmax(f[:, :, : t + 1], 2)  # e^{f_s - z_t}
        rows.append((F.silu(q[:, :, t])[..., None, :] @ (share.mT @ v[:, :, : t + 1]))[..., 0, :] * q.shape[-1] ** -0.5)
    return torch.stack(rows, 2)


@check(
    "lightnet",
    "chunks, matrix and streams with gradients == the explicit sum; logits of +-200 too",
    below=1e-9,
    control="gates that multiply",
)
def _() -> tuple[float, float]:
    leaves = q, f, v = tuple(x.requires_grad_() for x in qkv(70))
    out = attend(q, f, v, "lightnet", mask=Causal())
    own = gap_with_gradients(out, lightnet_sum(q, f, v), leaves)
    wild = torch.where(torch.rand_like(f) > 0.5, 200.0, -200.0).to(F64)
    truth = lightnet_sum(q, wild, v)
    own = max(own, naive.gap(attend(q, wild, v, "lightnet", mask=Causal()), truth), naive.gap(streamed("lightnet", q, wild, v), truth))
    gated = attend(F.silu(q), torch.sigmoid(f), v, "gla", log_decay=F.logsigmoid(f))
    return own, naive.gap(gated, lightnet_sum(q, f, v))


@check(
    "lightnet",
    "without a mask: permuting positions permutes the output, and it is the last causal state read by all",
    below=1e-12,
    control="GLA in both directions",
)
def _() -> tuple[float, float]:
    q, f, v = qkv(30)
    at = torch.randperm(30)
    moved = [x[:, :, at] for x in (q, f, v)]
    out = attend(q, f, v, "lightnet")
    last = attend(q[:, :, -1:], f, v, "lightnet", mask=Causal())
    gate = {"log_decay": F.logsigmoid(f)}
    both = attend(q, f, v, "gla", **gate)
    turned = attend(*moved, "gla", log_decay=F.logsigmoid(moved[1]))  # type: ignore[misc]
    own = max(naive.gap(attend(*moved, "lightnet"), out[:, :, at]), naive.gap(last, out[:, :, -1:]))  # type: ignore[misc]
    return own, naive.gap(turned, both[:, :, at])


@check("lightnet", "relative cosines on a 5 x 6 grid: moving q and k alike changes their product by", below=1e-10, control="moving k alone")
def _() -> tuple[float, float]:
    from regard.zoo.linear.lightnet import relative_cosines

    x, y, theta = torch.randn(1, 2, 1, 8, dtype=F64), torch.randn(1, 2, 1, 8, dtype=F64), torch.rand(2, 8, 2, dtype=F64)

    def product(a: tuple[int, int], b: tuple[int, int]) -> Tensor:
        one, two = (relative_cosines(z, torch.tensor([p[0] * 6 + p[1]]), theta, (5, 6)) for z, p in ((x, a), (y, b)))
        return (one * two).sum(-1)

    truth = (x * y * torch.cos(theta @ torch.tensor([2.0, -3.0], dtype=F64))[:, None]).sum(-1)
    first = product((3, 1), (1, 4))
    return max(naive.gap(first, product((2, 0), (0, 3))), naive.gap(first, truth)), naive.gap(first, product((3, 1), (2, 4)))


@check("lightnet", "padding on the left: outputs equal those without it, gradients are finite", below=1e-10, control="padding not masked")
def _() -> tuple[float, float]:
    q, f, v = qkv(30)
    keep = (torch.arange(30) >= 9)[None]
    leaves = tuple(x.clone().requires_grad_() for x in (q, f, v))
    out = attend(*leaves, "lightnet", mask=Causal() & Padding(), keep=keep)  # type: ignore[misc]
    grads = torch.autograd.grad(out.square().sum(), leaves)
    truth = attend(q[:, :, 9:], f[:, :, 9:], v[:, :, 9:], "lightnet", mask=Causal())
    bad = math.inf if not all(bool(g.isfinite().all()) for g in grads) else 0.0
    return max(bad, naive.gap(out[:, :, 9:], truth)), naive.gap(attend(q, f, v, "lightnet", mask=Causal())[:, :, 9:], truth)


@check(
    "lightnet", "mixing along the axes of a 4 x 5 grid == sums over each row and column in loops", below=1e-10, control="along rows alone"
)
def _() -> tuple[float, float]:
    layer, x = AxisMixing(6, 2, ndim=2).double(), torch.randn(2, 20, 6, dtype=F64)

    def along(axis: int, line: Tensor) -> Tensor:
        """One line (B, n, 6): every pair's coefficient, both ways."""
        found = torch.zeros_like(line)
        kernel = layer.mixers[axis].kernel(line.shape[1])  # type: ignore[operator]
        for t in range(line.shape[1]):
            for s in range(line.shape[1]):
                found[:, t] += ((kernel[0][:, t - s] if s <= t else 0) + (kernel[1][:, s - t] if s >= t else 0)) * line[:, s]
        return found

    plane = x.unflatten(1, (4, 5))
    columns = torch.stack([along(0, plane[:, :, c]) for c in range(5)], 2)
    rows = torch.stack([along(1, plane[:, r]) for r in range(4)], 1)
    out = layer(x, (4, 5))
    return naive.gap(out, (plane + columns + rows).flatten(1, 2)), naive.gap(out, (plane + rows).flatten(1, 2))


@check(
    "lightnet",
    "the layer, plain and with theta on a 2 x 5 grid == its formula by hand: scaled silu queries, norm over all heads, gate of low rank",
    below=1e-10,
    control="the norm a head",
)
def _() -> tuple[float, float]:
    x, gaps, other = torch.randn(2, 10, 16, dtype=F64), [], math.inf
    shapes: dict[str, tuple[int, ...]] = {"q.weight": (8, 16), "k.weight": (8, 16), "v.weight": (16, 16), "out.weight": (16, 16)}
    shapes |= {"gate.0.weight": (5, 16), "gate.1.weight": (16, 5), "merge_norm.weight": (16,)}
    cases: list[tuple[dict[str, Any], bool, float]] = [({}, True, 1e-5), ({"grid": (2, 5), "norm_eps": 1e-2, "short_conv": 3}, False, 1e-2)]
    for options, causal, eps in cases:
        layer = Attention(16, 2, get("lightnet", gate_rank=5, key_dim=4, **options), causal=causal)
        convs = {f"convs.{at}.weight": (width, 1, 3) for at, width in enumerate((8, 8, 16))}
        gaps.append(misshapen(layer, shapes | ({"inputs.learned.theta": (2, 4, 2), **convs} if options else {})))
        layer = drawn(layer)
        flat = [layer.q(x), layer.k(x), layer.v(x)]
        flat = [short_conv(y, c.weight) for y, c in zip(flat, layer.convs, strict=True)] if options else flat  # type: ignore[arg-type]
        q, f, v = (split(y, 2) for y in flat)
        if causal:
            o = lightnet_sum(q, f, v)
        else:  # k is a softmax over all tokens, and pairs are weighed by cosines of their distances along both axes
            at = torch.stack((torch.arange(10) // 5, torch.arange(10) % 5), -1).to(F64)
            angle = torch.einsum("hca,ija->hijc", layer.inputs.learned["theta"], at[:, None] - at)
            o = torch.einsum("bhic,bhjc,hijc->bhij", silu(q) / 2, f.softmax(2), angle.cos()) @ v
        assert layer.gate is not None
        gate = silu(layer.gate[1](layer.gate[0](x)))  # type: ignore[index, operator]
        gaps.append(naive.gap(layer(x), layer.out(rms(joined(o), eps, layer.merge_norm.weight) * gate)))  # type: ignore[arg-type]
        other = min(other, naive.gap(layer(x), layer.out(joined(rms(o, eps)) * layer.merge_norm.weight * gate)))  # type: ignore[operator]
    return max(gaps), other


@check(
    "lightnet",
    "default angles: 10000^(-2 c / D) for the axis that channel c belongs to in turn, zero for the others; the gate has rank 128",
    below=1e-6,
    control="of the next channel",
)
def _() -> tuple[float, float]:
    layer = Attention(8, 1, get("lightnet", grid=(3, 4, 5)), causal=False)
    truth = torch.zeros(9, 3, dtype=F64)
    for c in range(9):
        truth[c, c % 3] = 10000 ** (-2 * c / 8)
    theta = layer.inputs.learned["theta"][0].double()
    rank = abs(layer.gate[0].out_features - 128)  # type: ignore[index, union-attr, operator]
    return max(naive.gap(theta, truth[:8]), float(rank)), naive.gap(theta, truth[1:])


@check(
    "lightnet",
    "the model on a 3 x 4 grid == start, mixing along axes, residual attention and gated MLPs, the mean, by hand",
    below=1e-10,
    control="without the mixing along axes",
)
def _() -> tuple[float, float]:
    model, x = drawn(LightNet(3, 5, (3, 4), dim=8, heads=2, layers=2)), torch.randn(2, 12, 3, dtype=F64)
    for mixer in model.place.mixers:
        mixer.omega.data.zero_()  # type: ignore[union-attr, operator]

    def truth(placed: bool) -> Tensor:
        y = x @ model.start.weight.T + model.start.bias
        y = model.place(y, (3, 4)) if placed else y
        for n1, mixer, n2, mlp in zip(model.norms1, model.mixers, model.norms2, model.mlps, strict=True):
            y = y + mixer(rms(y, 1e-6, n1.weight))  # type: ignore[arg-type]
            z = rms(y, 1e-6, n2.weight)  # type: ignore[arg-type]
            y = y + (silu(z @ mlp.gate.weight.T) * (z @ mlp.up.weight.T)) @ mlp.down.weight.T  # type: ignore[union-attr, operator]
        return rms(y, 1e-6, model.norm.weight).mean(1) @ model.end.weight.T + model.end.bias

    norms = sum(p.numel() for name, p in model.named_parameters() if name.startswith("norm"))
    return max(abs(norms - 5.0 * 8), naive.gap(model(x), truth(True))), naive.gap(model(x), truth(False))
