"""Checks of mosa."""

from __future__ import annotations

import cmath
import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from regard.lab import naive
from regard.lab.checks.shared.comparing import F64, gap_with_gradients
from regard.lab.verification import check
from regard.zoo.sparse.mosa import MoSA, dense_flops, sparse_flops


def turned(x: Tensor, at: list[int], share: float, base: float) -> Tensor:
    """Rows of x (n, D) rotated to their places: the first channels as complex numbers, half a part apart."""
    width = int(share * x.shape[1]) // 2 * 2
    half = width // 2
    rows = []
    for row, place in zip(x, at, strict=True):
        pairs = [torch.complex(row[c], row[c + half]) * cmath.exp(1j * place * base ** (-2 * c / width)) for c in range(half)]
        rows.append(torch.stack([z.real for z in pairs] + [z.imag for z in pairs] + list(row[width:])))
    return torch.stack(rows)


def head(q: Tensor, k: Tensor, v: Tensor, at: list[int], layer: MoSA, window: int | None = None) -> Tensor:
    """One head over the tokens at these places, causal by them."""
    q, k = (turned(y, at, layer.share, layer.base) for y in (q, k))
    rows = []
    for n, place in enumerate(at):
        seen = [m for m in range(n + 1) if window is None or place - at[m] < window]
        rows.append((k[seen] @ q[n] / math.sqrt(layer.head_dim)).softmax(0) @ v[seen])
    return torch.stack(rows)


