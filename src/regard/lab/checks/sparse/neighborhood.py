"""Checks of neighborhood."""

from __future__ import annotations

import torch

from regard.algebra import Neighborhood, Weighted
from regard.algebra.permute import tiles
from regard.catalog import get
from regard.engine import merge
from regard.engine.door import attend, attend_with_stats
from regard.lab import naive
from regard.lab.checks.shared.neighborhood import brute
from regard.lab.checks.shared.selected import qkv, s_attend, spelled
from regard.lab.verification import check
from regard.zoo.sparse.neighborhood import perfect_settings, simulate


def sampled_settings(count: int = 300) -> list[tuple[int, int, int, int, bool]]:
    generator = torch.Generator().manual_seed(0)

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    found: list[tuple[int, int, int, int, bool]] = []
    while len(found) < count:
        n, dilation = pick(5, 40), pick(1, 3)
        kernel = pick(2, max(2, n // dilation))
        if kernel * dilation <= n:
            found.append((n, kernel, pick(1, kernel), dilation, bool(pick(0, 1))))
    return found


@check(
    "neighborhood",
    "masks equal a brute-force loop in 300 settings (n, kernel, stride, dilation, causal): settings that differ",
    below=0,
    control="stride ignored",
)
def _() -> tuple[float, float]:
    own = other = 0
    for n, kernel, stride, dilation, causal in sampled_settings():
        truth = brute(n, kernel, stride, dilation, causal)
        own += int(not torch.equal(spelled(Neighborhood((n,), kernel, stride, dilation, causal), n), truth))
        other += int(not torch.equal(spelled(Neighborhood((n,), kernel, 1, dilation, causal), n), truth))
    return float(own), float(other)


@check("neighborhood", "stride = kernel dividing the grid is blocked attention", below=1e-12, control="stride 1")
def _() -> tuple[float, float]:
    q, k, v = qkv(64)
    blocks = [attend(q[:, :, a : a + 8], k[:, :, a : a + 8], v[:, :, a : a + 8]) for a in range(0, 64, 8)]
    truth = torch.cat(blocks, 2)
    outs = [attend(q, k, v, get("neighborhood", shape=(64,), kernel=8, stride=stride)) for stride in (8, 1)]
    return naive.gap(outs[0], truth), naive.gap(outs[1], truth)


@check(
    "neighborhood",
    "2-D: equals dense attention under the product of two brute-force axes, kernel (5, 7), stride (2, 3)",
    below=1e-12,
    control="one window of 35 tokens in a line",
)
def _() -> tuple[float, float]:
    q, k, v = qkv(12 * 15)
    rows, columns = brute(12, 5, 2, 1, False), brute(15, 7, 3, 1, False)
    mask = (rows[:, None, :, None] & columns[None, :, None, :]).reshape(180, 180)
    truth = s_attend(q, k, v, mask.expand(2, -1, -1))
    line = attend(q, k, v, get("neighborhood", shape=(180,), kernel=35))
    return naive.gap(attend(q, k, v, get("neighborhood", shape=(12, 15), kernel=(5, 7), stride=(2, 3))), truth), naive.gap(line, truth)


def tile_pairs(stride: tuple[int, int]) -> int:
    """(query tile, key tile) pairs of 4 x 8 tiles that hold a visible pair, 24 x 32 grid, kernel (8, 16), by brute force."""
    rows, columns = brute(24, 8, stride[0], 1, False), brute(32, 16, stride[1], 1, False)
    tiles = (rows.reshape(6, 4, 6, 4).any(3).any(1), columns.reshape(4, 8, 4, 8).any(3).any(1))
    return int(tiles[0].sum()) * int(tiles[1].sum())


@check(
    "neighborhood",
    "the simulator counts visited tiles as brute force does, strides (1,1), (4,8), (8,16): difference",
    below=0,
    control="stride (1,1) for all",
)
def _() -> tuple[float, float]:
    strides = ((1, 1), (4, 8), (8, 16))
    counts = [simulate((24, 32), (8, 16), stride, (4, 8), (4, 8)).visited for stride in strides]
    truth = [tile_pairs(stride) for stride in strides]
    return float(sum(abs(a - b) for a, b in zip(counts, truth, strict=True))), float(sum(abs(counts[0] - b) for b in truth))


@check("neighborhood", "an aligned setting reaches its FLOP-wise speed-up: tile-wise over FLOP-wise", above=1.0, control="stride 1")
def _() -> tuple[float, float]:
    aligned, plain = (simulate((24, 32), (8, 16), stride, (4, 8), (4, 8)) for stride in ((8, 16), (1, 1)))
    return (aligned.tile_speedup / aligned.flop_speedup if aligned.perfect else 0.0), plain.tile_speedup / plain.flop_speedup


@check("neighborhood", "tiles laid out contiguously, run and put back equal the direct run", below=1e-12, control="not put back")
def _() -> tuple[float, float]:
    shape, tile = (8, 12), (4, 4)
    q, k, v = qkv(96)
    mechanism = get("neighborhood", shape=shape, kernel=(5, 5))
    order = tiles(shape, tile)
    mask = spelled(mechanism.mask, 96)[order.order][:, order.order]  # type: ignore[attr-defined]
    permuted = attend(*[order.apply(x) for x in (q, k, v)], "softmax", mask=mask)
    truth = attend(q, k, v, mechanism)
    identity = naive.gap(order.invert(order.apply(q)), q)
    return max(identity, naive.gap(order.invert(permuted), truth)), naive.gap(permuted, truth)


@check(
    "neighborhood",
    "extra keys at the end are visible to every query, and merge from a part of their own",
    below=1e-12,
    control="without the extra keys",
)
def _() -> tuple[float, float]:
    q, k, v = qkv(36, m=41)
    whole = attend(q, k, v, get("neighborhood", shape=(6, 6), kernel=3, extra=5))
    grid = get("neighborhood", shape=(6, 6), kernel=3)
    softmax = Weighted()
    near = attend_with_stats(q, k[:, :, :36], v[:, :, :36], grid)
    far = attend_with_stats(q, k[:, :, 36:], v[:, :, 36:], softmax)
    return naive.gap(merge(softmax, [near, far])[0], whole), naive.gap(near[0], whole)


@check(
    "neighborhood",
    "the simulator on ragged grids, causal too, and its list of perfect strides equal brute force over pairs and tiles: differences",
    below=0,
    control="the strides that are not perfect",
)
def _() -> tuple[float, float]:
    wrong = 0.0
    shape, kernel = (10, 9), (4, 3)
    for stride, q_tile, kv_tile, causal in (
        ((1, 1), (4, 2), (3, 4), False),
        ((2, 3), (4, 3), (4, 3), False),
        ((4, 2), (2, 2), (4, 4), True),
    ):
        counts, perfect = [], True
        for n, k, s, tq, tk in zip(shape, kernel, stride, q_tile, kv_tile, strict=True):
            seen = brute(n, k, s, 1, causal)
            visited = 0
            for a in range(0, n, tq):
                for b in range(0, n, tk):
                    part = seen[a : a + tq, b : b + tk]
                    visited += bool(part.any())
                    perfect &= bool(part.all()) or not bool(part.any())
            counts.append((visited, -(-n // tq) * -(-n // tk)))
        found = simulate(shape, kernel, stride, q_tile, kv_tile, causal)
        visited, total = counts[0][0] * counts[1][0], counts[0][1] * counts[1][1]
        wrong += abs(found.visited - visited) + abs(found.total - total) + (found.perfect != perfect)
        wrong += abs(found.tile_speedup - total / visited) + abs(found.flop_speedup - 90 / 12)

    def whole(stride: tuple[int, ...]) -> bool:
        axes = [brute(n, k, s, 1, False).reshape(n // t, t, n // t, t) for n, k, s, t in zip((8, 12), (4, 6), stride, (2, 3), strict=True)]
        return all(bool((x.any(3).any(1) == x.all(3).all(1)).all()) for x in axes)

    strides = [(a, b) for a in range(1, 5) for b in range(1, 7)]
    found_strides = perfect_settings((8, 12), (2, 3), (2, 3), (4, 6))
    wrong += float(set(found_strides) != {s for s in strides if whole(s)})
    return wrong, float(set(found_strides) != {s for s in strides if not whole(s)})
