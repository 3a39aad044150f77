"""Checks of sparse attention that retrieves chunks: SSA's aligned streams, LongHeads, DBSA's demonstration cache."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ...algebra import Causal, Rope
from ...engine import attend
from ...mechanisms.selected.longheads import LongHeads, LongHeadsCache
from ...nn import Decoder
from ...nn.aligned_sparse import SSAAttention, alignment, block_top, captured_mass
from ...nn.demonstrations import BM25, DemonstrationCache, group_mask
from .. import naive
from ..verification import check
from .selected import selection_of

F64 = torch.float64


def ssa(top_k: int = 2) -> SSAAttention:
    return SSAAttention(32, 4, 2, block_size=8, top_k=top_k).double()


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


def long_inputs() -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(1, 4, 160, 16, dtype=F64) for _ in range(3))  # type: ignore[return-value]


def longheads_loop(q: Tensor, k: Tensor, v: Tensor, i: int, w: int, n: int) -> Tensor:
    """One query and head at a time: q, k, v (L, D) unrotated -> the output of query i >= n w."""
    rope, scale = Rope(), q.shape[-1] ** -0.5
    own, keys = i // w, {}
    for c in range(1, own - 1):
        part, at = slice(c * w, c * w + w), torch.arange(w)
        turned_q, turned_k = rope.rotate(q[part], at), rope.rotate(k[part], at)
        value = ((turned_q @ turned_k.T * scale).softmax(-1) @ v[part]).mean(0)
        keys[c] = (turned_k @ value * scale).softmax(0) @ turned_k
    forced = sorted({0, own - 1, own})
    best = sorted(keys, key=lambda c: (-float(q[i] @ keys[c]), c))[: n - len(forced)]
    chosen = sorted([*forced, *best])
    tokens = [j for c in chosen for j in range(c * w, c * w + w)]
    place = {j: at for at, j in enumerate(tokens) if j <= i}
    s = torch.stack(
        [
            rope.rotate(q[i : i + 1], torch.tensor([(n - 1) * w + i % w]))[0] @ rope.rotate(k[j : j + 1], torch.tensor([at]))[0]
            for j, at in place.items()
        ]
    )
    return (s * scale).softmax(0) @ v[list(place)]


@check("longheads", "up to attend_len tokens: dense rotary attention", below=1e-12, control="40 tokens where 32 are dense")
def _() -> tuple[float, float]:
    q, k, v = long_inputs()
    heads, at = LongHeads(8, 32), torch.arange(160)
    dense = attend(Rope().rotate(q, at), Rope().rotate(k, at), v, mask=Causal())
    return tuple(naive.gap(heads.prefill(q[:, :, :n], k[:, :, :n], v[:, :, :n]), dense[:, :, :n]) for n in (32, 160))  # type: ignore[return-value]


@check(
    "longheads",
    "160 tokens: prefill equals a loop over queries and chunks, and decoding token by token",
    below=1e-10,
    control="the query at its true position",
)
def _() -> tuple[float, float]:
    q, k, v = long_inputs()
    heads = LongHeads(8, 32)
    out, cache, steps = heads.prefill(q, k, v), LongHeadsCache(), []
    for t in range(160):
        o, cache = heads.step(q[:, :, t : t + 1], k[:, :, t : t + 1], v[:, :, t : t + 1], cache)
        steps.append(o)
    loops = [(h, i, longheads_loop(q[0, h], k[0, h], v[0, h], i, 8, 4)) for h in range(4) for i in range(33, 160, 9)]
    gap = max(naive.gap(out[0, h, i], truth) for h, i, truth in loops)
    at = torch.arange(160)
    dense = attend(Rope().rotate(q, at), Rope().rotate(k, at), v, mask=Causal())
    return max(gap, naive.gap(torch.cat(steps, 2), out)), min(naive.gap(dense[0, h, i], truth) for h, i, truth in loops)


@check(
    "longheads",
    "every query reads 4 chunks, among them 0, its own and the one before, none twice or ahead: exceptions",
    below=0,
    control="the same queries counted one chunk further on",
)
def _() -> tuple[float, float]:
    q, k, v = long_inputs()
    heads = LongHeads(8, 32)
    ids = heads.select(q[:, :, 32:], heads.chunk_keys(q, k, v), 32)
    wrong = []
    for shift in (0, 1):
        own = (torch.arange(32, 160) // 8 + shift)[:, None]
        good = (ids == 0).any(-1) & (ids == own).any(-1) & (ids == own - 1).any(-1) & (ids <= own).all(-1) & (ids.diff(dim=-1) > 0).all(-1)
        wrong.append(float((~good).sum()))
    return wrong[0], wrong[1]


@check(
    "longheads",
    "a chunk like the last query is chosen wherever it stands: the fewest of 4 heads over 14 places",
    above=3,
    control="queries rotated before the choice",
)
def _() -> tuple[float, float]:
    heads, found = LongHeads(8, 32), {True: [], False: []}  # type: ignore[var-annotated]
    direction = F.normalize(torch.randn(4, 16, dtype=F64), dim=-1)
    for chunk in range(2, 16):
        q, k, v = long_inputs()
        noise = F.normalize(torch.randn(1, 4, 8, 16, dtype=F64), dim=-1)
        k = F.normalize(k, dim=-1) * 4
        k[:, :, chunk * 8 : chunk * 8 + 8] = (0.9 * direction[None, :, None] + 0.436 * noise) * 4
        q[:, :, -1] = 4 * direction
        keys = heads.chunk_keys(q, k, v)
        for turned in (False, True):
            last = Rope().rotate(q[:, :, -1:], torch.tensor([159])) if turned else q[:, :, -1:]
            found[turned].append(float((heads.select(last, keys, 159) == chunk).any(-1).sum()))
    return min(found[False]), min(found[True])


def demonstrations(layers: int = 3, **options: int | None) -> tuple[Decoder, DemonstrationCache, list[Tensor], Tensor]:
    torch.manual_seed(0)
    model = Decoder("softmax", vocab=40, dim=32, layers=layers, heads=4, kv_heads=2).double()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    cache = DemonstrationCache(model, **options)  # type: ignore[arg-type]
    groups = [torch.randint(40, (n,)) for n in (7, 5, 9, 6, 8, 4)]
    cache.encode_once(groups, [f"group {n}" for n in range(6)])
    return model, cache, groups, torch.randint(40, (6,))


def answer_loop(model: Decoder, groups: list[Tensor], query: Tensor, chosen: list[int], anchors: int, previous: int) -> Tensor:
    """Every stored key recomputed under the mask, chosen groups placed from 0 on, then the query; plain loops over heads."""
    sizes, rope = [len(g) for g in groups], Rope()
    group = [n for n, size in enumerate(sizes) for _ in range(size)]
    length = len(group)
    mask = torch.tensor(
        [
            [j <= i and (group[i] == group[j] or group[j] < anchors or group[j] >= group[i] - previous) for j in range(length)]
            for i in range(length)
        ]
    )
    kept = [j for j in range(length) if group[j] in chosen]
    x, y = model.embed(torch.cat(groups)[None]), model.embed(query[None])

    def layer_out(m, q, k, v, seen, h):  # type: ignore[no-untyped-def]
        rows = [
            (q[:, g] @ k[:, g // 2].transpose(-1, -2) / math.sqrt(8)).masked_fill(~seen, -math.inf).softmax(-1) @ v[:, g // 2]
            for g in range(4)
        ]
        return m.out(torch.cat(rows, -1))

    for block in model.blocks:
        m = block.mixer
        parts = []
        for z in (block.norm1(x), block.norm1(y)):  # type: ignore[operator]
            parts.append([f(z).unflatten(-1, (-1, 8)).transpose(1, 2) for f in (m.q, m.k, m.v)])  # type: ignore[union-attr, operator]
        (qx, kx, vx), (qy, ky, vy) = parts
        at = torch.arange(length)
        x = x + layer_out(m, rope.rotate(qx, at), rope.rotate(kx, at), vx, mask, 4)
        x = x + block.mlp(block.norm2(x))  # type: ignore[operator]
        new = torch.arange(len(query)) + len(kept)
        keys = torch.cat((rope.rotate(kx[:, :, kept], torch.arange(len(kept))), rope.rotate(ky, new)), 2)
        seen = torch.cat(
            (torch.ones(len(query), len(kept), dtype=torch.bool), torch.ones(len(query), len(query), dtype=torch.bool).tril()), 1
        )
        y = y + layer_out(m, rope.rotate(qy, new), keys, torch.cat((vx[:, :, kept], vy), 2), seen, 4)
        y = y + block.mlp(block.norm2(y))  # type: ignore[operator]
    return model.logits(y)[0]


@check("dbsa", "all groups, previous >= groups: the answer equals the whole forward pass", below=1e-9, control="previous = 2")
@torch.no_grad()
def _() -> tuple[float, float]:
    gaps = []
    for previous in (6, 2):
        model, cache, groups, query = demonstrations(previous=previous, selected=None)
        gaps.append(naive.gap(cache.answer(query), model(torch.cat([*groups, query])[None])[0, -6:]))
    return gaps[0], gaps[1]


@check(
    "dbsa",
    "groups 0, 3, 5 of an encoding with 1 anchor and 2 previous: logits equal a recomputation of every key",
    below=1e-9,
    control="keys left at the positions they were encoded at",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    model, cache, groups, query = demonstrations()
    truth = answer_loop(model, groups, query, [0, 3, 5], 1, 2)
    before = cache.account.tokens
    own = naive.gap(cache.answer(query, chosen=[0, 3, 5]), truth) + (cache.account.tokens - before != len(query))
    cache.reposition = False
    return own, naive.gap(cache.answer(query, chosen=[0, 3, 5]), truth)


@check(
    "dbsa",
    "two layers: another demonstration in group 2 changes no answer from groups 0 and 5 (out of its reach)",
    below=0,
    control="groups 0 and 4, which group 2 reaches",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    _, cache, groups, query = demonstrations(layers=2)  # more layers would reach further
    before = [cache.answer(query, chosen=c) for c in ([0, 5], [0, 4])]
    groups[2] = (groups[2] + 1) % 40
    cache.encode_once(groups, [""] * 6)
    after = [cache.answer(query, chosen=c) for c in ([0, 5], [0, 4])]
    return naive.gap(after[0], before[0]), naive.gap(after[1], before[1])


@check("dbsa", "the encoding mask equals its rule on ragged groups: differing pairs", below=0, control="one group before instead of two")
def _() -> tuple[float, float]:
    sizes = [3, 5, 1, 4, 2, 6]
    group = [n for n, size in enumerate(sizes) for _ in range(size)]
    truth = torch.tensor([[j <= i and (u == w or w < 1 or w >= u - 2) for j, w in enumerate(group)] for i, u in enumerate(group)])
    return tuple(float((group_mask(sizes, 1, n) != truth).sum()) for n in (2, 1))  # type: ignore[return-value]


@check(
    "dbsa", "BM25 equals the textbook formula on 20 texts, and a rare word finds its group", below=1e-9, control="no length normalisation"
)
def _() -> tuple[float, float]:
    generator = torch.Generator().manual_seed(3)
    texts = [
        " ".join(f"w{int(x)}" for x in torch.randint(12, (int(torch.randint(4, 15, (), generator=generator)),), generator=generator))
        for _ in range(20)
    ]
    texts[13] += " zebra"
    found, query = BM25(texts), "w1 w5 zebra"
    docs = [t.split() for t in texts]
    mean = sum(map(len, docs)) / 20
    truth = []
    for doc in docs:
        score = 0.0
        for word in query.split():
            n, f = sum(word in d for d in docs), doc.count(word)
            score += math.log((20 - n + 0.5) / (n + 0.5) + 1) * f * 2.5 / (f + 1.5 * (0.25 + 0.75 * len(doc) / mean))
        truth.append(score)

    def gap(scores: list[float]) -> float:
        return max(abs(a - b) for a, b in zip(scores, truth, strict=True))

    first = max(range(20), key=lambda n: found.scores("zebra")[n])
    return gap(found.scores(query)) + (first != 13), gap(BM25(texts, b=0.0).scores(query))