def mosa_loop(layer: MoSA, x: Tensor, token_choice: bool = False) -> Tensor:
    """Each head: its k best tokens, rotary positions of the original places, causal by them, scaled and added back; then the dense heads."""
    rows = [torch.zeros_like(x[0]) for _ in x]
    for b, length in enumerate([x.shape[1]] * len(x)):
        scores = torch.sigmoid(x[b] @ layer.router.T)  # (T, E)
        told = scores.detach()
        for e in range(layer.sparse):
            best = sorted(range(layer.first, length), key=lambda t: -float(told[t, e]))[: max(2, length // layer.sparsity) - layer.first]
            taken = sorted([*best, *([0] if layer.first else [])])
            if token_choice:
                taken = [t for t in range(length) if int(told[t].argmax()) == e] or [0]
            o = head(*(x[b, taken] @ layer.qkv[n, e] for n in range(3)), taken, layer)
            rows[b] = rows[b].index_add(0, torch.tensor(taken), scores[taken, e, None] * (o @ layer.out[e]))
        if layer.dense_qkv is not None and layer.dense_out is not None:
            made = x[b] @ layer.dense_qkv.weight.T
            width, outs = layer.head_dim, []
            for e in range(layer.dense):
                q, k, v = (made[:, (3 * e + n) * width : (3 * e + n + 1) * width] for n in range(3))
                outs.append(head(q, k, v, list(range(length)), layer, layer.window))
            rows[b] = rows[b] + torch.cat(outs, 1) @ layer.dense_out.weight.T
    return torch.stack(rows)


@check("mosa", "sparsity 1 is causal multi-head attention with rows scaled by the router", below=1e-10, control="rows not scaled")
def _() -> tuple[float, float]:
    layer, x = MoSA(16, 3, head_dim=8, sparsity=1).double(), torch.randn(2, 24, 16, dtype=F64)
    at, heads = list(range(24)), range(3)
    outs = [[head(*(row @ layer.qkv[n, e] for n in range(3)), at, layer) @ layer.out[e] for e in heads] for row in x]
    r = torch.sigmoid(x @ layer.router.T)
    scaled = torch.stack([sum(r[b, :, e, None] * outs[b][e] for e in heads) for b in range(2)])  # type: ignore[arg-type]
    return naive.gap(layer(x), scaled), naive.gap(layer(x), torch.stack([sum(outs[b]) for b in range(2)]))  # type: ignore[arg-type]


@check(
    "mosa",
    "values and gradients, a sixth and a quarter of 24 tokens, of 23 with the first always, beside dense and local heads == a loop over heads",
    below=1e-10,
    control="tokens choose heads",
)
def _() -> tuple[float, float]:
    gaps = []
    cases: list[tuple[int, dict[str, Any]]] = [
        (24, {"sparse": 3, "sparsity": 4}),
        (23, {"sparse": 2, "dense": 2, "sparsity": 6, "first": True, "rope_base": 100.0}),
        (24, {"sparse": 2, "dense": 1, "sparsity": 6, "window": 5, "rope_share": 0.8}),
        (5, {"sparse": 2, "sparsity": 6, "rope_share": 0.0}),
    ]
    for length, options in cases:
        layer, x = MoSA(16, head_dim=8, **options).double(), torch.randn(2, length, 16, dtype=F64, requires_grad=True)
        gaps.append(gap_with_gradients(layer(x), mosa_loop(layer, x), (x, *layer.parameters())))
    layer, x = MoSA(16, 3, head_dim=8, sparsity=4).double(), torch.randn(2, 24, 16, dtype=F64)
    return max(gaps), naive.gap(layer(x), mosa_loop(layer, x, token_choice=True))


def decoded_by_hand(layer: MoSA, x: Tensor) -> Tensor:
    """x (T, dim): the sparse heads' rows under the rule of decoding."""
    scores, rows = torch.sigmoid(x @ layer.router.T), torch.zeros_like(x)
    for e in range(layer.sparse):
        taken: list[int] = []
        for t in range(len(x)):
            count = min(t + 1, max(2, (t + 1) // layer.sparsity))
            if t in sorted(range(t + 1), key=lambda s: -math.inf if layer.first and s == 0 else -float(scores[s, e]))[:count]:
                taken.append(t)
                o = head(*(x[taken] @ layer.qkv[n, e] for n in range(3)), taken, layer)[-1]
                rows[t] += scores[t, e] * (o @ layer.out[e])
    return rows


@check(
    "mosa",
    "decoding: a head takes a token whose score is among the top third so far (the first always), and reads those it has taken",
    below=1e-10,
    control="chosen over the whole text",
)
def _() -> tuple[float, float]:
    gaps, x = [], torch.randn(1, 14, 16, dtype=F64)
    with torch.no_grad():
        for first in (False, True):
            layer = MoSA(16, 2, 1, head_dim=8, sparsity=3, window=6, first=first).double()
            sparse = MoSA(16, 2, head_dim=8, sparsity=3, first=first).double()
            sparse.load_state_dict({name: p for name, p in layer.state_dict().items() if not name.startswith("dense")})
            local = mosa_loop(layer, x) - mosa_loop(sparse, x)
            gaps.append(naive.gap(layer.decode(x), local + decoded_by_hand(layer, x[0])))
        return max(gaps), naive.gap(layer.decode(x), mosa_loop(layer, x))


@check(
    "mosa",
    "keys held for 100 tokens: 3 heads of 12, 2 of all or of a window of 30: off 236 and 96",
    below=0,
    control="all tokens in every head",
)
def _() -> tuple[float, float]:
    found = [MoSA(16, 3, 2, head_dim=8, sparsity=8, window=window).kv_pairs(100) for window in (None, 30)]
    return abs(found[0] - 236) + abs(found[1] - 96), 5 * 100 - found[0]


@check("mosa", "rows that no head has chosen are zero: largest entry", below=0, control="chosen rows")
def _() -> tuple[float, float]:
    layer, x = MoSA(16, 2, head_dim=8, sparsity=6).double(), torch.randn(1, 24, 16, dtype=F64)
    places = layer.chosen(torch.sigmoid(torch.einsum("btd,ed->bet", x, layer.router))).flatten().unique()
    free = torch.ones(24, dtype=torch.bool)
    free[places] = False
    out = layer(x)[0].detach()
    return float(out[free].abs().max()), float(out[~free].abs().amax(-1).min())


def counted(layer: MoSA, length: int) -> int:
    """FLOP of a pass: the products torch has run, those of the attention (whose kernels it does not see) and of the router's gate beside them."""
    with FlopCounterMode(display=False) as counter:
        layer(torch.randn(1, length, layer.router.shape[1]))
    k, width = layer.taken(length), layer.head_dim
    return counter.get_total_flops() + layer.sparse * (4 * width * k**2 + width * k) + layer.dense * 4 * width * length**2


@check(
    "mosa",
    "FLOPs of a head at k = T / 8, counted as they run, over a dense head's; both equal the layer's own numbers",
    below=1 / 7,
    control="k = T / 2",
)
def _() -> tuple[float, float]:
    ratios = []
    for sparsity in (8, 2):
        alone = counted(MoSA(64, 1, head_dim=16, sparsity=sparsity), 512)
        dense = counted(MoSA(64, 1, 1, head_dim=16, sparsity=sparsity), 512) - alone
        told = sparse_flops(64, 16, 512 // sparsity, 512), dense_flops(64, 16, 512)
        ratios.append(alone / dense if told == (alone, dense) else math.inf)
    return ratios[0], ratios[1]


@check(
    "mosa",
    "first values fill (-b, b), b = dim^-1/2 of the router, (3 head_dim)^-1/2 of projections, (dim sparse)^-1/2 of the output: largest over b, off 1",
    below=0.02,
    control="bounds of nn.Linear for the projections",
)
def _() -> tuple[float, float]:
    layer = MoSA(128, 16, head_dim=32)
    bounds = ((layer.router, 128**-0.5), (layer.qkv, 96**-0.5), (layer.out, 2048**-0.5))
    return max(abs(float(p.detach().abs().max()) / b - 1) for p, b in bounds), abs(float(layer.qkv.detach().abs().max()) / 128**-0.5 - 1)
