"""Checks of slab."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64, gap_with_gradients
from regard.lab.checks.shared.grids import around
from regard.lab.checks.shared.layers import drawn, misshapen, split
from regard.lab.checks.shared.weighted import qkv
from regard.lab.verification import check
from regard.nn.images.grid import GridAttention
from regard.zoo.linear.slab import PRepBN


@check("slab", "linear attention with gradients == the quadratic order", below=1e-10, control="eps 0.1")
def _() -> tuple[float, float]:
    leaves = q, k, v = tuple(x.requires_grad_() for x in qkv(49, 16))

    def truth(eps: float) -> Tensor:
        w = q.clamp_min(0) @ k.clamp_min(0).mT
        return w / (w.sum(-1, keepdim=True) + eps) @ v

    out = attend(q, k, v, "slab")
    return gap_with_gradients(out, truth(1e-6), leaves), naive.gap(out, truth(0.1))


def trained_norm(steps: int = 12) -> PRepBN:
    norm = PRepBN(8, steps=10, eta=0.7).double().train()
    torch.nn.init.normal_(norm.rep.norm.weight)
    torch.nn.init.normal_(norm.rep.norm.bias)
    for _ in range(steps):
        norm(2 * torch.randn(4, 9, 8, dtype=F64) + 1)
    return norm


@check("slab", "Linear(RepBN(x)) in eval == the one fused Linear", below=1e-10, control="folded without eta x")
def _() -> tuple[float, float]:
    norm, linear = trained_norm().eval(), torch.nn.Linear(8, 5).double()
    x = torch.randn(3, 9, 8, dtype=F64)
    truth, fused = linear(norm(x)), norm.fuse(linear)(x)
    c, h = norm.rep.affine()
    plain = ((c - norm.rep.eta) * x + h) @ linear.weight.T + linear.bias
    gamma, beta = norm.rep.folded()
    batch = norm.rep.norm
    assert batch.running_mean is not None and batch.running_var is not None
    one = F.batch_norm(x.flatten(0, 1), batch.running_mean, batch.running_var, gamma, beta, eps=batch.eps).view_as(x)
    bare = torch.nn.Linear(8, 5, bias=False).double()
    shapes: dict[str, tuple[int, ...]] = {f"{part}.{name}": (8,) for part in ("layer", "rep.norm") for name in ("weight", "bias")}
    gaps = [misshapen(norm, shapes | {"rep.eta": ()}), naive.gap(norm.fuse(bare)(x), norm(x) @ bare.weight.T)]
    return max(*gaps, naive.gap(fused, truth), naive.gap(one, norm(x))), naive.gap(plain, truth)


@check("slab", "training: step 0 is LayerNorm, half way the mean, after `steps` RepBN", below=1e-10, control="shares in reverse")
def _() -> tuple[float, float]:
    x = torch.randn(3, 9, 8, dtype=F64)
    gaps, others = [], []
    for step, share in ((0, 1.0), (5, 0.5), (12, 0.0)):
        norm = trained_norm(step)
        twin = copy.deepcopy(norm.rep)
        layer, rep = F.layer_norm(x, (8,)), twin(x)
        y = norm(x)
        gaps.append(naive.gap(y, share * layer + (1 - share) * rep))
        others.append(naive.gap(y, (1 - share) * layer + share * rep))
    return max(gaps), max(others)


@check(
    "slab",
    "the layer on a 5 x 6 grid == its formula by hand: positions on keys before ReLU, one convolution of v for all heads",
    below=1e-10,
    control="positions on keys after ReLU",
)
def _() -> tuple[float, float]:
    layer, x = drawn(GridAttention(16, 2, (5, 6), "slab")), torch.randn(2, 30, 16, dtype=F64)
    q, k, v = (split(y, 2) for y in layer.qkv(x).chunk(3, -1))
    assert layer.key_position is not None
    place = split(layer.key_position, 2)

    def truth(key: Tensor) -> Tensor:
        w = q.clamp_min(0) @ key.mT
        return around(layer, w / (w.sum(-1, keepdim=True) + 1e-6) @ v, v, x, shared=True)

    y = layer(x)
    return naive.gap(y, truth((k + place).clamp_min(0))), naive.gap(y, truth(k.clamp_min(0) + place))


@check(
    "slab",
    "warm-up and a start below 1: shares of LayerNorm by step; while it lasts BatchNorm's statistics stand still, then move by momentum",
    below=1e-10,
    control="a descent from the first step",
)
def _() -> tuple[float, float]:
    norm = PRepBN(8, steps=4, start=0.8, warm_up=2, eta=0.25).double().train()
    mean, own, other = torch.zeros(8, dtype=F64), [], []
    for step in range(8):
        x = torch.randn(3, 9, 8, dtype=F64) + 1
        flat = x.flatten(0, 1)
        batch = (x - flat.mean(0)) / (flat.var(0, correction=0) + 1e-5).sqrt() + 0.25 * x
        y, layer = norm(x), F.layer_norm(x, (8,))
        share = 1.0 if step < 2 else max(0.0, 0.8 * (1 - (step - 2) / 4))
        own.append(naive.gap(y, share * layer + (1 - share) * batch))
        early = max(0.0, 0.8 * (1 - step / 4))
        other.append(naive.gap(y, early * layer + (1 - early) * batch))
        mean = mean if step < 2 else 0.9 * mean + 0.1 * flat.mean(0)
        assert norm.rep.norm.running_mean is not None
        own.append(naive.gap(norm.rep.norm.running_mean, mean))
    return max(own), max(other)
