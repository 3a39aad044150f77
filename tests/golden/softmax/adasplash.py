"""AdaSplash: attention with skipped tiles, packed by lengths, and the trace of Halley's method."""

from __future__ import annotations

import torch
from golden.vectors import Vectors, case, streamed

import regard
from regard.algebra.thresholds import halley
from regard.zoo.softmax.adasplash import entmax_halley


@case("c0", "c1", "c2", "c3", "c4")
def attention(g: Vectors) -> None:
    hyper, length = g.meta["hyper"], g("q").shape[2]
    key = f"_{g.config}"
    alpha, causal, lengths = hyper["alphas"][int(g.config[1:])], hyper["causal"][key], hyper["varlen"].get(key)
    seen = torch.ones(length, length, dtype=torch.bool)
    seen = seen.tril() if causal else seen
    if lengths:  # rows of padding are empty: they give zeros
        keep = torch.arange(length) < torch.tensor(lengths)[:, None]
        seen = seen & keep[:, None, :, None] & keep[:, None, None]
    for block in (64, 8):
        g.op(lambda q, k, v, block=block: regard.attend(q, k, v, regard.get("adasplash", alpha=alpha, block_size=block), mask=seen))
    if causal and not lengths:
        out, _ = streamed(lambda q, k, v, s: regard.step(q, k, v, regard.get("adasplash", alpha=alpha), s), *(g(name) for name in "qkv"))
        g.same(out, "out")


@case("c5", dtypes=[torch.float64])
def thresholds(g: Vectors) -> None:
    rows = g("rows")
    for a in ("1.333", "1.5", "2.0"):
        trace = torch.stack([halley(rows, torch.ones_like(rows, dtype=torch.bool), float(a), it)[:, 0] for it in range(1, 9)], 1)
        g.same(trace, f"halley_tau_a{a}")
        g.same(trace[:, -1], f"tau_exact_a{a}")
        want = ((float(a) - 1) * rows - g(f"tau_exact_a{a}")[:, None]).clamp_min(0) ** (1 / (float(a) - 1))
        g.same(entmax_halley(rows, float(a), 8), want)
