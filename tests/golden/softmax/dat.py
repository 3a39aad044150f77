"""Dual attention: relational heads, relative symbols, symbolic attention, and the baselines RCA and DisRCA."""

from __future__ import annotations

import torch
from golden.vectors import Vectors, case
from torch import nn

from regard.nn import DualAttention, RelationalAttention, RelationalCrossAttention, RelativeSymbols, SymbolicAttention

PARTS = {"q": "wq_attn", "k": "wk_attn", "q_rel": "wq_rel", "k_rel": "wk_rel", "v": "wv"}


@case("c0")
def relational(g: Vectors) -> None:
    made = RelationalAttention(16, 4, 4, relations=2, activation=torch.tanh, causal=False, bias=True).to(g.dtype)
    g.load(made, PARTS | {"w_r": "wr"})
    leaves = g.leaves("x", "symbols")
    y = nn.functional.linear(made(leaves["x"], leaves["symbols"]), g("wo.weight"), g("wo.bias"))
    g.same(y, "out")
    g.gradients(g.weigh(y), leaves | {f"{theirs}.weight": getattr(made, ours).weight for ours, theirs in PARTS.items()} | {"wr": made.w_r})


@case("c1")
def relative(g: Vectors) -> None:
    """Interleaved rotary pairs are halves in another order of channels; symbols are counted i - j here, j - i there."""
    made = RelationalAttention(24, 4, 4, relations=4, symmetric=True, kv_heads=2, rope=True, causal=True).to(g.dtype)
    symbols = RelativeSymbols(24, max_rel=5).to(g.dtype)
    halves = torch.tensor([0, 2, 1, 3])
    rows_q, rows_k = (torch.cat([halves + 4 * h for h in range(n)]) for n in (4, 2))
    g.load(
        made, {"q.weight": g("wq_attn.weight")[rows_q], "k.weight": g("wk_attn.weight")[rows_k], "q_rel": "wq_rel", "v": "wv", "w_r": "wr"}
    )
    g.put(symbols.library, g("rel_pos_embeddings").flip(0))
    x = g.leaf("x")
    y = nn.functional.linear(made(x, symbols(10, 10), relative=True), g("wo.weight"))
    g.same(y, "out")
    g.gradients(g.weigh(y), {"x": x, "wq_rel.weight": made.q_rel.weight, "wv.weight": made.v.weight, "wr": made.w_r})
    g.weigh(y).backward()
    g.same(symbols.library.grad.flip(0), "grad_rel_pos_embeddings", g.grad)
    g.same(made.q.weight.grad, g.exact("grad_wq_attn.weight")[rows_q], g.grad)


@case("c2")
def dual(g: Vectors) -> None:
    made = DualAttention(16, 2, 2, causal=True).to(g.dtype)
    g.load(made.sensory, {ours: f"self_attention.{theirs}" for ours, theirs in (("q", "wq"), ("k", "wk"), ("v", "wv"), ("out", "wo"))})
    g.load(made.relational, {ours: f"relational_attention.{theirs}" for ours, theirs in PARTS.items()} | {"w_r": "relational_attention.wr"})
    g.load(made, {"out": "relational_attention.wo"})
    symbolic = SymbolicAttention(16, symbols=5, heads=2, bias=True).to(g.dtype)
    g.load(symbolic, {"q": "sym.q_proj", "templates": "sym.template_features", "library": "sym.symbol_library"})
    x = g.leaf("x")
    symbols = symbolic(x)
    g.same(symbols, "symbols")
    y = made(x, symbols)
    g.same(y, "out")
    g.gradients(
        g.weigh(y),
        {"x": x, "sym.q_proj.weight": symbolic.q.weight, "sym.q_proj.bias": symbolic.q.bias, "sym.symbol_library": symbolic.library},
    )
    state, outs, stored = None, [], g("symbols")
    with torch.no_grad():
        for t in range(10):
            out, state = made.step(x[:, t : t + 1], stored[:, t : t + 1], state)
            outs.append(out)
    g.same(torch.cat(outs, 1), "out")


@case("c3", "c4")
def cross_attention(g: Vectors) -> None:
    other = g.config == "c4"
    made = RelationalCrossAttention(16, 4, disentangled=other).to(g.dtype)
    g.load(made, PARTS | {"out": "wo"} if other else {"q": "wq", "k": "wk", "v": "wv", "out": "wo"})
    leaves = g.leaves("x", "symbols")
    y = made(leaves["x"], leaves["symbols"])
    g.same(y, "out")
    g.gradients(g.weigh(y), leaves)
