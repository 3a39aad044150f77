"""Checks of dbsa."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from regard.algebra import Rope
from regard.lab import naive
from regard.lab.verification import check
from regard.nn.decoder import Decoder
from regard.zoo.sparse.dbsa import BM25, DemonstrationCache, group_mask, many_shot_task


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


@check(
    "dbsa",
    "a query reads group 0 and the best others by BM25, in their order: logits against those of the groups chosen by hand",
    below=0,
    control="a text that speaks of another group",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    _, cache, groups, query = demonstrations(selected=3)
    cache.encode_once(groups, ["a b", "c zebra", "zebra zebra d", "e f", "gnu", "b b zebra x y z"])
    truth = cache.answer(query, chosen=[0, 1, 2])  # a short text and two mentions beat one mention in a long text
    read = cache.account.read[-1]
    own = naive.gap(cache.answer(query, "Zebra"), truth) + (cache.account.read[-1] != read) + (read != 7 + 5 + 9)
    equal = cache.retrieve("nothing known") != [0, 1, 2]  # equal scores: the first groups
    return own + equal, naive.gap(cache.answer(query, "gnu e"), truth)


@check(
    "dbsa",
    "the many-shot task: share of queries whose own demonstration is in the 5 groups of 16 that are read",
    above=1.0,
    control="texts that say nothing",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    task = many_shot_task(generator=torch.Generator().manual_seed(1))
    model = Decoder("softmax", vocab=8 + 16 * 6 * 2, dim=8, layers=1, heads=2)
    shares = []
    for texts in (task.texts, [""] * 16):
        cache = DemonstrationCache(model)
        cache.encode_once(task.groups, texts)
        held = 0
        for tokens, text, answer in task.queries:
            seen = torch.cat([task.groups[n] for n in cache.retrieve(text)]).view(-1, 3)
            held += bool((seen == torch.cat((tokens, torch.tensor([answer])))).all(-1).any())
        shares.append(held / len(task.queries))
    return shares[0], shares[1]


@check(
    "dbsa",
    "evaluation and accounts equal counts by hand: accuracy over the label tokens alone, tokens read, bytes, tokens run",
    below=0,
    control="accuracy over the whole vocabulary",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    _, cache, groups, _ = demonstrations(selected=2)
    labels = torch.tensor([3, 17, 29, 31])
    queries = [(torch.randint(40, (5,)), f"group {n % 5 + 1}", n % 4) for n in range(20)]
    found = cache.evaluate(queries, labels)
    right = anywhere = 0
    for tokens, text, truth in queries:
        logits = cache.answer(tokens, text)[-1].tolist()
        right += max(range(4), key=lambda n: logits[int(labels[n])]) == truth
        anywhere += max(range(40), key=lambda n: logits[n]) == int(labels[truth])
    read = sum(7 + len(groups[n % 5 + 1]) for n in range(20)) / 20
    held = 39 * 3 * 2 * 2 * 8 * 8  # tokens, layers, keys and values, kv heads, channels, bytes
    off = abs(found["accuracy"] - right / 20) + abs(found["read"] - read) + abs(found["bytes"] - held)
    off += abs(cache.account.encoded - 39) + abs(cache.account.tokens - 2 * 20 * 5) + (found["seconds"] <= 0)
    return off, abs(found["accuracy"] - anywhere / 20)
