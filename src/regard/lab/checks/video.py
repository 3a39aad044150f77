"""Checks of block policies on video-shaped tokens: PSA, DraftAttention, NABLA, VMoBA."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...algebra import Causal, Chosen, Full, bind
from ...algebra.permute import tiles
from ...catalog import get
from ...engine import attend
from ...mechanisms.selected.draft import draft_plan
from ...mechanisms.selected.nabla import kept_blocks, tile_neighbours, with_docs
from ...mechanisms.selected.psa import MASSES, RANKS, levels_of
from ...mechanisms.selected.vmoba import SCOPES, choose, partition, vmoba_plan
from .. import naive
from ..planted import autoregressive, relative_error
from ..verification import check
from .selected import qkv, s_attend, selection_of

F64 = torch.float64


@check("psa", "a map of level 1 everywhere is dense attention, and causal too", below=1e-12, control="level 2")
def _() -> tuple[float, float]:
    q, k, v = qkv(128)
    own, other = (
        naive.gap(attend(q, k, v, get("psa", block_size=16), levels=torch.full((1, 2, 8, 8), level)), attend(q, k, v)) for level in (1, 2)
    )
    causal = attend(q, k, v, get("psa", block_size=16, causal=True), levels=torch.ones(1, 2, 8, 8, dtype=torch.long).tril())
    return max(own, naive.gap(causal, attend(q, k, v, mask=Causal()))), other


@check("psa", "keys and values constant in groups of 8: random levels give the dense output", below=1e-12, control="without log p")
def _() -> tuple[float, float]:
    q, k, v = qkv(128)
    k, v = (x[:, :, ::8].repeat_interleave(8, 2) for x in (2 * k, v))
    levels = torch.tensor([1, 2, 4, 8])[torch.randint(4, (1, 2, 8, 8))]
    truth = attend(q, k, v)

    def without() -> Tensor:
        rows = []
        for u in range(8):
            keys = torch.cat([k[0, 0, w * 16 : w * 16 + 16 : int(levels[0, 0, u, w])] for w in range(8)])
            values = torch.cat([v[0, 0, w * 16 : w * 16 + 16 : int(levels[0, 0, u, w])] for w in range(8)])
            rows.append((q[0, 0, u * 16 : u * 16 + 16] @ keys.T / math.sqrt(8)).softmax(-1) @ values)
        return torch.cat(rows)

    return naive.gap(attend(q, k, v, get("psa", block_size=16), levels=levels), truth), naive.gap(without(), truth[0, 0])


@check(
    "psa",
    "random levels with 0 equal an explicit concatenation of pooled tokens, with gradients",
    below=1e-10,
    control="skipped blocks read at level 8",
)
def _() -> tuple[float, float]:
    q, k, v = (x.requires_grad_() for x in qkv(96))
    levels = torch.tensor([0, 1, 2, 4, 8])[torch.randint(5, (1, 2, 6, 6))]
    levels[..., 0] = 1

    def written(levels: Tensor) -> Tensor:
        heads = []
        for h in range(2):
            rows = []
            for u in range(6):
                ks, vs, extra = [], [], []
                for w in range(6):
                    p = int(levels[0, h, u, w])
                    if p:
                        block = slice(w * 16, w * 16 + 16)
                        ks.append(k[0, h, block].reshape(-1, p, 8).mean(1))
                        vs.append(v[0, h, block].reshape(-1, p, 8).mean(1))
                        extra += [math.log(p)] * (16 // p)
                s = q[0, h, u * 16 : u * 16 + 16] @ torch.cat(ks).T / math.sqrt(8) + torch.tensor(extra, dtype=F64)
                rows.append(s.softmax(-1) @ torch.cat(vs))
            heads.append(torch.cat(rows))
        return torch.stack(heads)[None]

    out = attend(q, k, v, get("psa", block_size=16), levels=levels)
    truth, seed = written(levels), torch.randn(1, 2, 96, 8, dtype=F64)
    pairs = zip(
        (out, *torch.autograd.grad((out * seed).sum(), (q, k, v))),
        (truth, *torch.autograd.grad((truth * seed).sum(), (q, k, v))),
        strict=True,
    )
    return max(naive.gap(a, b) for a, b in pairs), naive.gap(out, written(torch.where(levels == 0, 8, levels)))


@check(
    "psa",
    "slowly drifting tokens at the cost of 5 of 16 blocks: relative error over that of the best 5 blocks alone",
    below=0.5,
    control="the best 5 blocks",
)
def _() -> tuple[float, float]:
    own, binary = [], []
    ranges = ((1, 2 / 16), (2, 4 / 16), (4, 8 / 16), (8, 1.0))
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        q, k, v = (autoregressive(512, 16, 0.97, generator)[None, None] for _ in range(3))
        truth = attend(q, k, v)
        own.append(relative_error(attend(q, k, v, get("psa", block_size=32, sample=8, ranges=ranges)), truth))
        binary.append(relative_error(attend(q, k, v, get("psa", block_size=32, sample=8, ranges=((1, 5 / 16),))), truth))
    return sum(own) / sum(binary), 1.0


@check(
    "psa",
    "both modes give every pair one level, by rank shares and by cumulative mass of a loop: pairs that differ",
    below=0,
    control="the other mode",
)
def _() -> tuple[float, float]:
    scores = torch.rand(1, 1, 20, 20, dtype=F64)

    def loop(mode: str) -> Tensor:
        level = torch.zeros(20, 20, dtype=torch.long)
        for u in range(20):
            order, total = sorted(range(20), key=lambda w: -float(scores[0, 0, u, w])), 0.0
            for rank, w in enumerate(order):
                share = rank / 20 if mode == "topk" else total / float(scores[0, 0, u].sum())
                level[u, w] = 1 if rank == 0 else next((value for value, end in (RANKS if mode == "topk" else MASSES) if share < end), 0)
                total += float(scores[0, 0, u, w])
        return level

    found = {mode: levels_of(scores, mode, RANKS if mode == "topk" else MASSES)[0, 0] for mode in ("topk", "threshold")}
    own = sum(float((found[mode] != loop(mode)).sum()) for mode in found)
    return own, float((found["topk"] != loop("threshold")).sum())


@check(
    "draftattention",
    "every 16 consecutive reordered tokens are one 4 x 4 patch of one frame, and the order undoes",
    below=0,
    control="raster blocks",
)
def _() -> tuple[float, float]:
    order = tiles((4, 16, 16), (1, 4, 4), 5)

    def mixed(place: Tensor) -> float:
        blocks = place[:1024].reshape(-1, 16)
        patch = blocks // 256 * 16 + blocks % 256 // 16 // 4 * 4 + blocks % 16 // 4
        return float((patch != patch[:, :1]).sum())

    x = torch.arange(1029.0)[:, None]
    return mixed(order.order) + naive.gap(order.invert(order.apply(x)), x), mixed(torch.arange(1029))


def smooth(seed: int, dim: int = 32) -> Tensor:
    """Noise on a 4 x 16 x 16 grid averaged three times over 3 x 3 x 3, of unit variance: (1, 1, 1024, dim)."""
    x = torch.randn(dim, 1, 4, 16, 16, dtype=F64, generator=torch.Generator().manual_seed(seed))
    for _ in range(3):
        x = torch.nn.functional.avg_pool3d(torch.nn.functional.pad(x, (1,) * 6, mode="replicate"), 3, 1)
    return (x / x.std()).flatten(1).T[None, None]


@check(
    "draftattention",
    "sparsity 0 is dense attention, text included; 0.75 equals dense attention under the token mask in the original order",
    below=1e-12,
    control="output not put back",
)
def _() -> tuple[float, float]:
    q, k, v = (torch.randn(1, 1, 1029, 32, dtype=F64) for _ in range(3))
    settings = {"grid": (4, 16, 16), "pool": (4, 4), "text": 5}
    dense = naive.gap(attend(q, k, v, get("draftattention", sparsity=0.0, **settings)), attend(q, k, v))
    order = tiles((4, 16, 16), (1, 4, 4), 5)
    plan = Chosen(bind(draft_plan, size=16, visual=1024, sparsity=0.75, every_row=True))
    keep = (
        selection_of(plan, order.apply(q), order.apply(k), Full())
        .keep.repeat_interleave(16, -2)
        .repeat_interleave(16, -1)[0, 0, :1029, :1029]
    )
    original = torch.zeros(1029, 1029, dtype=torch.bool)
    original[order.order[:, None], order.order] = keep
    out = attend(q, k, v, get("draftattention", sparsity=0.75, **settings))
    truth = s_attend(q, k, v, original[None])
    return max(dense, naive.gap(out, truth)), naive.gap(order.apply(out), truth)


@check(
    "draftattention",
    "smooth latents, a quarter kept: relative error over a random map's, and under raster blocks'",
    below=0.6,
    control="the random map",
)
def _() -> tuple[float, float]:
    own, random, raster = [], [], []
    for seed in range(2):
        x, v = smooth(2 * seed), smooth(2 * seed + 1)
        q = k = 1.2 * x  # what a projection of one latent gives: like patches attend to like
        truth = attend(q, k, v)
        own.append(relative_error(attend(q, k, v, get("draftattention", grid=(4, 16, 16), pool=(4, 4))), truth))
        raster.append(relative_error(attend(q, k, v, get("draftattention", pool=(4, 4))), truth))
        keep = torch.rand(64, 64).argsort(-1).argsort(-1) < 16
        random.append(relative_error(attend(q, k, v, mask=keep.repeat_interleave(16, 0).repeat_interleave(16, 1)), truth))
    return sum(own) / sum(random) if sum(own) < sum(raster) else math.inf, 1.0


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
    key = {"query_head": lambda p: (p[0], p[1]), "head_global": lambda p: p[0], "overall": lambda p: 0, "block": lambda p: p[2]}[
        scope
    ]
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
