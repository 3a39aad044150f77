"""Checks of prefill policies that choose blocks: SpargeAttn, FlexPrefill, ProxyAttn, HiP, PowerAttention."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from ...algebra import BlockPowers, Causal, Dilated, Selection, Window
from ...algebra.blocks import pooled
from ...algebra.probes import probed
from ...catalog import get
from ...engine import attend
from ...mechanisms.selected.flexprefill import distance, last_mass
from ...mechanisms.selected.hip import tree
from ...mechanisms.selected.power import blocks_read, receptive_field
from ...mechanisms.selected.proxy import block_importance, evaluations, head_shares
from ...mechanisms.selected.sparge import sparge_attention
from ...mechanisms.selected.sparge_tuner import SpargeTuner
from .. import naive
from ..planted import autoregressive, clustered, relative_error
from ..verification import check
from .selected import qkv, s_attend, selection_of

F64 = torch.float64


def plan_of(name: str, q: Tensor, k: Tensor, **constants: object) -> Selection:
    mechanism = get(name, **constants)
    found = selection_of(mechanism.select, q, k, mechanism.mask)  # type: ignore[attr-defined]
    assert found is not None
    return found


def of_mask(selection: Selection, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Dense attention under a block map, spelled out."""
    pairs = selection.keep.repeat_interleave(selection.block_q, -2).repeat_interleave(selection.block_k, -1)
    return s_attend(q, k, v, pairs[0, :, : q.shape[2], : k.shape[2]])


@check("spargeattn", "tau = 1 and no skipped product is dense attention, mechanism and tile loop", below=1e-10, control="tau = 0.5")
def _() -> tuple[float, float]:
    q, k, v = clustered(1024, 64, 64)
    truth = attend(q, k, v)
    sizes = {"block_q": 16, "block_k": 16}
    own = max(
        naive.gap(attend(q, k, v, get("spargeattn", tau=1.0, **sizes)), truth),
        naive.gap(sparge_attention(q, k, v, tau=1.0, **sizes).out, truth),
    )
    return own, naive.gap(attend(q, k, v, get("spargeattn", tau=0.5, **sizes)), truth)


@check(
    "spargeattn",
    "64 clusters of 16: relative error at theta 0.6, tau 0.98, times 5, against a random map of equal density a row: ratio",
    below=1.0,
    control="the random map itself, times 5",
)
def _() -> tuple[float, float]:
    q, k, v = clustered(1024, 64, 64)
    truth = attend(q, k, v)
    own = plan_of("spargeattn", q, k, block_q=16, block_k=16)
    counts = own.keep.sum(-1, keepdim=True)
    rank = torch.rand(own.keep.shape).argsort(-1).argsort(-1)
    error, random = (relative_error(of_mask(Selection(keep, 16, 16), q, k, v), truth) for keep in (own.keep, rank < counts))
    return 5 * error / random if error <= 0.05 else math.inf, 5.0


@check(
    "spargeattn",
    "a key block of unlike tokens is read by every query block: share of its column",
    above=1.0,
    control="without the similarity gate",
)
def _() -> tuple[float, float]:
    q, k, _ = clustered(1024, 64, 64)
    k[:, :, 160:176] = torch.randn(1, 1, 16, 64, dtype=F64)
    column = [
        float(plan_of("spargeattn", q, k, block_q=16, block_k=16, theta=theta).keep[0, 0, :, 10].double().mean()) for theta in (0.6, -1.0)
    ]
    return column[0], column[1]


