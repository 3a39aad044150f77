"""Checks of nabla."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from regard.catalog import get
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64, gap_with_gradients
from regard.lab.checks.shared.selected import masked_softmax
from regard.lab.verification import check
from regard.zoo.sparse.nabla import kept_blocks


def ascending(row: list[float], thr: float) -> set[int]:
    """Entries whose ascending cumulative sum reaches 1 - thr."""
    total, kept = 0.0, set()
    for at in sorted(range(len(row)), key=lambda at: row[at]):
        total += row[at]
        if total >= 1 - thr:
            kept.add(at)
    return kept


@check(
    "nabla",
    "kept entries equal an ascending loop, keep at least thr, and one fewer would not: rows wrong",
    below=0,
    control="a rule that keeps from above until thr",
)
def _() -> tuple[float, float]:
    p = torch.randn(50, 24, dtype=F64).mul(2).softmax(-1)
    p[0] = 1 / 24  # ties
    wrong = other = 0
    for thr in (0.2, 0.5, 0.7, 0.9):
        keep = kept_blocks(p, thr)
        for row, kept in zip(p, keep, strict=True):
            smallest = float(row[kept].min())
            wrong += (
                set(kept.nonzero().flatten().tolist()) != ascending(row.tolist(), thr)
                or float(row[kept].sum()) < thr - 1e-12
                or float(row[kept].sum()) - smallest > thr + 1e-12
            )
            down, greedy = 0.0, set()
            for at in sorted(range(24), key=lambda at: -float(row[at])):
                if down + float(row[at]) > thr:
                    break
                down += float(row[at])
                greedy.add(at)
            other += greedy != ascending(row.tolist(), thr)
    return float(wrong), float(other)


def nabla_pairs(
    q: Tensor, k: Tensor, grid: tuple[int, int, int], patch: int, thr: float,
    window: tuple[int, int, int] | None = None, docs: Tensor | None = None, text: int = 0,
) -> Tensor:  # fmt: skip
    """(H, L, L) bool: the pairs NABLA reads, tokens in their own order; patches found from coordinates, one head and block row at a time."""
    _, height, width = grid
    visual = math.prod(grid)
    spots = [(n // (height * width), n // width % height // patch, n % width // patch) for n in range(visual)]
    blocks = sorted(set(spots))
    inside = {b: [n for n in range(visual) if spots[n] == b] for b in blocks}
    pairs = torch.ones(q.shape[1], visual + text, visual + text, dtype=torch.bool)
    for h in range(q.shape[1]):
        keys = k[0, h // (q.shape[1] // k.shape[1])]
        for u in blocks:
            same = [w for w in blocks if docs is None or docs[inside[w][0]] == docs[inside[u][0]]]
            mean = q[0, h, inside[u]].mean(0)
            p = torch.stack([mean @ keys[inside[w]].mean(0) for w in same]).div(math.sqrt(q.shape[-1])).softmax(0).tolist()
            read = {same[at] for at in ascending(p, thr)} if thr < 1 else set(same)
            if window is not None:
                read |= {w for w in same if all(abs(a - b) <= size // 2 for a, b, size in zip(u, w, window, strict=True))}
            row = torch.tensor([spots[j] in read for j in range(visual)] + [True] * text)
            pairs[h, inside[u]] = row
    return pairs


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
    "output equals softmax over the pairs of a loop over patches: means, share of mass, videos, sliding tiles, text, grouped heads",
    below=1e-10,
    control="the same without sliding tiles",
)
def _() -> tuple[float, float]:
    q, k, v = 2 * torch.randn(1, 4, 261, 16, dtype=F64), *(torch.randn(1, 2, 261, 16, dtype=F64) for _ in range(2))
    grid, docs = (4, 8, 8), torch.arange(256) // 128
    own = 0.0
    for thr, window, ids in ((0.3, (3, 1, 3), None), (0.6, None, docs), (0.2, (1, 3, 1), docs)):
        for text in (5, 0):
            n = 256 + text
            part = [x[:, :, :n] for x in (q, k, v)]
            given = {} if ids is None else {"docs": torch.cat((ids, torch.full((text,), 7)))[None]}
            mechanism = get("nabla", grid=grid, patch=2, thr=thr, tile_window=window, text=text)
            truth = masked_softmax(*part, nabla_pairs(part[0], part[1], grid, 2, thr, window, ids, text))
            if ids is None or not text:  # text belongs to no video: packed grids carry none
                own = max(own, naive.gap(attend(*part, mechanism, **given), truth))
    bare = get("nabla", grid=grid, patch=2, thr=thr)
    return own, naive.gap(attend(*part, bare, docs=docs[None]), truth)


@check(
    "nabla",
    "gradients of q, k, v equal those of softmax over the loop's pairs; none through the map; a line of blocks too",
    below=1e-9,
    control="a larger share of mass",
)
def _() -> tuple[float, float]:
    q, k, v = (torch.randn(1, 1, 144, 16, dtype=F64, requires_grad=True) for _ in range(3))

    def pairs(thr: float) -> Tensor:
        return nabla_pairs(q.detach(), k.detach(), (1, 12, 12), 4, thr)

    def found(thr: float) -> Tensor:
        return attend(q, k, v, get("nabla", grid=(1, 12, 12), patch=4, thr=thr))

    own, other = (gap_with_gradients(found(thr), masked_softmax(q, k, v, pairs(0.5)), (q, k, v)) for thr in (0.5, 0.7))
    line = attend(q, k, v, get("nabla", patch=4, thr=0.5))
    truth = masked_softmax(q, k, v, nabla_pairs(q.detach(), k.detach(), (9, 4, 4), 4, 0.5))
    return max(own, naive.gap(line, truth)), other
