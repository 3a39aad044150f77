"""Checks of nabla."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from regard.algebra import Chosen, Full, bind
from regard.algebra.permute import tiles
from regard.catalog import get
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.selected import selection_of
from regard.lab.verification import check
from regard.zoo.sparse.nabla import kept_blocks, tile_neighbours, with_docs


@check(
    "nabla",
    "kept entries equal an ascending loop, keep at least thr, and one fewer would not: rows wrong",
    below=0,
    control="a rule that keeps from above until thr",
)
def _() -> tuple[float, float]:
    p = torch.randn(50, 24, dtype=F64).mul(2).softmax(-1)
    wrong = other = 0
    for thr in (0.2, 0.5, 0.7, 0.9):
        keep = kept_blocks(p, thr)
        for row, kept in zip(p, keep, strict=True):
            total, truth = 0.0, set()
            for at in sorted(range(24), key=lambda at: float(row[at])):
                total += float(row[at])
                if total >= 1 - thr:
                    truth.add(at)
            smallest = float(row[kept].min())
            wrong += (
                set(kept.nonzero().flatten().tolist()) != truth
                or float(row[kept].sum()) < thr - 1e-12
                or float(row[kept].sum()) - smallest > thr + 1e-12
            )
            down, greedy = 0.0, set()
            for at in sorted(range(24), key=lambda at: -float(row[at])):
                if down + float(row[at]) > thr:
                    break
                down += float(row[at])
                greedy.add(at)
            other += greedy != truth
    return float(wrong), float(other)


GRID = {"grid": (4, 16, 16), "patch": 4}


@check("nabla", "thr = 1 is dense attention", below=1e-12, control="thr = 0.4")
def _() -> tuple[float, float]:
    q, k, v = (torch.randn(1, 2, 1024, 32, dtype=F64) for _ in range(3))
    truth = attend(q, k, v)
    return tuple(naive.gap(attend(q, k, v, get("nabla", thr=thr, **GRID)), truth) for thr in (1.0, 0.4))  # type: ignore[return-value]


@check("nabla", "two packed videos equal two runs", below=1e-10, control="without document ids")
def _() -> tuple[float, float]:
    q, k, v = (torch.randn(1, 2, 1024, 32, dtype=F64) for _ in range(3))
    docs = (torch.arange(1024) // 512)[None]
    settings = {"patch": 4, "thr": 0.6}
    truth = torch.cat([attend(*(x[:, :, a : a + 512] for x in (q, k, v)), get("nabla", grid=(2, 16, 16), **settings)) for a in (0, 512)], 2)
    packed, plain = (
        attend(q, k, v, get("nabla", grid=(4, 16, 16), **settings), docs=docs),
        attend(q, k, v, get("nabla", grid=(4, 16, 16), **settings)),
    )
    return naive.gap(packed, truth), naive.gap(plain, truth)


@check(
    "nabla",
    "the union with sliding tiles holds both maps, tiles by a loop over coordinates: blocks missing",
    below=0,
    control="the map alone",
)
def _() -> tuple[float, float]:
    near = tile_neighbours((4, 4, 4), (3, 1, 3))
    spots = [(t, h, w) for t in range(4) for h in range(4) for w in range(4)]
    truth = torch.tensor([[abs(a[0] - b[0]) <= 1 and a[1] == b[1] and abs(a[2] - b[2]) <= 1 for b in spots] for a in spots])
    q, k, _ = (torch.randn(1, 1, 1024, 32, dtype=F64) for _ in range(3))
    maps = [
        selection_of(Chosen(bind(with_docs, size=16, visual=1024, thr=0.4, near=tile)), q, k, Full()).keep[0, 0]
        for tile in (((4, 4, 4), (3, 1, 3)), None)
    ]
    missing = float((near != truth).sum() + (truth & ~maps[0]).sum() + (maps[1] & ~maps[0]).sum())
    return missing, float((truth & ~maps[1]).sum())


@check("nabla", "gradients of q, k, v equal those of dense attention under the token mask", below=1e-9, control="a tile fewer")
def _() -> tuple[float, float]:
    q, k, v = (torch.randn(1, 1, 256, 16, dtype=F64, requires_grad=True) for _ in range(3))
    order = tiles((1, 16, 16), (1, 4, 4))
    keep = selection_of(Chosen(bind(with_docs, size=16, visual=256, thr=0.5, near=None)), order.apply(q), order.apply(k), Full()).keep[0, 0]
    seed = torch.randn(1, 1, 256, 16, dtype=F64)

    def grads(out: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad((out * seed).sum(), (q, k, v))

    def masked(keep: Tensor) -> Tensor:
        pairs = torch.zeros(256, 256, dtype=torch.bool)
        pairs[order.order[:, None], order.order] = keep.repeat_interleave(16, 0).repeat_interleave(16, 1)
        s = (q @ k.transpose(-1, -2) / 4).masked_fill(~pairs, -math.inf)
        return s.softmax(-1) @ v

    own = grads(attend(q, k, v, get("nabla", grid=(1, 16, 16), patch=4, thr=0.5)))
    fewer = keep.clone()
    fewer[0, keep[0].nonzero()[0]] = False
    return max(naive.gap(a, b) for a, b in zip(own, grads(masked(keep)), strict=True)), max(
        naive.gap(a, b) for a, b in zip(own, grads(masked(fewer)), strict=True)
    )
