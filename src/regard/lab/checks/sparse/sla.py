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
from regard.zoo.sparse.sla import SparseLinearAttention


def classes(q: Tensor, k: Tensor, size: int, top: float, bottom: float) -> list[tuple[set[int], set[int]]]:
    """(critical, marginal) key blocks of each query block of one head, q and k (L, D): ranks of pooled q times pooled k less its mean."""
    blocks = [range(a, min(a + size, len(q))) for a in range(0, len(q), size)]
    centred, found = k - k.mean(0), []
    for rows in blocks:
        scores = [float(q[list(rows)].mean(0) @ centred[list(columns)].mean(0)) for columns in blocks]
        order = sorted(range(len(blocks)), key=lambda w: -scores[w])
        critical = order[: max(1, int(top * len(blocks)))]
        found.append((set(critical), set(order[len(critical) : len(blocks) - int(bottom * len(blocks))])))
    return found


def three_classes(layer: SparseLinearAttention, q: Tensor, k: Tensor, v: Tensor, drop: bool = False) -> Tensor:
    """SLA token by token: critical keys by softmax, marginal ones by features; drop: no linear part."""
    feature = {"softmax": lambda x: x.softmax(-1), "elu": lambda x: F.elu(x) + 1, "relu": F.relu}[layer.feature]
    rows, size = [], layer.block_size
    for h in range(q.shape[1]):
        kinds = classes(q[0, h].detach(), k[0, h].detach(), size, layer.top, layer.bottom)
        for i in range(q.shape[2]):
            critical, marginal = kinds[i // size]
            near = [j for j in range(k.shape[2]) if j // size in critical]
            far = [j for j in range(k.shape[2]) if j // size in marginal or layer.over == "all"]
            o = (k[0, h, near] @ q[0, h, i] / math.sqrt(q.shape[-1])).softmax(0) @ v[0, h, near] if near else torch.zeros_like(v[0, h, 0])
            linear = torch.zeros_like(o)
            if far:
                w = feature(k[0, h, far]) @ feature(q[0, h, i])
                linear = w @ v[0, h, far] / (w.sum() + (1e-5 if layer.over == "all" else 0))
            rows.append(o if drop else o + layer.linear(linear))
    return torch.stack(rows).reshape(q.shape)


@check(
    "sla",
    "output and gradients of q, k, v, W_l equal a loop that ranks pooled blocks itself, both variants and three feature maps, ragged",
    below=1e-9,
    control="marginal blocks dropped",
)
def _() -> tuple[float, float]:
    own = other = 0.0
    for over, feature in (("marginal", "softmax"), ("marginal", "elu"), ("marginal", "relu"), ("all", "softmax")):
        q, k, v = qkv(125, 16, 1)
        q, k, v = (x.requires_grad_() for x in (2 * q + torch.randn(16, dtype=F64), 2 * k + 3 * torch.randn(16, dtype=F64), v))
        layer = SparseLinearAttention(16, 0.25, 0.125, block_size=8, feature=feature, over=over).double()
        torch.nn.init.normal_(layer.linear.weight)
        torch.nn.init.normal_(layer.linear.bias)
        leaves, seed = (q, k, v, layer.linear.weight, layer.linear.bias), torch.randn(1, 1, 125, 16, dtype=F64)
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
        naive.gap(start(q, k, v), three_classes(start, q, k, v, True)),
        naive.gap(dense(q, k, v), truth),
        naive.gap(linear(q, k, v), w / w.sum(-1, keepdim=True) @ v),
    )
    return own, naive.gap(start(q, k, v), truth)


@check(
    "sla",
    "slowly drifting tokens, W_l fitted to the dense output: error over the sparse part's, the worst of 3 seeds, and 0.7 of that over linear alone",
    below=0.7,
    control="no marginal blocks, b_l alone fitted",
)
def _() -> tuple[float, float]:
    ratios, plain, own, alone = [], [], [], []

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
        base = float((sparse - truth).norm() / truth.norm())
        nothing = SparseLinearAttention(16, 0.25, 0.75, block_size=16).branches(q, k, v)[1]
        ratios.append(own[-1] / base)
        plain.append(fitted(sparse, nothing, truth) / base)
    return max(*ratios, 0.7 * sum(own) / sum(alone)), max(*plain, 0.7 * sum(own) / sum(alone))
