"""Checks of sparse-transformer."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from regard.algebra import Causal
from regard.catalog import get
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.byhand import join_heads, split_heads, standard
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.selected import masked_softmax, qkv, s_attend, spelled
from regard.lab.verification import check
from regard.zoo.sparse.sparse_transformer import SparseBlock, patterns, position_embedding


@check(
    "sparse-transformer",
    "masks equal the set definitions, n = 144, l = 12 (strided) and c = 3 (fixed): differing pairs",
    below=0,
    control="window of l keys",
)
def _() -> tuple[float, float]:
    n, stride, c = 144, 12, 3
    i, j = torch.arange(n)[:, None], torch.arange(n)
    sets = {
        "strided": ((j <= i) & (j >= i - stride), (j <= i) & ((i - j) % stride == 0)),
        "fixed": ((j <= i) & (j // stride == i // stride), (j <= i) & (j % stride >= stride - c)),
    }
    wrong = sum(
        int((spelled(mask, n) != truth).sum())
        for name, pair in sets.items()
        for mask, truth in zip(patterns(name, stride, c), pair, strict=True)
    )
    return float(wrong), float(((j <= i) & (j > i - stride) != sets["strided"][0]).sum())


@check("sparse-transformer", "two hops over A1 | A2 reach every earlier key: share of the causal triangle", above=1.0, control="A1 alone")
def _() -> tuple[float, float]:
    n, stride = 144, 12
    triangle = torch.ones(n, n, dtype=F64).tril() > 0

    def reach(mask: Tensor) -> float:
        a = mask.to(F64)
        return float((((a @ a) > 0) & triangle).sum() / triangle.sum())

    unions = [patterns(name, stride, 3) for name in ("strided", "fixed")]
    degree = max(float((spelled(a | c, n)).sum(-1).max()) for a, c in unions[:1])
    own = min(reach(spelled(a | c, n)) for a, c in unions)
    return own if degree <= 2 * stride + n / stride else 0.0, max(reach(spelled(a, n)) for a, _ in unions)


@check(
    "sparse-transformer",
    "block-sparse runs equal dense attention under the token mask, outputs and gradients, merged, heads, interleaved",
    below=1e-10,
    control="dense causal attention",
)
def _() -> tuple[float, float]:
    q, k, v = (x.requires_grad_() for x in qkv(144))
    first, second = (spelled(mask, 144) for mask in patterns("fixed", 12, 3))
    masks = {"merged": (first | second).expand(2, -1, -1), "heads": torch.stack((first, second)), "interleaved": second.expand(2, -1, -1)}
    own, other = 0.0, math.inf
    for mode, mask in masks.items():
        out = attend(q, k, v, get("sparse-transformer", stride=12, count=3, integration=mode, layer=1))
        s = (q @ k.transpose(-1, -2) / math.sqrt(8)).masked_fill(~mask, -math.inf)
        truth = torch.where(mask.any(-1, keepdim=True), s.softmax(-1).nan_to_num(0.0), 0.0) @ v
        live = mask.any(-1)[None, ..., None].to(F64)
        grads = [torch.autograd.grad((o * live).square().sum(), (q, k, v), retain_graph=True) for o in (out, s_attend(q, k, v, mask))]
        own = max(own, naive.gap(out, truth), *[naive.gap(a, c) for a, c in zip(*grads, strict=True)])
        other = min(other, naive.gap(out, attend(q, k, v, "softmax", mask=Causal())))
    return own, other


@check(
    "sparse-transformer",
    "recomputation: saved tensors over the size of the input, gradients identical",
    below=5.0,
    control="the stored path",
)
def _() -> tuple[float, float]:
    x = torch.randn(1, 96, 32, dtype=F64)
    saved: dict[bool, int] = {}
    grads = {}
    for recompute in (True, False):
        torch.manual_seed(0)
        block = SparseBlock(32, 2, get("sparse-transformer", stride=12, count=3), recompute=recompute).double()
        total = [0]

        def pack(t: Tensor, total: list[int] = total) -> Tensor:
            total[0] += t.numel() * t.element_size()
            return t

        leaf = x.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = block(leaf)
        saved[recompute] = total[0]
        grads[recompute] = torch.autograd.grad(out.square().sum(), leaf)[0]
    same = naive.gap(grads[True], grads[False])
    size = x.numel() * x.element_size()
    return saved[True] / size if same < 1e-12 else math.inf, saved[False] / size


@check(
    "sparse-transformer", "64 layers at the paper's initialisation: stream's std over the input's", below=1.5, control="without 1/sqrt(2N)"
)
def _() -> tuple[float, float]:
    def growth(layers: int) -> float:
        torch.manual_seed(0)
        x = y = torch.randn(1, 48, 32)
        with torch.no_grad():
            for _ in range(64):
                y = SparseBlock(32, 2, get("sparse-transformer", stride=8, count=2), layers=layers)(y)
        return float(y.std() / x.std())

    own = growth(64)
    return own if own >= 0.5 else math.inf, growth(1)


@check(
    "sparse-transformer",
    "a block equals a + mlp(norm(x + a)) added to x by hand, x sigmoid(1.702 x) inside; positions' embeddings and their spread",
    below=1e-9,
    control="the MLP fed without the attention",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    block, x = SparseBlock(16, 2, get("sparse-transformer", stride=6, count=2)).double(), torch.randn(2, 30, 16, dtype=F64)
    for norm in (block.norm1, block.norm2):
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
    mask = spelled(get("sparse-transformer", stride=6, count=2).mask, 30)  # type: ignore[attr-defined]
    layer = block.attention
    n = standard(x) * block.norm1.weight + block.norm1.bias
    q, k, v = (split_heads(n @ m.weight.T, 2) for m in (layer.q, layer.k, layer.v))
    a = join_heads(masked_softmax(q, k, v, mask)) @ layer.out.weight.T

    def whole(into: Tensor) -> Tensor:
        h = (standard(into) * block.norm2.weight + block.norm2.bias) @ block.mlp[0].weight.T + block.mlp[0].bias  # type: ignore[operator, union-attr]
        return x + a + h / (1 + torch.exp(-1.702 * h)) @ block.mlp[2].weight.T + block.mlp[2].bias  # type: ignore[operator, union-attr]

    rows, columns = position_embedding(900, 40, 64)
    sizes = (tuple(rows.weight.shape), tuple(columns.weight.shape)) != ((23, 64), (40, 64))  # type: ignore[arg-type]
    spread = max(abs(float(table.weight.std()) / (0.125 / 8) - 1) for table in (rows, columns))  # type: ignore[arg-type, operator]
    own = naive.gap(block(x), whole(x + a)) + sizes + (spread > 0.1)
    return own, naive.gap(block(x), whole(x))