@check("spargeattn", "the map equals a loop over pooled q and centred k, ragged length and causal", below=0.0, control="keys not centred")
def _() -> tuple[float, float]:
    q, k, _ = qkv(83, 8, 1)
    q, k = 2 * q, 2 * k + 4
    q[:, :, 16:], k[:, :, 16:64] = q[:, :, 16:17] + 0.1 * q[:, :, 16:], k[:, :, 16:17]

    def loop(centred: bool) -> Tensor:
        keys = k[0, 0] - k[0, 0].mean(0) if centred else k[0, 0]
        blocks = [(range(a, min(a + 16, 83)), range(a, min(a + 16, 83))) for a in range(0, 83, 16)]
        alike = []
        for x in (q[0, 0], keys):
            sims = [sum(float(torch.cosine_similarity(x[r], x[s], 0)) for r in rows for s in rows) / len(rows) ** 2 for rows, _ in blocks]
            alike.append([sim > 0.4 and len(rows) == 16 for sim, (rows, _) in zip(sims, blocks, strict=True)])
        keep = torch.zeros(6, 6, dtype=torch.bool)
        for u in range(6):
            s = {
                w: float(q[0, 0, list(blocks[u][0])].mean(0) @ keys[list(blocks[w][0])].mean(0)) / math.sqrt(8)
                for w in range(u + 1)
                if alike[1][w]
            }
            total, kept = sum(math.exp(x) for x in s.values()), 0.0
            for place, w in enumerate(sorted(s, key=lambda w: -s[w])):
                kept += math.exp(s[w]) / total
                keep[u, w] = kept <= 0.9 or place == 0
            for w in range(u + 1):
                keep[u, w] |= not alike[1][w] or not alike[0][u]
        return keep

    own = plan_of("spargeattn", q, k, block_q=16, block_k=16, theta=0.4, tau=0.9, causal=True).keep[0, 0]
    return float((own != loop(True)).sum()), float((own != loop(False)).sum())


@check(
    "spargeattn",
    "the tuner keeps the error under its bound (0.08 + 0.02) with a quarter of the tiles left out",
    below=0.1,
    control="random blocks of that density",
)
def _() -> tuple[float, float]:
    q, k, v = clustered(256, 32, 16)
    tuner = SpargeTuner(block_q=16, block_k=16, grid=0.25).fit(q, k, v)
    found = sparge_attention(q, k, v, theta=tuner.theta, tau=tuner.tau, pv_lambda=max(tuner.pv_lambda), block_q=16, block_k=16)
    truth = attend(q, k, v)

    def error(out: Tensor) -> float:
        return float((out - truth).abs().sum() / truth.abs().sum())

    random = torch.rand(found.keep.shape).argsort(-1).argsort(-1) < found.keep.sum(-1, keepdim=True)
    return error(found.out) if found.qk_sparsity >= 0.25 else math.inf, error(of_mask(Selection(random, 16, 16), q, k, v))


@check("spargeattn", "int8 scores from centred keys: relative error", below=0.02, control="keys quantised with their mean")
def _() -> tuple[float, float]:
    q, k, v = qkv(256, 32, 2)
    k = k + 40 * torch.randn(32, dtype=F64)
    truth = attend(q, k, v)
    from ...mechanisms.selected.sparge import quantised

    own = sparge_attention(q, k, v, tau=1.0, quant="int8").out
    return relative_error(own, truth), relative_error(attend(quantised(q, 128), quantised(k, 64), v), truth)


@check("flexprefill", "gamma > 1 is dense causal attention", below=1e-10, control="gamma = 0.5")
def _() -> tuple[float, float]:
    q, k, v = qkv(300)
    truth = attend(q, k, v, mask=Causal())
    outs = [attend(q, k, v, get("flexprefill", gamma=gamma, block_size=16, min_budget=16)) for gamma in (1.1, 0.5)]
    return naive.gap(outs[0], truth), naive.gap(outs[1], truth)


