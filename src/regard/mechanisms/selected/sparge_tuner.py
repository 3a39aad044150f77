"""SpargeAttn's tuner: theta, tau and lambda of each head, found on calibration tensors against an error bound (Zhang et al., 2025)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...engine import attend
from .sparge import sparge, sparge_attention


@dataclass
class SpargeTuner:
    """fit(q, k, v) -> self with theta, tau and pv_lambda, one number a head; heads that gain less than `worthwhile` stay dense.

    l1, pv_l1: bounds on sum|o - o_ref| / sum|o_ref| after the choice of blocks, and after skipping products. grid: step of theta.
    """

    causal: bool = False
    l1: float = 0.07
    pv_l1: float = 0.08
    grid: float = 1 / 16
    block_q: int = 128
    block_k: int = 64
    worthwhile: float = 0.1
    theta: tuple[float, ...] = field(default=(), init=False)
    tau: tuple[float, ...] = field(default=(), init=False)
    pv_lambda: tuple[float, ...] = field(default=(), init=False)

    def fit(self, q: Tensor, k: Tensor, v: Tensor) -> SpargeTuner:
        """q (B, H, L, D), k, v (B, Hkv, L, D): a few calibration prompts."""
        share = q.shape[1] // k.shape[1]
        found = [self.fit_head(q[:, h : h + 1], *(x[:, h // share : h // share + 1] for x in (k, v))) for h in range(q.shape[1])]
        self.theta, self.tau, self.pv_lambda = (tuple(column) for column in zip(*found, strict=True))
        return self

    def fit_head(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[float, float, float]:
        truth = attend(q, k, v, sparge(1.0, 1.0, causal=self.causal))
        sizes = {"block_q": self.block_q, "block_k": self.block_k, "causal": self.causal}

        def error(out: Tensor) -> float:
            return float((out - truth).abs().sum() / truth.abs().sum())

        tried: list[tuple[float, float, float, float]] = []
        for theta in torch.arange(-1, 1 + 1e-9, self.grid).tolist():
            tau = smallest(lambda tau, theta=theta: error(attend(q, k, v, sparge(theta, tau, **sizes))) < self.l1, 0.0, 1.0, 1e-3)  # type: ignore[misc, arg-type]
            low = smallest(
                lambda low, theta=theta, tau=tau: (
                    error(  # type: ignore[misc]
                        sparge_attention(q, k, v, theta=theta, tau=tau, pv_lambda=low, **sizes).out  # type: ignore[arg-type]
                    )
                    < self.pv_l1
                ),
                0.0,
                50.0,
                0.1,
            )
            tried.append((theta, tau, low, sparge_attention(q, k, v, theta=theta, tau=tau, **sizes).qk_sparsity))  # type: ignore[arg-type]
        bins: dict[int, list[tuple[float, float, float, float]]] = {}
        for one in tried:
            bins.setdefault(int((one[0] + 1) // (2 / 16)), []).append(one)
        best = max(bins.values(), key=lambda group: sum(one[3] for one in group))
        if sum(one[3] for one in best) / len(best) <= self.worthwhile:
            return 1.0, 1.0, 50.0
        return max(x[0] for x in best), max(x[1] for x in best), max(x[2] for x in best)


def smallest(good: Callable[[float], bool], low: float, high: float, step: float) -> float:
    """The least value (to `step`) that is good, where larger values are better; `high` when none is."""
    while high - low > step:
        middle = (low + high) / 2
        low, high = (low, middle) if good(middle) else (middle, high)
    return high
