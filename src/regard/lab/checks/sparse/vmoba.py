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
from regard.lab.checks.shared.comparing import F64, gap_with_gradients
from regard.lab.checks.shared.selected import masked_softmax, selection_of
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


def vmoba_loop(
    gate: Tensor, own: Tensor, scope: str, threshold: float, softmax: bool = False, top_k: int = 0, unreached: int | None = None
) -> Tensor:
    """The choice for gate (1, H, L, n), pair by pair; top_k > 0: so many pairs a query over the scope."""
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
        room = max(1, round(top_k * len(group) / count)) - sum(bool(own[p[1], p[2]]) for p in group)
        for rank, p in enumerate(sorted((p for p in group if not own[p[1], p[2]]), key=lambda p: -share[p])):
            if rank >= room if top_k else kept >= threshold and rank if threshold < 1 else rank == unreached:
                break
            keep[0][p] = True
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
        few = choose(gate, own, "threshold", 1.0, 3, scope, 2)
        wrong += float((few != vmoba_loop(gate, own, scope, 1.0, unreached=2)).sum())
        other += float((found != vmoba_loop(gate, own, scope, 0.5, True)).sum())
    return wrong, other


def gated(q: Tensor, k: Tensor, grid: tuple[int, int, int], tile: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """(gate (1, H, L, n), block of each token (L,)), tokens in their own order: products with the mean key of each tile."""
    at = torch.arange(math.prod(grid))
    where = (at // (grid[1] * grid[2]), at // grid[2] % grid[1], at % grid[2])
    names = list(zip(*((w // t).tolist() for w, t in zip(where, tile, strict=True)), strict=True))
    block = torch.tensor([sorted(set(names)).index(name) for name in names])
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    return torch.stack([(q * k[:, :, block == n].mean(2, keepdim=True)).sum(-1) for n in range(int(block.max()) + 1)], -1), block


@check(
    "vmoba",
    "output and gradients equal softmax over the pairs of loops over tiles: three partitions, both modes, four scopes, grouped heads",
    below=1e-9,
    control="another layer's partition",
)
def _() -> tuple[float, float]:
    q, k, v = (torch.randn(1, heads, 96, 8, dtype=F64, requires_grad=True) for heads in (4, 2, 2))
    grid, tile, own = (2, 6, 8), (1, 3, 4), 0.0

    def written(layer: int, scope: str, top: int) -> Tensor:
        gate, block = gated(q.detach(), k.detach(), grid, ((1, 6, 8), (2, 3, 4), tile)[layer])
        keep = vmoba_loop(gate, block[:, None] == torch.arange(gate.shape[-1]), scope, 0.4, top_k=top)[0]
        return masked_softmax(q, k, v, keep[..., block])

    def found(layer: int, scope: str, top: int) -> Tensor:
        mode = "topk" if top else "threshold"
        return attend(q, k, v, get("vmoba", grid=grid, tile=tile, layer=layer, mode=mode, threshold=0.4, top_k=top or 3, scope=scope))

    for layer, scope, top in (
        (0, "head_global", 0),
        (1, "query_head", 0),
        (2, "overall", 0),
        (5, "block", 0),
        (1, "head_global", 2),
        (2, "query_head", 3),
    ):
        own = max(own, gap_with_gradients(found(layer, scope, top), written(layer % 3, scope, top), (q, k, v)))
    gate, block = gated(q.detach(), k.detach(), (8, 1, 12), (1, 1, 12))  # no grid: a line of blocks
    line = vmoba_loop(gate, block[:, None] == torch.arange(8), "query_head", 0.25)[0]
    own = max(own, naive.gap(attend(q, k, v, get("vmoba", tile=(1, 3, 4))), masked_softmax(q, k, v, line[..., block])))
    return own, naive.gap(found(1, "head_global", 0), written(2, "head_global", 0))


def blocks_a_query(q: Tensor, k: Tensor, scope: str) -> Tensor:
    """How many of the blocks of 24 each query reads, (L,), at threshold 0.5."""
    plan = Chosen(bind(vmoba_plan, size=24, mode="threshold", threshold=0.5, top_k=3, scope=scope))
    return selection_of(plan, q, k, Full()).keep.sum(-1)[0, 0].double()


@check(
    "vmoba",
    "every second query times 4: blocks it reads over the others', scope head_global, mean of 5 draws",
    above=1.2,
    control="scope query_head",
)
def _() -> tuple[float, float]:
    found: dict[str, list[float]] = {"head_global": [], "query_head": []}
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        q, k = (torch.randn(1, 1, 192, 16, dtype=F64, generator=generator) for _ in range(2))
        q[:, :, 1::2] *= 4
        for scope, ratios in found.items():
            count = blocks_a_query(q, k, scope)
            ratios.append(float(count[1::2].mean() / count[::2].mean()))
    own, other = (sum(ratios) / 5 for ratios in found.values())
    return own, other


@check(
    "vmoba",
    "every second query times 4, scope query_head: queries whose count of blocks changes (the range is normalised)",
    below=0,
    control="scope head_global",
)
def _() -> tuple[float, float]:
    q, k = (torch.randn(1, 1, 192, 16, dtype=F64) for _ in range(2))
    scaled = q.clone()
    scaled[:, :, 1::2] *= 4
    own, other = (float((blocks_a_query(q, k, scope) != blocks_a_query(scaled, k, scope)).sum()) for scope in ("query_head", "head_global"))
    return own, other