def flex_loop(q: Tensor, k: Tensor, b: int, gamma: float, tau: float, low: int, per_row: bool = False) -> tuple[bool, Tensor]:
    """FlexPrefill of one head in plain Python: (query-aware, active blocks)."""
    n, d = q.shape
    count = n // b
    p = [[float(x) for x in (k[: i + 1] @ q[i] / math.sqrt(d)).softmax(0)] + [0.0] * (n - 1 - i) for i in range(n - b, n)]
    column = [sum(row[j] for row in p) / b for j in range(n)]
    slash = [0.0] * n
    for row, i in zip(p, range(n - b, n), strict=True):
        for j in range(i + 1):
            slash[i - j] += row[j] / b
    means_q, means_k = q.unflatten(0, (count, b)).mean(1), k.unflatten(0, (count, b)).mean(1)
    a_hat = (means_k @ means_q[-1] / math.sqrt(d)).softmax(0).tolist()
    a_bar = [sum(column[w * b : (w + 1) * b]) for w in range(count)]
    jsd = 0.0
    for x, y in zip(a_hat, a_bar, strict=True):
        m = (x + y) / 2
        jsd += 0.5 * (x * math.log(x / m) + (y * math.log(y / m) if y else 0.0))
    aware = math.sqrt(max(jsd, 0)) < tau
    sets = []
    for mass in (column, slash):
        total, number = 0.0, 1
        for x in sorted(mass, reverse=True):
            total += x
            number += total <= gamma
        budget = low // b if aware else min(max(number // b + 1, low // b), count)
        pools = [sum(mass[w * b : (w + 1) * b]) for w in range(count)]
        pools[0] = math.inf
        sets.append(set(sorted(range(count), key=lambda w: -pools[w])[:budget]))
    keep = torch.zeros(count, count, dtype=torch.bool)
    for u in range(count):
        for w in range(u + 1):
            keep[u, w] = w in sets[0] or (u - w) in sets[1]
    if aware:
        pool = [(means_k[: u + 1] @ means_q[u] / math.sqrt(d)).softmax(0).tolist() for u in range(count)]
        for group in (
            [[(u, w) for w in range(u + 1)] for u in range(count)] if per_row else [[(u, w) for u in range(count) for w in range(u + 1)]]
        ):
            total = 0.0
            for u, w in sorted(group, key=lambda at: -pool[at[0]][at[1]]):
                total += pool[u][w]
                if total <= gamma * (1 if per_row else count):
                    keep[u, w] = True
    return aware, keep


def flex_heads() -> tuple[Tensor, Tensor]:
    """20 heads, half of them smooth (query-aware), half with strong single keys."""
    q, k = 0.5 * torch.randn(1, 20, 256, 16, dtype=F64), 0.5 * torch.randn(1, 20, 256, 16, dtype=F64)
    k[:, :10] = torch.randn(1, 10, 16, 1, 16, dtype=F64).expand(-1, -1, -1, 16, -1).flatten(2, 3)
    q[:, :10] = torch.randn(1, 10, 1, 16, dtype=F64) + 0.05 * q[:, :10]
    direction = torch.nn.functional.normalize(torch.randn(16, dtype=F64), dim=0)
    q[:, 10:] += 4 * direction
    for h in range(10, 20):
        k[0, h, torch.randperm(240)[:5]] += 5 * direction
    return q, k


@check(
    "flexprefill",
    "patterns, budgets and the flattened choice equal plain Python on 20 heads: blocks that differ",
    below=0,
    control="a threshold a row",
)
def _() -> tuple[float, float]:
    q, k = flex_heads()
    keep = plan_of("flexprefill", q, k, gamma=0.85, tau=0.1, min_budget=16, block_size=16).keep[0]
    loops = [flex_loop(q[0, h], k[0, h], 16, 0.85, 0.1, 16) for h in range(20)]
    rows = [flex_loop(q[0, h], k[0, h], 16, 0.85, 0.1, 16, True)[1] for h in range(20)]
    mixed = 0 < sum(aware for aware, _ in loops) < 20
    causal = torch.ones(16, 16, dtype=torch.bool).tril()
    wrong = float(sum(int(((keep[h] != loops[h][1]) & causal).sum()) for h in range(20)))
    return wrong if mixed else math.inf, float(sum(int(((keep[h] != rows[h]) & causal).sum()) for h in range(20)))


@check(
    "flexprefill",
    "planted heads: smooth ones lie under tau, heads with strong keys above, whose blocks are read: heads decided right",
    above=20,
    control="tau = 2",
)
def _() -> tuple[float, float]:
    q, k = flex_heads()
    mass, _ = last_mass(q / 4, k, 16)
    d = distance(q / 4, pooled(k, 16), mass, 16)[0]
    strong = mass[0, 10:].topk(5, -1).indices // 16
    keep = plan_of("flexprefill", q, k, min_budget=16, block_size=16).keep[0, 10:, -1]
    read = keep.gather(-1, strong).all()

    def right(tau: float) -> float:
        return float(((d < tau) == (torch.arange(20) < 10)).sum()) * float(read)

    return right(0.1), right(2.0)


