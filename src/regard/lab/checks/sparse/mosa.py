"""Checks of mosa."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from regard.algebra import Causal
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.verification import check
from regard.zoo.sparse.mosa import MoSA, dense_flops, rotate_part, sparse_flops


def mosa_loop(layer: MoSA, x: Tensor, token_choice: bool = False) -> Tensor:
    """Each head: its k best tokens, rotary positions of the original places, causal by them, scaled and added back."""
    out = torch.zeros_like(x)
    for b in range(x.shape[0]):
        scores = torch.sigmoid(x[b] @ layer.router.T)  # (T, E)
        for e in range(layer.sparse):
            taken = sorted(scores[:, e].topk(layer.taken(x.shape[1])).indices.tolist())
            if token_choice:
                taken = [t for t in range(x.shape[1]) if int(scores[t].argmax()) == e] or [0]
            at = torch.tensor(taken)
            q, k, v = (x[b, at] @ layer.qkv[n, e] for n in range(3))
            q, k = rotate_part(q, at, 0.5), rotate_part(k, at, 0.5)
            for n, t in enumerate(taken):
                p = (k[: n + 1] @ q[n] / math.sqrt(layer.head_dim)).softmax(0)
                out = out.index_put((torch.tensor(b), torch.tensor(t)), scores[t, e] * (p @ v[: n + 1]) @ layer.out[e], accumulate=True)
    return out


@check("mosa", "sparsity 1 is causal multi-head attention with rows scaled by the router", below=1e-10, control="rows not scaled")
def _() -> tuple[float, float]:
    layer, x = MoSA(16, 3, head_dim=8, sparsity=1).double(), torch.randn(2, 24, 16, dtype=F64)
    q, k, v = (torch.einsum("btd,edh->beth", x, w) for w in layer.qkv)
    at = torch.arange(24)
    o = attend(rotate_part(q, at, 0.5), rotate_part(k, at, 0.5), v, mask=Causal())
    r = torch.sigmoid(x @ layer.router.T).transpose(1, 2)[..., None]
    outs = [torch.einsum("beth,ehd->btd", y, layer.out) for y in (r * o, o)]
    return naive.gap(layer(x), outs[0]), naive.gap(layer(x), outs[1])


@check("mosa", "T = 24, k = 6: equals a loop over heads, with the router's gradient", below=1e-10, control="tokens choose heads")
def _() -> tuple[float, float]:
    layer, x = MoSA(16, 3, head_dim=8, sparsity=4).double(), torch.randn(2, 24, 16, dtype=F64)
    out, truth, seed = layer(x), mosa_loop(layer, x), torch.randn(2, 24, 16, dtype=F64)
    grads = [torch.autograd.grad((y * seed).sum(), (layer.router, layer.qkv, layer.out)) for y in (out, truth)]
    return max(naive.gap(out, truth), *(naive.gap(a, b) for a, b in zip(*grads, strict=True))), naive.gap(out, mosa_loop(layer, x, True))


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
