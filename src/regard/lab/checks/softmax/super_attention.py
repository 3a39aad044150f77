"""Checks of super-attention."""

from __future__ import annotations

import torch

from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.verification import check
from regard.zoo.softmax.super_attention import FrugalAttention


@check("super-attention", "parameters beyond 4, 3, 2 dim^2 and 2 dim^2 + L^2, over the four kinds", below=0.0, control="a hidden W_V")
def _() -> tuple[float, float]:
    expected = {"standard": 4 * 256, "optimised": 3 * 256, "efficient": 2 * 256, "super": 2 * 256 + 81}

    def off(hidden: int) -> int:
        layers = {kind: FrugalAttention(16, 2, kind, length=9) for kind in expected}
        return sum(abs(sum(p.numel() for p in layers[kind].parameters()) + hidden - want) for kind, want in expected.items())

    return off(0), off(256)


@check(
    "super-attention",
    "one head: optimised with W_O W_V equals standard; efficient with W_K^T W_Q equals optimised",
    below=1e-10,
    control="without collapsing the matrices",
)
def _() -> tuple[float, float]:
    x = torch.randn(2, 11, 16, dtype=F64)
    standard, optimised, efficient = (FrugalAttention(16, 1, kind).double() for kind in ("standard", "optimised", "efficient"))
    assert standard.v is not None and standard.k is not None and optimised.k is not None

    def gap(collapse: bool) -> float:
        with torch.no_grad():
            optimised.q.weight.copy_(standard.q.weight)
            optimised.k.weight.copy_(standard.k.weight)  # type: ignore[union-attr]
            optimised.out.weight.copy_(standard.out.weight @ standard.v.weight if collapse else standard.out.weight)  # type: ignore[union-attr]
            efficient.q.weight.copy_(standard.k.weight.T @ standard.q.weight if collapse else standard.q.weight)  # type: ignore[union-attr]
            efficient.out.weight.copy_(optimised.out.weight)
        return max(naive.gap(optimised(x), standard(x)), naive.gap(efficient(x), optimised(x)))

    return gap(True), gap(False)


@check(
    "super-attention",
    "super with W_A = I equals efficient; causal, steps equal the pass and nothing leaks",
    below=1e-10,
    control="W_A not lower triangular",
)
def _() -> tuple[float, float]:
    x = torch.randn(2, 11, 16, dtype=F64)
    layer = FrugalAttention(16, 2, "super", length=11, start="eye").double()
    plain = FrugalAttention(16, 2, "efficient").double()
    plain.load_state_dict(layer.state_dict(), strict=False)
    same = naive.gap(layer(x), plain(x))

    def leak(causal: bool) -> float:
        one = FrugalAttention(16, 2, "super", length=11, causal=True).double()
        mask = one.mixing
        if not causal:
            one.mixing = lambda queries, keys: one.mix[queries, :keys]  # type: ignore[method-assign, index, assignment]
        other = x.clone()
        other[:, 6:] += 1
        changed = naive.gap(one(other)[:, :6], one(x)[:, :6])
        one.mixing = mask  # type: ignore[method-assign]
        state, outs = None, []
        for t in range(11):
            out, state = one.step(x[:, t : t + 1], state)
            outs.append(out)
        return changed if not causal else max(changed, naive.gap(torch.cat(outs, 1), one(x)))

    return max(same, leak(True)), leak(False)
