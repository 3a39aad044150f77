"""Checks of l2vit."""

from __future__ import annotations

import torch

from regard.engine import weights
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64, gap_with_gradients
from regard.lab.checks.shared.weighted import qkv
from regard.lab.verification import check
from regard.nn.grid import GridAttention, LocalConcentration, WindowAttention


@check("l2vit", "== tau relu(q) relu(k)^T v / max(row sum, 100), with gradients", below=1e-10, control="without the clamp")
def _() -> tuple[float, float]:
    q, k, v = qkv(64, 16)
    tau = torch.tensor([0.3, 0.7], dtype=F64)
    leaves = q, k, v, tau = tuple(x.requires_grad_() for x in (q, k, v, tau))
    w = q.clamp_min(0) @ k.clamp_min(0).mT
    total = w.sum(-1, keepdim=True)
    out = attend(q, k, v, "l2vit", tau=tau)
    truth = tau[:, None, None] * (w / total.clamp_min(100)) @ v
    return gap_with_gradients(out, truth, leaves), naive.gap(out, tau[:, None, None] * (w / total) @ v)


@check(
    "l2vit", "row sums over tau: small scores below 1, for q x 100 at 1: the larger miss", below=1e-9, control="q x 100 with q's own sums"
)
def _() -> tuple[float, float]:
    q, k, _ = qkv(64, 16)
    q, k = q.abs() * 0.1, k.abs()
    small, large = (weights(c * q, k, "l2vit").sum(-1) * 4 for c in (1, 100))  # type: ignore[union-attr]
    true = (0.1 * (q / 0.1) @ k.mT).sum(-1) / 100
    return max(naive.gap(large, torch.ones_like(large)), naive.gap(small, true)), naive.gap(small, torch.ones_like(small))


@check("l2vit", "Jacobian between windows: zero for the window block", below=0, control="for the linear block")
def _() -> tuple[float, float]:
    x = torch.randn(1, 8, 14, 14, dtype=F64)

    def leak(layer: torch.nn.Module) -> float:
        moved = x.clone()
        moved[..., :7, :7] += 1.0
        return naive.gap(layer(moved)[..., 7:, 7:], layer(x)[..., 7:, 7:])

    return leak(WindowAttention(8, 2).double()), leak(GridAttention(8, 2, (14, 14), "l2vit").double())


@check("l2vit", "local concentration commutes with shifts, away from borders", below=1e-10, control="the shift by another pixel")
def _() -> tuple[float, float]:
    layer = LocalConcentration(4).double().eval()
    x = torch.randn(1, 4, 30, 30, dtype=F64)
    y, shifted = layer(x), layer(x.roll((1, 2), (2, 3)))
    found = [naive.gap(shifted[..., 10:20, 10:20], y.roll(by, (2, 3))[..., 10:20, 10:20]) for by in ((1, 2), (2, 1))]
    return found[0], found[1]
