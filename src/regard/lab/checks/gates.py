"""Checks of ReGLA and LightNet."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ...algebra import Causal, Padding
from ...catalog import get
from ...engine import attend
from ...mechanisms.recurrent.regla import refined, safe_query
from ...nn import AxisMixing
from .. import naive
from ..verification import check
from .comparing import F64, gap_with_gradients, streamed
from .weighted import qkv


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
    from ...mechanisms.recurrent.lightnet import relative_cosines

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
