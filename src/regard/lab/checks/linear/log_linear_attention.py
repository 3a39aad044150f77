"""Checks of log-linear-attention."""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.algebra import Causal, Mechanism
from regard.catalog import get
from regard.engine import step
from regard.engine.door import attend
from regard.engine.recurrent import levels
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64, gap_with_gradients, streamed
from regard.lab.checks.shared.weighted import qkv
from regard.lab.verification import check


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
    control="less bit_length(t) + 1",
)
def _() -> tuple[float, float]:
    mechanism, q, k, v, inputs = spans("mamba2", 100)
    inputs["level_scales"] = torch.rand(1, 2, 100, 9, dtype=F64)
    state, own, other = None, 0, 0
    for t in range(100):
        part = {name: x[:, :, t : t + 1] for name, x in inputs.items()}
        _, state = step(q[:, :, t : t + 1], k[:, :, t : t + 1], v[:, :, t : t + 1], mechanism, state, **part)
        alive = sum(x is not None for x in state.levels)  # type: ignore[union-attr]
        own, other = max(own, abs(alive - t.bit_count() - 1)), max(other, abs(alive - t.bit_length() - 1))
    return own, other


@check("log-linear-attention", "growth of time from 2048 to 8192 tokens, a doubling", below=2.8, control="the matrix")
def _() -> tuple[float, float]:
    def cost(run: str) -> float:
        found = []
        for n in (2048, 8192):
            q, k, v = (torch.randn(1, 1, n, 32) for _ in range(3))
            inputs = {"log_decay": -0.1 * torch.rand(1, 1, n), "level_scales": torch.rand(1, 1, n, 14)}
            scan, scales = levels.prepared(get("log-linear-attention"), Causal(), q, k, v, None, inputs, 0)  # type: ignore[arg-type]
            runs = []
            for _ in range(3):
                start = time.perf_counter()
                (levels.chunked if run == "chunked" else levels.parallel)(scan, scales)
                runs.append(time.perf_counter() - start)
            found.append(min(runs))
        return (found[1] / found[0]) ** 0.5

    return cost("chunked"), cost("matrix")
