"""Checks of blockrank."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from regard.engine.meter import pairs_read
from regard.lab import naive
from regard.lab.checks.shared.decoding import llama
from regard.lab.checks.shared.gaps import gaps
from regard.lab.verification import check
from regard.zoo.systems.blockrank import (
    blockrank_attention,
    blockrank_aux_loss,
    blockrank_mask,
    blockrank_positions,
    document_scores,
    rank_by_attention,
    ranking,
)


def padded(blocks: int = 5, size: int = 6) -> Tensor:
    """(2, M, H): blocks of 1 to H tokens, padded on the left."""
    return torch.arange(size) >= torch.randint(0, size, (2, blocks, 1))


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Softmax one query at a time over what its block sees."""
    b, blocks, size = mask.shape
    out, group = [], q.shape[1] // k.shape[1]
    for row in range(b):
        for h in range(q.shape[1]):
            for i in range(blocks * size):
                u = i // size
                seen = [
                    j
                    for j in range(i + 1)
                    if (j // size in (0, u) or u == blocks - 1) and mask[row, j // size, j % size] and mask[row, u, i % size]
                ]
                p = (k[row, h // group, seen] @ q[row, h, i] / math.sqrt(q.shape[-1])).softmax(0)
                out.append(p @ v[row, h // group, seen])
    return torch.stack(out).view(*q.shape[:3], v.shape[-1])


def drawn(mask: Tensor) -> list[Tensor]:
    n = mask.shape[1] * mask.shape[2]
    return [torch.randn(2, h, n, 4, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2)]


@check(
    "blockrank", "2, 3 and 5 blocks, padded: gap to softmax by loops, and of gradients", below=1e-10, control="documents read earlier ones"
)
def _() -> tuple[float, float]:
    own, other = [], []
    for blocks in (2, 3, 5):
        mask = padded(blocks)
        inputs = drawn(mask)
        truth = dense(*inputs, mask)
        own.append(gaps(blockrank_attention(*inputs, mask), truth, inputs))
        full = torch.ones_like(mask)
        masked = torch.nn.functional.scaled_dot_product_attention(
            inputs[0], *(x.repeat_interleave(2, 1) for x in inputs[1:]), attn_mask=whole(blocks, 6)
        )
        own.append(naive.gap(blockrank_attention(*inputs, full), masked))
        if blocks > 3:
            every = (torch.ones(30, 30).tril().bool() & mask.flatten(1)[:, None, :] | torch.eye(30).bool())[:, None]
            read = torch.nn.functional.scaled_dot_product_attention(
                inputs[0], *(x.repeat_interleave(2, 1) for x in inputs[1:]), attn_mask=every
            )
            other.append(naive.gap(read * mask.flatten(1)[:, None, :, None], truth))
    return max(own), min(other)


def whole(blocks: int, size: int) -> Tensor:
    i, j = torch.arange(blocks * size)[:, None], torch.arange(blocks * size)
    return blockrank_mask(blocks, size).visible(torch.zeros(1), torch.zeros(1), i, j, {})


@check(
    "blockrank",
    "pairs read over those of the three kinds of blocks, 12 blocks of 8",
    below=1.0,
    control="causal attention over the whole text",
)
def _() -> tuple[float, float]:
    q, m, size = torch.randn(1, 1, 96, 4), 12, 8
    with pairs_read() as own:
        blockrank_attention(q, q, q, torch.ones(1, m, size))
    own_half = size * (size + 1) // 2
    formula = own_half + (m - 2) * (size * size + own_half) + (m - 1) * size * size + own_half
    assert own.read == formula
    return own.read / formula, 96 * 97 / 2 / formula


@check(
    "blockrank",
    "documents in another order: change of the query's outputs, of moved documents' and of moved scores",
    below=1e-9,
    control="positions of the whole text",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    model, mask = llama(), padded(7)
    mask[:, -1], ids = True, torch.randint(1, 50, (2, 42))
    labels = torch.full((2, 42), -100)
    labels[:, -2:] = ids[:, -2:]
    order = torch.tensor([0, 3, 1, 5, 2, 4, 6])

    def moved(x: Tensor) -> Tensor:
        return x.unflatten(1, (7, 6))[:, order].flatten(1, 2)

    def read(ids: Tensor, mask: Tensor, places: Tensor | None) -> tuple[Tensor, Tensor]:
        with ranking(model, mask, 1) as seen:
            places = blockrank_positions(mask) if places is None else places
            hidden = model.model(input_ids=ids, position_ids=places, use_cache=False).last_hidden_state
        assert seen.scores is not None
        return hidden * mask.flatten(1)[..., None], document_scores(seen.scores, labels, mask)

    gaps = []
    for places in (None, torch.arange(42).expand(2, -1)):
        (one, r), (two, s) = read(ids, mask, places), read(moved(ids), mask[:, order], places)
        gaps.append(max(naive.gap(moved(one), two), naive.gap(r[:, order[1:-1] - 1], s)))
    ranks = rank_by_attention(model, ids, mask, labels, 1)
    assert torch.equal(ranks, read(ids, mask, None)[1].argsort(1, descending=True))
    return gaps[0], gaps[1]


@check(
    "blockrank",
    "positions by hand; scores by loops, of sum 1; loss of even scores = log documents - log right ones",
    below=1e-9,
    control="the token behind the first asked one as second signal",
)
def _() -> tuple[float, float]:
    mask = torch.tensor([[[0, 1, 1], [1, 1, 1], [0, 0, 1], [0, 1, 1]]])
    assert blockrank_positions(mask, 100).tolist() == [[0, 0, 1, 2, 3, 4, 0, 0, 2, 0, 100, 101]]
    mask = padded(6)
    mask[:, 1, -1] = mask[:, -1] = True
    scores, labels = torch.randn(2, 3, 5, 36, dtype=torch.float64), torch.full((2, 36), -100)
    labels[0, -3:] = labels[1, -2:] = 1

    def by_hand(moves: tuple[int, int]) -> Tensor:
        r = torch.zeros(2, 4, dtype=torch.float64)
        for row, first in ((0, 2), (1, 3)):
            for h in range(3):
                for at in (first + move for move in moves):
                    tokens = [j for j in range(6, 30) if mask[row, j // 6, j % 6]]
                    p = scores[row, h, at, tokens].softmax(0)
                    for j, weight in zip(tokens, p, strict=True):
                        r[row, j // 6 - 1] += weight / 6
        return r

    r, truth = document_scores(scores, labels, mask), by_hand((-1, 0))
    even = blockrank_aux_loss(torch.zeros_like(scores), labels, torch.tensor([[0, 2], [3, -1]]), torch.ones_like(mask))
    right = torch.tensor([[True, False, True, False], [False, False, False, True]])
    own = max(
        naive.gap(r, truth),
        float((r.sum(1) - 1).abs().max()),
        abs(float(even) - (2 * math.log(4) - math.log(2)) / 2),
        abs(
            float(blockrank_aux_loss(scores, labels, torch.tensor([[0, 2], [3, -1]]), mask, 0.3))
            + float(((truth / 0.3).exp() * right).sum(1).div((truth / 0.3).exp().sum(1)).log().mean())
        ),
    )
    return own, naive.gap(r, by_hand((0, 1)))


DOCUMENTS, KEYS = 16, 24


def retrieval(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ids and labels (count, M H), mask, answers (count, 1): each document names a key and its own id, the query asks for a key's document."""
    blocks, size = DOCUMENTS + 2, 4
    ids = torch.zeros(count, blocks, size, dtype=torch.long)
    keys = torch.rand(count, KEYS, generator=generator).argsort(1)[:, :DOCUMENTS]
    names = torch.arange(DOCUMENTS)
    answer = torch.randint(0, DOCUMENTS, (count, 1), generator=generator)
    ids[:, 0, -1], ids[:, 1:-1, -3], ids[:, 1:-1, -2], ids[:, 1:-1, -1] = 1, 2, 4 + keys, 4 + KEYS + names
    ids[:, -1, 0], ids[:, -1, 1], ids[:, -1, 2] = 2, 4 + keys.gather(1, answer)[:, 0], 3
    ids[:, -1, 3] = 4 + KEYS + answer[:, 0]
    labels = torch.full_like(ids, -100)
    labels[:, -1, 2:] = ids[:, -1, 2:]
    return ids.flatten(1), labels.flatten(1), ids > 0, answer


@functools.cache
def recall(weight: float) -> float:
    """Share of 200 rows whose document stands first by attention of layer 1, after 200 steps."""
    torch.manual_seed(0)
    model: Any = llama(vocab=4 + KEYS + DOCUMENTS, heads=2, kv_heads=2).float()
    for p in model.parameters():
        p.data.mul_(0.5 if p.dim() > 1 else 1)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        ids, labels, mask, answers = retrieval(16, generator)
        with ranking(model, mask, 1) as seen:
            logits = model(input_ids=ids, position_ids=blockrank_positions(mask), use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        assert seen.scores is not None
        loss = loss + weight * blockrank_aux_loss(seen.scores, labels, answers, mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    ids, labels, mask, answers = retrieval(200, torch.Generator().manual_seed(1))
    return float((rank_by_attention(model, ids, mask, labels, 1)[:, :1] == answers).float().mean())


@check(
    "blockrank",
    "16 documents, 200 steps with 0.1 of the loss of scores: share of queries whose document stands first by attention alone",
    above=0.9,
    control="the language model's loss alone",
)
def _() -> tuple[float, float]:
    return recall(0.1), recall(0.0)
