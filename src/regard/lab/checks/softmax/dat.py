"""Checks of dat."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.verification import check
from regard.nn.symbols import PositionalSymbols, RelativeSymbols
from regard.zoo.softmax.dat import DualAttention, RelationalAttention


def relational_loops(layer: RelationalAttention, x: Tensor, symbols: Tensor, related: bool = True) -> Tensor:
    """Heads, queries, keys and relations in loops. symbols (B, L, dim) of tokens or (L, L, dim) of pairs."""
    b, n, _ = x.shape
    d, r, group = layer.width, layer.relation_dim, layer.heads // layer.kv_heads
    k_rel = layer.q_rel if layer.k_rel is None else layer.k_rel
    out = torch.zeros(b, n, layer.heads * d, dtype=F64)
    for batch in range(b):
        q, k, qr, kr = layer.q(x[batch]), layer.k(x[batch]), layer.q_rel(x[batch]), k_rel(x[batch])
        for h in range(layer.heads):
            g = h // group
            for i in range(n):
                s = torch.stack([q[i, h * d : (h + 1) * d] @ k[j, g * d : (g + 1) * d] / d**0.5 for j in range(i + 1)])
                alpha = naive.softmax(s)
                total = torch.zeros(d, dtype=F64)
                for j in range(i + 1):
                    rel = torch.stack([qr[i, p * r : (p + 1) * r] @ kr[j, p * r : (p + 1) * r] / r**0.5 for p in range(layer.relations)])
                    rel = rel if layer.activation is None else layer.activation(rel)
                    symbol = symbols[i, j] if symbols.shape[0] == n else symbols[batch, j]
                    total = total + alpha[j] * (layer.w_r[h] @ rel * related + layer.v(symbol)[g * d : (g + 1) * d])
                out[batch, i, h * d : (h + 1) * d] = total
    return out


@check(
    "dat",
    "relational heads, grouped, causal: symbols of tokens, of relative positions and under an activation == loops",
    below=1e-10,
    control="without relations",
)
def _() -> tuple[float, float]:
    x, symbols = torch.randn(2, 7, 16, dtype=F64), torch.randn(2, 7, 16, dtype=F64)
    own, other = [], []
    for activation in (None, torch.tanh):
        layer = RelationalAttention(16, 4, 4, relations=2, kv_heads=2, activation=activation).double()
        own.append(naive.gap(layer(x, symbols), relational_loops(layer, x, symbols)))
        other.append(naive.gap(layer(x, symbols), relational_loops(layer, x, symbols, False)))
    pairs = RelativeSymbols(16, 3).double()(7, 7)
    own.append(naive.gap(layer(x, pairs, relative=True), relational_loops(layer, x, pairs)))
    return max(own), min(other)


@check(
    "dat",
    "a common null vector u of the score projections: adding 5 u to a token leaves relational heads unchanged",
    below=1e-12,
    control="sensory heads",
)
def _() -> tuple[float, float]:
    layer = DualAttention(16, 2, 2).double()
    u = torch.nn.functional.normalize(torch.randn(16, dtype=F64), dim=0)
    related = layer.relational
    with torch.no_grad():
        for one in (related.q, related.k, related.q_rel, related.k_rel, layer.sensory.q, layer.sensory.k):
            assert one is not None
            one.weight -= torch.outer(one.weight @ u, u)
    symbols = PositionalSymbols(16).double()(9)
    x = torch.randn(1, 9, 16, dtype=F64)
    other = x.clone()
    other[:, 4] += 5 * u
    change = (layer(other, symbols) - layer(x, symbols)).abs()
    return float(change[..., 8:].max().detach()), float(change[..., :8].max().detach())


@check("dat", "token-by-token decoding == prefill, with RoPE", below=1e-10, control="symbols of the wrong positions")
def _() -> tuple[float, float]:
    layer, library = DualAttention(16, 2, 2, rope=True).double(), PositionalSymbols(16).double()
    x = torch.randn(2, 9, 16, dtype=F64)
    whole = layer(x, library(9))

    def gap(shift: int) -> float:
        state, outs = None, []
        for t in range(9):
            out, state = layer.step(x[:, t : t + 1], library(1, t + shift), state)
            outs.append(out)
        return naive.gap(torch.cat(outs, 1), whole)

    return gap(0), gap(1)
