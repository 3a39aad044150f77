"""Checks of ssa."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.retrieved_chunks import ssa
from regard.lab.checks.shared.selected import selection_of
from regard.lab.verification import check
from regard.zoo.sparse.ssa import alignment, block_top, captured_mass


@check("ssa", "blocks >= all: both streams are one, in outputs and in loss; 64 tokens", below=1e-12, control="2 of 8 blocks")
def _() -> tuple[float, float]:
    q, k, v = torch.randn(2, 4, 64, 8, dtype=F64), *torch.randn(2, 2, 2, 64, 8, dtype=F64)
    gaps = [ssa(count).streams(q, k, v) for count in (8, 2)]
    return tuple(naive.gap(g["sparse"], g["full"]) + float(alignment(g["full"], g["sparse"])) for g in gaps)  # type: ignore[return-value]


@check(
    "ssa",
    "the choice equals a loop over mean keys of complete blocks, shared by the heads of a group: differing blocks",
    below=0,
    control="heads that choose on their own",
)
def _() -> tuple[float, float]:
    q, k = torch.randn(1, 4, 64, 8, dtype=F64), torch.randn(1, 2, 64, 8, dtype=F64)
    found = selection_of(block_top(8, 3), q, k).keep
    wrong = [0, 0]
    for h in range(2):
        for i in range(64):
            ready = [w for w in range(8) if w * 8 + 7 <= i]
            masses = torch.zeros(2, 8, dtype=F64)
            for g in range(2 if ready else 0):
                s = torch.stack([q[0, 2 * h + g, i] @ k[0, h, w * 8 : w * 8 + 8].mean(0) for w in ready]) / math.sqrt(8)
                masses[g, ready] = s.softmax(0)
            for number, mass in enumerate((masses.sum(0), masses[0])):
                past = sorted(range(i // 8), key=lambda w: (-float(mass[w]), w))[:2]
                truth = torch.zeros(8, dtype=torch.bool)
                truth[[i // 8, *past]] = True
                wrong[number] += int((found[0, 2 * h : 2 * h + 2, i] != truth).sum())
    return float(wrong[0]), float(wrong[1])


@check(
    "ssa",
    "share of tokens in unselected blocks that the last row's loss reaches through k and v",
    above=0.99,
    control="the sparse stream alone",
)
def _() -> tuple[float, float]:
    layer = ssa()
    q, k, v = (torch.randn(1, h, 64, 8, dtype=F64, requires_grad=True) for h in (4, 2, 2))
    keep = selection_of(block_top(8, 2), q.detach(), k.detach()).keep[:, ::2, -1].repeat_interleave(8, -1)
    o = layer.streams(q, k, v)
    sparse, full = o["sparse"][:, :, -1], o["full"][:, :, -1]
    shares = []
    for loss in (sparse.square().sum() + alignment(full, sparse), sparse.square().sum()):
        grads = torch.autograd.grad(loss, (k, v), retain_graph=True)
        shares.append(min(float((g[~keep].abs().sum(-1) > 0).double().mean()) for g in grads))
    return shares[0], shares[1]


@check("ssa", "each term's gradient equals a one-sided loss written by hand", below=1e-10, control="gradient through both sides")
def _() -> tuple[float, float]:
    q, k, v = (torch.randn(1, h, 64, 8, dtype=F64, requires_grad=True) for h in (4, 2, 2))
    o = ssa().streams(q, k, v)
    full, sparse = o["full"], o["sparse"]

    def smooth(a: Tensor, b: Tensor) -> Tensor:
        d = (a - b).abs()
        return torch.where(d < 1, d * d / 2, d - 0.5).mean()

    mine = torch.autograd.grad(alignment(full, sparse), (q, k, v), retain_graph=True)
    one, two = full.detach().clone(), sparse.detach().clone()
    truth = torch.autograd.grad(smooth(full, two) + smooth(one, sparse), (q, k, v), retain_graph=True)
    both = torch.autograd.grad(2 * smooth(full, sparse), (q, k, v))
    return max(map(naive.gap, mine, truth)), min(map(naive.gap, both, truth))


@check("ssa", "|o_f - o_s| over 2 delta max |v|, the largest of 1024 rows", below=1, control="delta of a choice of 6 blocks instead")
def _() -> tuple[float, float]:
    q, k, v = torch.randn(4, 4, 64, 8, dtype=F64) * 2, *torch.randn(2, 4, 2, 64, 8, dtype=F64)
    o = ssa().streams(q, k, v)
    size = v.norm(dim=-1).amax(-1).repeat_interleave(2, 1)[..., None]
    gap = (o["full"] - o["sparse"]).norm(dim=-1)
    ratios = []
    for count in (2, 6):
        delta = 1 - captured_mass(q, k, selection_of(block_top(8, count), q, k))
        ratios.append(float((gap / (2 * delta * size).clamp_min(1e-12))[..., 24:].max()))
    return ratios[0], ratios[1]
