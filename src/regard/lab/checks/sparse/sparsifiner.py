"""Checks of sparsifiner."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from regard.lab import naive
from regard.lab.checks.shared.byhand import join_heads, split_heads
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.selected import masked_softmax
from regard.lab.verification import check
from regard.zoo.sparse.sparsifiner import SparsifinerAttention, distillation, mhsa_flops, prune_tokens


def predicted(layer: SparsifinerAttention, q: Tensor, k: Tensor, thresholds: bool = True) -> Tensor:
    """The estimate (B, H, N - 1 or N, N) of one row of attention after the other."""
    basis = layer.up.abs() if thresholds else layer.up  # (N, r)
    basis = torch.where(basis > layer.basis_threshold, basis, 0.0) if thresholds else basis
    small_q = q @ layer.reduce_q.weight.T + layer.reduce_q.bias
    down = torch.einsum("bhnc,nr->bhrc", k @ layer.reduce_k.weight.T + layer.reduce_k.bias, layer.down)
    rows = []
    for i in range(1 if layer.exclude_class else 0, q.shape[2]):
        c = (torch.einsum("bhc,bhrc->bhr", small_q[:, :, i], down) * layer.heads**-0.5).softmax(-1)
        if thresholds and layer.coefficient_top:
            c = torch.where(c >= c.sort(-1, descending=True).values[..., layer.coefficient_top - 1, None], c, 0.0)
        c = torch.where(c >= layer.coefficient_threshold, c, 0.0) if thresholds else c
        rows.append(torch.einsum("bhr,nr->bhn", c, basis))
    return torch.stack(rows, 2)


def sparsified(layer: SparsifinerAttention, x: Tensor) -> tuple[Tensor, Tensor]:
    """(output, mask) of the layer from its weights: each row's ceil(keep N) largest estimates, or those above the threshold."""
    n = x.shape[1]
    q, k, v = (split_heads(y, layer.heads) for y in layer.qkv(x).chunk(3, -1))
    mask = torch.ones(*q.shape[:3], n, dtype=torch.bool)
    for at, row in enumerate(predicted(layer, q, k).unbind(2), int(layer.exclude_class)):
        if layer.estimate_threshold is None:
            best = row.argsort(-1, descending=True)[..., : math.ceil(layer.keep * n)]
            mask[:, :, at] = (best[..., None, :] == torch.arange(n)[:, None]).any(-1)
        else:
            mask[:, :, at] = row > layer.estimate_threshold
    return layer.out(join_heads(masked_softmax(q, k, v, mask))), mask


SPARSIFIED: tuple[dict[str, Any], ...] = (
    {"keep": 0.25}, {"keep": 0.3, "coefficient_top": 3, "basis_threshold": 0.05}, {"keep": 1.0},
    {"estimate_threshold": 0.02, "coefficient_threshold": 0.1}, {"keep": 0.2, "exclude_class": False, "reduction": 4, "rank": 5},
)  # fmt: skip


