"""Checks of relative convolutional attention and of dual attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...algebra import Causal
from ...algebra.pairings import Relative
from ...engine import attend
from ...nn import DualAttention, PositionalSymbols, RelationalAttention, RelativeConvMHA, RelativeSymbols
from .. import naive
from ..verification import check
from .weighted import qkv

F64 = torch.float64


def tables(reach: int, heads: int, d: int) -> dict[str, Tensor]:
    shapes = {"content": (heads, d), "table": (2 * reach, heads, d), "offset": (2 * reach, heads)}
    return {name: torch.randn(shape, dtype=F64) / 2 for name, shape in shapes.items()}


@check(
    "rcmha", "relative scores in tiles, n = 13 and n_k > n_q == gathered by i - j in loops", below=1e-12, control="gathered by i - j + 1"
)
def _() -> tuple[float, float]:
    from ...algebra import Weighted

    t = tables(40, 2, 8)
    gaps: list[float] = []
    others: list[float] = []
    for n, m in ((13, 13), (9, 31)):
        q, k, v = qkv(n, m=m)
        out = attend(q, k, v, Weighted(score=Relative(40)), mask=Causal(), **t)
        for into, shift in ((gaps, 0), (others, 1)):
            truth = torch.zeros(1, 2, n, 8, dtype=F64)
            for h in range(2):
                for i in range(n):
                    at = i + m - n
                    terms = [
                        (
                            (q[0, h, i] + t["content"][h]) @ k[0, h, j]
                            + q[0, h, i] @ t["table"][at - j + shift + 40, h]
                            + t["offset"][at - j + shift + 40, h]
                        )
                        for j in range(at + 1)
                    ]
                    truth[0, h, i] = naive.softmax(torch.stack(terms) / 8**0.5) @ v[0, h, : at + 1]
            into.append(naive.gap(out, truth))
    return max(gaps), min(others)


@check("rcmha", "delta kernel and zero tables == plain causal attention", below=1e-12, control="random kernels")
def _() -> tuple[float, float]:
    layer = RelativeConvMHA(2, 16, max_rel=32).double()
    x = torch.randn(2, 13, 16, dtype=F64)
    q, k, v = (y.unflatten(-1, (2, 8)).transpose(1, 2) for y in (layer.q(x), layer.k(x), layer.v(x)))
    truth = layer.close(attend(q, k, v, mask=Causal()), x)
    own = naive.gap(layer(x), truth)
    return own, naive.gap(random_conv(layer)(x), truth)


def random_conv(layer: RelativeConvMHA) -> RelativeConvMHA:
    for parameter in [*layer.head_convs.parameters(), *layer.inputs.parameters()]:
        nn.init.normal_(parameter, std=0.5)
    return layer


@check(
    "rcmha", "decoding == the pass, and changing token 9 changes nothing before it", below=1e-10, control="without the convolutions' state"
)
def _() -> tuple[float, float]:
    layer = random_conv(RelativeConvMHA(2, 16, max_rel=32)).double()
    x = torch.randn(1, 13, 16, dtype=F64)
    other = x.clone()
    other[:, 9] += 1
    leak = naive.gap(layer(other)[:, :9], layer(x)[:, :9])

    def gap(keep: bool) -> float:
        state, outs = None, []
        for t in range(13):
            out, state = layer.step(x[:, t : t + 1], state)
            state.conv = state.conv if keep else ()
            outs.append(out)
        return naive.gap(torch.cat(outs, 1), layer(x))

    return max(leak, gap(True)), gap(False)


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
