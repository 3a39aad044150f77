"""Checks of lightnet."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.algebra import Causal, Padding
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64, gap_with_gradients, streamed
from regard.lab.checks.shared.weighted import qkv
from regard.lab.verification import check
from regard.zoo.linear.lightnet import AxisMixing


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
