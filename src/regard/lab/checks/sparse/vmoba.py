"""Checks of vmoba."""

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
from regard.zoo.sparse.vmoba import SCOPES, choose, partition, vmoba_plan


@check(
    "vmoba",
    "partitions are bijections whose blocks hold the declared tokens, grid 4 x 6 x 8: tokens out of place",
    below=0,
    control="raster blocks",
)
def _() -> tuple[float, float]:
    grid, tile = (4, 6, 8), (2, 3, 4)
    at = torch.arange(192)
    where = (at // 48, at // 8 % 6, at % 8)
    wrong = other = 0.0
    for layer in range(3):
        size = partition(grid, tile, layer)
        order = tiles(grid, size).order
        block = sum((w // t) * 100**a for a, (w, t) in enumerate(zip(where, size, strict=True)))
        assert isinstance(block, Tensor)
        for place, into in ((order, True), (at, False)):
            rows = block[place].reshape(-1, math.prod(size))
            bad = float((rows != rows[:, :1]).sum()) + float(len(place.unique()) != 192)
            wrong, other = (wrong + bad, other) if into else (wrong, other + bad)
    return wrong, other


@check("vmoba", "threshold 1 is dense attention for all three partitions and four scopes", below=1e-10, control="threshold 0.25")
def _() -> tuple[float, float]:
    q, k, v = (torch.randn(1, 2, 192, 16, dtype=F64) for _ in range(3))
    truth, gaps = attend(q, k, v), {1.0: 0.0, 0.25: 0.0}
    for threshold in gaps:
        for layer in range(3):
            for scope in SCOPES:
                mechanism = get("vmoba", grid=(4, 6, 8), tile=(2, 3, 4), layer=layer, threshold=threshold, scope=scope)
                gaps[threshold] = max(gaps[threshold], naive.gap(attend(q, k, v, mechanism), truth))
    return gaps[1.0], gaps[0.25]


def vmoba_loop(gate: Tensor, own: Tensor, scope: str, threshold: float, softmax: bool = False) -> Tensor:
    """The choice for gate (1, H, L, n), pair by pair."""
    _, heads, length, count = gate.shape
    pairs = [(h, t, c) for h in range(heads) for t in range(length) for c in range(count)]
    key = {"query_head": lambda p: (p[0], p[1]), "head_global": lambda p: p[0], "overall": lambda p: 0, "block": lambda p: p[2]}[scope]
    groups: dict[object, list[tuple[int, int, int]]] = {}
    for pair in pairs:
        groups.setdefault(key(pair), []).append(pair)
    keep = torch.zeros(gate.shape, dtype=torch.bool)
    for group in groups.values():
        value = {p: float(gate[0][p]) for p in group}
        low, high = min(value.values()), max(value.values())
        share = {p: math.exp(x - high) if softmax else (x - low) / (high - low) for p, x in value.items()}
        total = sum(share.values())
        kept = 0.0
        for p in group:
            if own[p[1], p[2]]:
                keep[0][p] = True
                kept += share[p] / total
        first = True
        for p in sorted((p for p in group if not own[p[1], p[2]]), key=lambda p: -share[p]):
            if kept >= threshold and not first:
                break
            keep[0][p], first = True, False
            kept += share[p] / total
    return keep


@check("vmoba", "chosen pairs of the four scopes equal a loop: pairs that differ", below=0, control="softmax in place of min-max")
def _() -> tuple[float, float]:
    gate = torch.randn(1, 2, 24, 6, dtype=F64)
    own = torch.arange(24)[:, None] // 4 == torch.arange(6)
    wrong = other = 0.0
    for scope in SCOPES:
        found = choose(gate, own, "threshold", 0.5, 3, scope)
        wrong += float((found != vmoba_loop(gate, own, scope, 0.5)).sum())
        other += float((found != vmoba_loop(gate, own, scope, 0.5, True)).sum())
    return wrong, other


@check("vmoba", "output and gradients equal dense attention under the chosen blocks", below=1e-9, control="own blocks alone")
def _() -> tuple[float, float]:
    q, k, v = (torch.randn(1, 2, 192, 16, dtype=F64, requires_grad=True) for _ in range(3))
    order = tiles((4, 6, 8), (2, 3, 4))
    plan = Chosen(bind(vmoba_plan, size=24, mode="threshold", threshold=0.4, top_k=3, scope="head_global"))
    keep = selection_of(plan, order.apply(q), order.apply(k), Full()).keep[0].repeat_interleave(24, -1)
    seed = torch.randn(1, 2, 192, 16, dtype=F64)

    def written(keep: Tensor) -> Tensor:
        pairs = torch.zeros(2, 192, 192, dtype=torch.bool)
        pairs[:, order.order[:, None], order.order] = keep
        return (q @ k.transpose(-1, -2) / 4).masked_fill(~pairs, -math.inf).softmax(-1) @ v

    def both(out: Tensor) -> tuple[Tensor, ...]:
        return out, *torch.autograd.grad((out * seed).sum(), (q, k, v))

    own = both(attend(q, k, v, get("vmoba", grid=(4, 6, 8), tile=(2, 3, 4), layer=2, threshold=0.4, scope="head_global")))
    alone = (torch.arange(192)[:, None] // 24 == torch.arange(192) // 24).expand(2, -1, -1)
    return tuple(max(naive.gap(a, b) for a, b in zip(own, both(written(mask)), strict=True)) for mask in (keep, alone))  # type: ignore[return-value]


@check(
    "vmoba",
    "queries times 4 get more blocks than the others in scope head_global, none in query_head: ratio",
    above=1.2,
    control="scope query_head",
)
def _() -> tuple[float, float]:
    q, k, _ = (torch.randn(1, 1, 384, 16, dtype=F64) for _ in range(3))
    q[:, :, 1::2] *= 4

    def ratio(scope: str) -> float:
        plan = Chosen(bind(vmoba_plan, size=32, mode="threshold", threshold=0.5, top_k=3, scope=scope))
        count = selection_of(plan, q, k, Full()).keep.sum(-1)[0, 0].double()
        return float(count[1::2].mean() / count[::2].mean())

    return ratio("head_global"), ratio("query_head")
