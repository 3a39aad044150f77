"""Checks of sla."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.selected import qkv
from regard.lab.planted import autoregressive
from regard.lab.verification import check
from regard.zoo.sparse.sla import SparseLinearAttention, block_classes


def three_classes(layer: SparseLinearAttention, q: Tensor, k: Tensor, v: Tensor, drop: bool = False) -> Tensor:
    """SLA token by token: critical keys by softmax, marginal ones by features; drop: no linear part."""
    feature = {"softmax": lambda x: x.softmax(-1), "elu": lambda x: F.elu(x) + 1, "relu": F.relu}[layer.feature]
    critical, marginal = block_classes(q, k, 16, layer.top, layer.bottom)
    rows = []
    for h in range(q.shape[1]):
        for i in range(q.shape[2]):
            kinds = [(critical[0, h, i // 16, j // 16], marginal[0, h, i // 16, j // 16] or layer.over == "all") for j in range(k.shape[2])]
            near, far = [j for j, (c, _) in enumerate(kinds) if c], [j for j, (_, m) in enumerate(kinds) if m]
            o = (k[0, h, near] @ q[0, h, i] / math.sqrt(q.shape[-1])).softmax(0) @ v[0, h, near] if near else torch.zeros_like(v[0, h, 0])
            linear = torch.zeros_like(o)
            if far:
                w = feature(k[0, h, far]) @ feature(q[0, h, i])
                linear = w @ v[0, h, far] / (w.sum() + (1e-5 if layer.over == "all" else 0))
            rows.append(o if drop else o + layer.linear(linear))
    return torch.stack(rows).reshape(q.shape)


@check(
    "sla",
    "output and gradients of q, k, v, W_l equal a three-class loop, both variants and three feature maps",
    below=1e-9,
    control="marginal blocks dropped",
)
def _() -> tuple[float, float]:
    own = other = 0.0
    for over, feature in (("marginal", "softmax"), ("marginal", "elu"), ("marginal", "relu"), ("all", "softmax")):
        q, k, v = (x.requires_grad_() for x in qkv(112, 16, 1))
        layer = SparseLinearAttention(16, 0.25, 0.125, block_size=16, feature=feature, over=over).double()
        torch.nn.init.normal_(layer.linear.weight)
        leaves, seed = (q, k, v, layer.linear.weight), torch.randn(1, 1, 112, 16, dtype=F64)
        out, truth = layer(q, k, v), three_classes(layer, q, k, v)
        pairs = zip(
            (out, *torch.autograd.grad((out * seed).sum(), leaves)),
            (truth, *torch.autograd.grad((truth * seed).sum(), leaves)),
            strict=True,
        )
        own = max(own, *(naive.gap(a, b) for a, b in pairs))
        other = max(other, naive.gap(out, three_classes(layer, q, k, v, True)))
    return own, other


@check(
    "sla",
    "at the start it is the sparse part; top = 1 is dense attention; top = bottom = 0 linear attention",
    below=1e-10,
    control="top = 0.25 against dense",
)
def _() -> tuple[float, float]:
    q, k, v = qkv(256, 16, 2)
    truth = attend(q, k, v)
    start = SparseLinearAttention(16, 0.25, 0.125, block_size=16).double()
    dense = SparseLinearAttention(16, 1.0, 0.0, block_size=16).double()
    linear = SparseLinearAttention(16, 0.0, 0.0, block_size=16).double()
    torch.nn.init.eye_(linear.linear.weight)
    torch.nn.init.eye_(dense.linear.weight)
    w = q.softmax(-1) @ k.softmax(-1).transpose(-1, -2)
    own = max(
        naive.gap(start(q, k, v), start.branches(q, k, v)[0]),
        naive.gap(dense(q, k, v), truth),
        naive.gap(linear(q, k, v), w / w.sum(-1, keepdim=True) @ v),
    )
    return own, naive.gap(start(q, k, v), truth)


@check(
    "sla",
    "slowly drifting tokens, W_l fitted to the dense output: error over the sparse part's, the worst of 3 seeds",
    below=0.7,
    control="the sparse part",
)
def _() -> tuple[float, float]:
    ratios, own, alone = [], [], []

    def fitted(base: Tensor, features: Tensor, truth: Tensor) -> float:
        x = F.pad(features.flatten(0, 2), (0, 1), value=1.0)
        weight = torch.linalg.lstsq(x, (truth - base).flatten(0, 2)).solution
        return float((base.flatten(0, 2) + x @ weight - truth.flatten(0, 2)).norm() / truth.norm())

    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        q, k, v = (autoregressive(256, 16, 0.9, generator)[None, None] for _ in range(3))
        q, k, v = 1.2 * q, 1.2 * k, v + 0.7
        truth = attend(q, k, v)
        sparse, linear = SparseLinearAttention(16, 0.25, 0.125, block_size=16).branches(q, k, v)
        whole = SparseLinearAttention(16, 0.0, 0.0, block_size=16).branches(q, k, v)[1]
        own.append(fitted(sparse, linear, truth))
        alone.append(fitted(torch.zeros_like(truth), whole, truth))
        ratios.append(own[-1] / float((sparse - truth).norm() / truth.norm()))
    return max(ratios) if sum(own) < sum(alone) else math.inf, 1.0