@check(
    "flexprefill",
    "density grows with gamma 0.5, 0.8, 0.9, 0.99 and no block lies in the future: falls",
    below=0,
    control="gammas the other way round",
)
def _() -> tuple[float, float]:
    q, k = flex_heads()
    maps = [plan_of("flexprefill", q, k, gamma=gamma, min_budget=16, block_size=16) for gamma in (0.5, 0.8, 0.9, 0.99)]
    future = sum(int((one.keep & ~torch.ones(16, 16, dtype=torch.bool).tril()).sum()) for one in maps)
    falls = [sum(b.density < a.density for a, b in pairwise(order)) for order in (maps, maps[::-1])]
    return float(falls[0] + future), float(falls[1])


@check("flexprefill", "sums over columns and diagonals equal a loop", below=1e-12, control="one in place of the other")
def _() -> tuple[float, float]:
    q, k, _ = qkv(60)
    columns, slashes = probed(q[:, :, 20:], k, torch.arange(20, 60), diagonals=True)
    truth = torch.zeros(2, 1, 2, 60, dtype=F64)
    for i in range(20, 60):
        p = (q[:, :, i : i + 1] @ k[:, :, : i + 1].transpose(-1, -2)).softmax(-1)[..., 0, :]
        for j in range(i + 1):
            truth[0, ..., j] += p[..., j]
            truth[1, ..., i - j] += p[..., j]
    return naive.gap(torch.stack([columns, slashes]), truth), naive.gap(torch.stack([slashes, columns]), truth)


@check("proxyattn", "identical heads: every grouping gives the same map; gamma = 1 is dense", below=1e-10, control="heads that differ")
def _() -> tuple[float, float]:
    q, k, v = qkv(203, heads=4)
    same_q, same_k = (x[:, :1].expand(-1, 4, -1, -1) for x in (q, k))

    def differ(q: Tensor, k: Tensor) -> float:
        maps = [plan_of("proxyattn", q, k, groups=g, block_size=16, stride=2).keep for g in (1, 2, 4)]
        return float(sum(int((one != maps[2]).sum()) for one in maps))

    dense = naive.gap(attend(q, k, v, get("proxyattn", gamma=1.0)), attend(q, k, v, mask=Causal()))
    return differ(same_q, same_k) + dense, differ(q, k)


@check(
    "proxyattn",
    "heads of sharpness 0.5 ... 8: the least mass a head's own budget captures at gamma 0.9",
    above=0.9,
    control="one budget, the mean, for all",
)
def _() -> tuple[float, float]:
    base = torch.randn(1, 1, 1, 16, dtype=F64)
    keys = 0.5 * torch.randn(1, 1, 16, 1, 16, dtype=F64).expand(-1, -1, -1, 16, -1).flatten(2, 3)
    factor = torch.tensor([0.5, 1, 2, 4, 6, 8], dtype=F64)[:, None, None]
    q, k = factor * base.expand(1, 6, 256, 16), keys.expand(1, 6, 256, 16)
    mass = last_mass(q / 4, k, 16)[0].unflatten(-1, (16, 16)).sum(-1)[0]
    keep = plan_of("proxyattn", q, k, groups=1, gamma=0.9, block_size=16, stride=4).keep[0, :, -1]
    uniform = round(float(keep.sum(-1).double().mean()))
    order = block_importance(q / 4, k, 1, 16, 4)[0, 0, -1].argsort(descending=True)[:uniform]
    flatter = bool(keep[0].sum() > keep[-1].sum())
    return float((mass * keep).sum(-1).amin()) if flatter else 0.0, float(mass[:, order].sum(-1).amin())