@check(
    "sparsifiner",
    "the layer equals its formula by hand, estimate, mask and output: |P_up|, thresholds, shares, class row; and fetching kept keys equals masking",
    below=1e-10,
    control="dense attention (the mask not used)",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    x, own = torch.randn(2, 33, 32, dtype=F64), 0.0
    for options in SPARSIFIED:
        layer = SparsifinerAttention(32, 4, 33, **options).double()
        out = layer(x)
        q, k, _ = (split_heads(y, 4) for y in layer.qkv(x).chunk(3, -1))
        truth, mask = sparsified(layer, x)
        layer.gather = True
        own = max(own, naive.gap(out, truth), naive.gap(layer.estimate, predicted(layer, q, k)), naive.gap(layer(x), truth))
        own += float((layer.mask != mask).sum())
        if options.get("keep", 1.0) < 1:
            counts = mask.sum(-1)[..., int(layer.exclude_class) :]
            own += float((counts != math.ceil(options["keep"] * 33)).sum())
    layer.sparse = False
    return own, naive.gap(layer(x), truth)


@check(
    "sparsifiner",
    "losses by hand: reconstruction with the signed P_up and no thresholds; KL of the teacher's classes to the student's and tokens' squares",
    below=1e-10,
    control="reconstruction from the thresholded estimate",
)
def _() -> tuple[float, float]:
    layer = SparsifinerAttention(32, 4, 17, coefficient_threshold=0.2).double()
    q, k, _ = layer.split(torch.randn(2, 17, 32, dtype=F64))
    teacher = torch.rand(2, 4, 16, 17, dtype=F64).softmax(-1)
    off = [(predicted(layer, q, k, flag) - teacher).detach().square().sum() for flag in (False, True)]
    found = layer.reconstruction(q, k, teacher).detach()
    student, master = torch.randn(5, 7, dtype=F64), torch.randn(5, 7, dtype=F64)
    tokens = torch.randn(2, 5, 3, 4, dtype=F64)
    p, s = (y.softmax(-1).tolist() for y in (master, student))
    kl = sum(a * math.log(a / b) for row, other in zip(p, s, strict=True) for a, b in zip(row, other, strict=True)) / 5
    loss = kl + float(((tokens[0] - tokens[1]) ** 2).sum()) / 60
    return max(float(abs(found - off[0])), abs(float(distillation(student, master, tokens[0], tokens[1])) - loss)), float(
        abs(found - off[1])
    )


@check(
    "sparsifiner",
    "tokens pruned by the class token's attention equal a loop, and rows of pruned tokens neither read nor are read; FLOPs as torch counts them",
    below=1e-10,
    control="attention of the first token after it",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    x, attention = torch.randn(2, 20, 6, dtype=F64), torch.rand(2, 3, 20, 20, dtype=F64)

    def loop(row: int) -> Tensor:
        outs = []
        for b in range(2):
            mass = [float(sum(attention[b, h, row, j] for h in range(3))) for j in range(20)]
            best = sorted(sorted(range(1, 20), key=lambda j: -mass[j])[: math.ceil(0.4 * 19)])
            outs.append(x[b, [0, *best]])
        return torch.stack(outs)

    found = prune_tokens(x, attention, 0.4)
    layer, y = SparsifinerAttention(32, 4, 33).double(), torch.randn(1, 33, 32, dtype=F64)
    left = torch.rand(1, 32) < 0.6
    layer(y, left)
    gone = (~left[0]).nonzero().squeeze(-1) + 1
    leak = float(layer.mask[0][:, 1:][:, :, gone].sum() + layer.mask[0][:, gone].sum())

    q, k = (torch.randn(1, 4, 32, 8) for _ in range(2))
    small = SparsifinerAttention(32, 4, 32, rank=4, exclude_class=False)
    with FlopCounterMode(display=False) as counter:
        (small.reduce_q(q) @ (small.reduce_k(k).transpose(-1, -2) @ small.down)).softmax(-1) @ small.up.T
    ran = counter.get_total_flops() - 2 * (2 * 4 * 32 * 8 * 4)  # less the two maps of channels
    told = mhsa_flops(32, 32, 4, 0.25, 4) - 2 * 2 * 8 * 32 * 32
    dense = mhsa_flops(32, 32, 4, None) - 2 * (4 * 32 * 32 * 8) * 2
    return naive.gap(found, loop(0)) + leak + abs(ran - told) + abs(dense), naive.gap(found, loop(1))


@check(
    "sparsifiner",
    "a predictor trained by reconstruction: mass of its top 17 over the teacher's own, new samples",
    above=0.95,
    control="one fixed mask for all inputs",
)
def _() -> tuple[float, float]:
    torch.manual_seed(0)
    directions, place = torch.randn(6, 16), torch.randn(65, 16)
    mixtures = torch.zeros(6, 65)
    for row in mixtures:
        row[torch.randperm(65)[:12]] = 1 / 12

    def sample(count: int) -> tuple[Tensor, Tensor]:
        content = torch.randn(count, 65, 16)
        weights = (4 * content @ directions.T / 4).softmax(-1)
        return torch.cat((content, place.expand(count, -1, -1)), -1)[:, None], (0.95 * weights @ mixtures + 0.05 / 65)[:, None]

    layer = SparsifinerAttention(32, 1, 65, rank=8, exclude_class=False)
    parameters = [layer.reduce_q.weight, layer.reduce_k.weight, layer.down, layer.up]
    step = torch.optim.Adam(parameters, lr=3e-2)
    for _ in range(600):
        x, teacher = sample(32)
        loss = layer.reconstruction(x, x, teacher)
        step.zero_grad()
        loss.backward()
        step.step()
    x, teacher = sample(64)
    oracle = teacher.topk(17, -1).values.sum()
    chosen = layer.predict(x, x).topk(17, -1).indices
    fixed = sample(256)[1].mean(0, keepdim=True).topk(17, -1).indices.expand_as(chosen)
    return tuple(float(teacher.gather(-1, at).sum() / oracle) for at in (chosen, fixed))  # type: ignore[return-value]