@check("proxyattn", "the map equals a loop, ragged length and grouped heads: blocks that differ", below=0, control="another head's budget")
def _() -> tuple[float, float]:
    q, k, _ = qkv(89, heads=4, kv=2)
    own = plan_of("proxyattn", 2 * q, k, gamma=0.8, block_size=16, stride=4).keep[0]
    q = 2 * q[0]

    def loop(budget_of: int) -> Tensor:
        keep = torch.zeros(4, 6, 6, dtype=torch.bool)
        for h in range(4):
            c = h // 2
            mean_q = q[2 * c : 2 * c + 2].mean(0)
            best = torch.zeros(6, 6, dtype=F64)
            for i in range(0, 89, 4):
                row = torch.tensor([float(mean_q[i] @ k[0, c, j]) / math.sqrt(8) for j in range(0, i + 1, 4)], dtype=F64).softmax(0)
                for j, p in zip(range(0, i + 1, 4), row, strict=True):
                    best[i // 16, j // 16] = max(best[i // 16, j // 16], p)
            g = (h + budget_of) % 4
            rows = [(k[0, g // 2, : i + 1] @ q[g, i] / math.sqrt(8)).softmax(0) for i in range(73, 89)]
            mass = sorted((sum(float(row[w * 16 : (w + 1) * 16].sum()) for row in rows) / 16 for w in range(6)), reverse=True)
            number = next(m for m in range(1, 7) if sum(mass[:m]) >= 0.8 - 1e-9)
            for u in range(6):
                wanted = max(1, math.ceil(number / 6 * (u + 1) - 1e-9))
                for w in sorted(range(u + 1), key=lambda w: -float(best[u, w]))[:wanted]:
                    keep[h, u, w] = True
                keep[h, u, 0] = keep[h, u, u] = True
        return keep

    return float((own != loop(0)).sum()), float((own != loop(1)).sum())


@check(
    "proxyattn",
    "token pairs scored: 8 heads, L = 512, 2 proxies, block 32, stride 4, counted from the tensors",
    below=0,
    control="every head sampled",
)
def _() -> tuple[float, float]:
    q, k, _ = qkv(512, heads=8)
    sampled = block_importance(q, k, 2, 4, 4)  # blocks of one sample: the map's own size is what was scored
    shares = head_shares(q, k, 0.9, 32)
    counted = 2 * sampled.shape[-1] ** 2 + shares.numel() * 32 * 512
    return float(abs(evaluations(8, 512, 2, 32, 4) - counted)), float(abs(evaluations(8, 512, 8, 32, 4) - counted))


@check("hip", "a prompt of at most mask_k tokens is dense causal attention", below=1e-12, control="mask_k = L / 4")
def _() -> tuple[float, float]:
    q, k, v = qkv(128, 16)
    truth = attend(q, k, v, mask=Causal())
    outs = [attend(q, k, v, get("hip", mask_k=size, sinks=1, window=1)) for size in (128, 32)]
    return naive.gap(outs[0], truth), naive.gap(outs[1], truth)


@check("hip", "keys read by one descent, T = 2048, mask_k = 256, against 2 mask_k log2(T / mask_k)", below=0, control="all keys scored")
def _() -> tuple[float, float]:
    q, k, _ = qkv(2048, 32, 1)
    reads = tree(q[:, :, -32:], k, 2016, 256, 32, 2, 0, 0, 2, "first")[1][0]
    return float(abs(reads - 1536)), float(abs(2048 - 1536))


def captured(q: Tensor, k: Tensor) -> tuple[float, float]:
    """Mass in HiP's 256 keys, and in 256 random ones, over that of each query's best 256."""
    own, random = [], []
    for i in range(8):
        p = (k[0, 0] @ q[0, 0, i] / math.sqrt(32)).softmax(0)
        keep = tree(q[:, :, i : i + 1], k, 2047, 256, 1, 2, 0, 0, 1, "first")[0].keep[0, 0, 0]
        best = float(p.topk(256).values.sum())
        own.append(float(p.unflatten(0, (-1, 2)).sum(-1)[keep].sum()) / best)
        random.append(float(p[torch.randperm(2048)[:256]].sum()) / best)
    return sum(own) / 8, sum(random) / 8


@check("hip", "slowly drifting keys: mass captured over the exact top 256's", above=0.95, control="256 random keys")
def _() -> tuple[float, float]:
    k = autoregressive(2048, 32, 0.98)[None, None]
    return captured(2 * torch.randn(1, 1, 8, 32, dtype=F64), k)


@check(
    "hip",
    "keys without locality: the tree misses much of the mass (so it has not scored everything)",
    below=0.9,
    control="slowly drifting keys",
)
def _() -> tuple[float, float]:
    q = 2 * torch.randn(1, 1, 8, 32, dtype=F64)
    return captured(q, torch.randn(1, 1, 2048, 32, dtype=F64))[0], captured(q, autoregressive(2048, 32, 0.98)[None, None])[0]


@check(
    "hip",
    "equals dense attention under the blocks of the tree, sinks and window in the same softmax, and a query alone",
    below=1e-10,
    control="without the sinks",
)
def _() -> tuple[float, float]:
    q, k, v = qkv(200, 16)
    sizes = {"mask_k": 32, "block_q": 8, "block_k": 2, "sinks": 4, "window": 12}
    out = attend(q, k, v, get("hip", **sizes))
    keep = plan_of("hip", q, k, **sizes)
    pairs = keep.keep.repeat_interleave(8, -2).repeat_interleave(2, -1)[0, :, :200, :200] & torch.ones(200, 200, dtype=torch.bool).tril()
    truth = s_attend(q, k, v, pairs)
    without = pairs.clone()
    without[:, 64:, :4] = False
    alone = attend(q[:, :, -1:], k, v, get("hip", **{**sizes, "block_q": 1}))
    one = tree(q[:, :, -1:], k, 199, 32, 1, 2, 4, 12, 2, "first")[0].keep.repeat_interleave(2, -1)[0, :, :, :200]
    return max(naive.gap(out, truth), naive.gap(alone, s_attend(q[:, :, -1:], k, v, one))), naive.gap(out, s_attend(q, k, v, without))


@check(
    "powerattention",
    "keys the last of 513 tokens reaches after 1 .. 9 layers: difference from [11, 47, 131, 257, 383, 467, 503, 512, 513]",
    below=0,
    control="a window of the same degree",
)
def _() -> tuple[float, float]:
    known = torch.tensor([11, 47, 131, 257, 383, 467, 503, 512, 513])
    own, window = (receptive_field(mask, 513, 9).sum(-1) for mask in (Causal() & BlockPowers(1), Causal() & Window(11)))
    linear = torch.equal(window, 10 * torch.arange(1, 10) + 1)
    return float((own - known).abs().sum()), float((window - known).abs().sum()) * linear


@check(
    "powerattention",
    "odd distances the last of 513 tokens reaches in 9 layers: share",
    above=1.0,
    control="a window of 11 keys dilated by 2",
)
def _() -> tuple[float, float]:
    odd = (512 - torch.arange(513)) % 2 == 1
    return tuple(
        float(receptive_field(mask, 513, 9)[-1][odd].double().mean()) for mask in (Causal() & BlockPowers(1), Causal() & Dilated(11, 2))
    )  # type: ignore[return-value]


@check(
    "powerattention",
    "equals dense attention with the block rule spelled out, and the last row from its blocks alone",
    below=1e-12,
    control="distances 2^m + 1",
)
def _() -> tuple[float, float]:
    q, k, v = qkv(256)

    def pairs(shift: int) -> Tensor:
        u, w = torch.arange(256)[:, None] // 16, torch.arange(256) // 16
        powers = {0, *(2**m + shift for m in range(9))}
        near = torch.tensor([[int(a - b) in powers or 0 <= int(a - b) < 2 or (int(b) < 1) for b in w.flatten()] for a in u.flatten()])
        return near & torch.ones(256, 256, dtype=torch.bool).tril()

    out = attend(q, k, v, get("powerattention", block_size=16, window_blocks=2, sink_blocks=1))
    columns = torch.cat([torch.arange(w * 16, (w + 1) * 16) for w in blocks_read(255, 16, 2, 1)])
    last = attend(q[:, :, -1:], k[:, :, columns], v[:, :, columns])
    own = max(naive.gap(out, s_attend(q, k, v, pairs(0).expand(2, -1, -1))), naive.gap(last, out[:, :, -1:]))
    return own, naive.gap(out, s_attend(q, k, v, pairs(1).expand(2, -1, -1)))
