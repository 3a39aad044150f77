"""DBSA: demonstrations encoded once under a block-sparse mask, retrieved by group and read from the cache (id 250; Xiao et al., 2025).

group u reads group w <= u iff w == u or w < anchors or w >= u - previous;  a query reads the best groups by BM25, their keys placed
one after another
"""

from __future__ import annotations

import math
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from regard.algebra import Causal, Rope
from regard.catalog.registry import register
from regard.engine.door import attend
from regard.errors import RegardError
from regard.nn.attention import Attention
from regard.nn.decoder import Block, Decoder


class BM25:
    """Okapi BM25 over whitespace tokens in lower case, idf = ln(1 + (N - n + 0.5) / (n + 0.5))."""

    def __init__(self, texts: Sequence[str], k1: float = 1.5, b: float = 0.75):
        self.counts = [Counter(self.words(text)) for text in texts]
        self.k1, self.b = k1, b
        self.sizes = [sum(count.values()) for count in self.counts]
        self.mean = sum(self.sizes) / max(1, len(texts)) or 1.0  # texts without a word score nothing anyway
        self.holding = Counter(word for count in self.counts for word in count)

    @staticmethod
    def words(text: str) -> list[str]:
        return re.findall(r"\S+", text.lower())

    def scores(self, query: str) -> list[float]:
        found = []
        for count, size in zip(self.counts, self.sizes, strict=True):
            norm = self.k1 * (1 - self.b + self.b * size / self.mean)
            total = 0.0
            for word in self.words(query):
                n = self.holding[word]
                idf = math.log(1 + (len(self.counts) - n + 0.5) / (n + 0.5))
                total += idf * count[word] * (self.k1 + 1) / (count[word] + norm) if count[word] else 0.0
            found.append(total)
        return found


def group_mask(sizes: Sequence[int], anchors: int = 1, previous: int = 2) -> Tensor:
    """(L, L) bool of groups of `sizes` tokens: causal, and only the own group, the first `anchors` and the `previous` before it."""
    group = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    u, w = group[:, None], group
    return ((w == u) | (w < anchors) | (w >= u - previous)) & torch.ones(len(group), len(group), dtype=torch.bool).tril()


@dataclass
class Account:
    """tokens: run through the model. bytes: of the cached keys and values. read: cached tokens each query has read."""

    encoded: int = 0
    tokens: int = 0
    bytes: int = 0
    read: list[int] = field(default_factory=list)


@register("dbsa", kind="policy")
class DemonstrationCache:
    """Groups of demonstrations for a `Decoder` of softmax layers with rotary positions.

    anchors, previous: of the encoding mask. selected: groups a query reads, group 0 always among them (None: all). reposition: keys are
    stored before rotation and placed one after another at use; False keeps the positions they were encoded at.
    """

    def __init__(self, model: Decoder, *, anchors: int = 1, previous: int = 2, selected: int | None = 5, reposition: bool = True):
        layers = [block.mixer for block in model.blocks]
        if any(getattr(layer, "rope", None) is None or type(layer).__name__ != "Attention" for layer in layers):
            raise RegardError("the model has layers other than Attention with rotary positions (Decoder('softmax', rope=True))")
        if min(anchors, previous) < 0 or (selected is not None and selected < 1):
            raise RegardError(f"anchors={anchors}, previous={previous}, selected={selected}; expected 0 or more, and at least 1 or None")
        self.model, self.anchors, self.previous, self.selected, self.reposition = model, anchors, previous, selected, reposition
        self.rope, self.account = Rope(), Account()
        self.groups: list[list[tuple[Tensor, Tensor]]] = []  # by layer, by group: unrotated k and v (1, Hkv, n, D)
        self.starts: list[int] = []
        self.index: BM25 | None = None

    def run(self, tokens: Tensor, past: list[tuple[Tensor, Tensor]] | None, places: Tensor, first: int, mask: Tensor | None) -> Tensor:
        """Hidden states of tokens (1, n) after `past`, whose keys stand at `places`; keeps the new k and v in self.fresh."""
        x = self.model.embed(tokens)
        at = torch.arange(first, first + tokens.shape[1])
        self.fresh: list[tuple[Tensor, Tensor]] = []
        for number, block in enumerate(cast(list[Block], list(self.model.blocks))):
            layer, y = cast(Attention, block.mixer), block.norm1(x)
            q, k, v = (f(y).unflatten(-1, (-1, layer.value_dim)).transpose(1, 2) for f in (layer.q, layer.k, layer.v))
            self.fresh.append((k, v))
            before_k, before_v = past[number] if past else (k[..., :0, :], v[..., :0, :])
            keys = torch.cat((self.rope.rotate(before_k, places), self.rope.rotate(k, at)), -2)
            o = attend(self.rope.rotate(q, at), keys, torch.cat((before_v, v), -2), mask=Causal() if mask is None else mask)
            x = x + block.scale1(layer.close(o, y))
            x = x + block.scale2(block.mlp(block.norm2(x)))
        self.account.tokens += tokens.shape[1]
        return x

    @torch.no_grad()
    def encode_once(self, groups: Sequence[Tensor], texts: Sequence[str]) -> None:
        """groups: token ids (n,) each, with the text that retrieval looks at."""
        if not groups or len(groups) != len(texts):
            raise RegardError(f"{len(groups)} groups and {len(texts)} texts; expected as many, at least one")
        sizes = [len(group) for group in groups]
        self.run(torch.cat(list(groups))[None], None, torch.zeros(0), 0, group_mask(sizes, self.anchors, self.previous))
        self.groups = [list(zip(k.split(sizes, 2), v.split(sizes, 2), strict=True)) for k, v in self.fresh]
        self.starts = [sum(sizes[:n]) for n in range(len(sizes))]
        self.index = BM25(texts)
        held = sum(x.numel() * x.element_size() for layer in self.groups for pair in layer for x in pair)
        self.account = Account(encoded=sum(sizes), bytes=held)

    def retrieve(self, text: str) -> list[int]:
        """Ids of the groups to read, ascending: 0 and the best of the others."""
        assert self.index is not None
        scores = self.index.scores(text)
        count = len(scores) if self.selected is None else min(self.selected, len(scores))
        best = sorted(range(1, len(scores)), key=lambda n: (-scores[n], n))[: count - 1]
        return sorted([0, *best])

    @torch.no_grad()
    def answer(self, tokens: Tensor, text: str = "", chosen: Sequence[int] | None = None) -> Tensor:
        """Logits (n, vocab) of query ids (n,) after the retrieved (or `chosen`) groups; only the query runs through the model."""
        if self.index is None:
            raise RegardError("no demonstrations are cached; call encode_once first")
        chosen = self.retrieve(text) if chosen is None else list(chosen)
        if not chosen or not all(0 <= n < len(self.starts) for n in chosen):
            raise RegardError(f"chosen={chosen}; expected ids of the {len(self.starts)} encoded groups, at least one")
        past = [(torch.cat([layer[n][0] for n in chosen], 2), torch.cat([layer[n][1] for n in chosen], 2)) for layer in self.groups]
        read = past[0][0].shape[2]
        sizes = [self.groups[0][n][0].shape[2] for n in chosen]
        kept = [torch.arange(size) + self.starts[n] for n, size in zip(chosen, sizes, strict=True)]
        places = torch.arange(read) if self.reposition else torch.cat(kept)
        first = read if self.reposition else self.account.encoded
        self.account.read.append(read)
        return self.model.logits(self.run(tokens[None], past, places, first, None))[0]

    def evaluate(self, queries: Sequence[tuple[Tensor, str, int]], labels: Tensor) -> dict[str, float]:
        """(ids, text, index of the right label) each -> accuracy, mean seconds and mean cached tokens a query, bytes of the cache."""
        begin, before = time.perf_counter(), len(self.account.read)
        right = sum(self.classify(tokens, text, labels) == truth for tokens, text, truth in queries)
        read = self.account.read[before:]
        seconds = (time.perf_counter() - begin) / len(queries)
        return {"accuracy": right / len(queries), "seconds": seconds, "read": sum(read) / len(read), "bytes": float(self.account.bytes)}

    def classify(self, tokens: Tensor, text: str, labels: Tensor) -> int:
        """Index of the most likely of `labels` (token ids) after the query."""
        return int(self.answer(tokens, text)[-1, labels].argmax())


@dataclass(frozen=True)
class ManyShot:
    """A classification task: groups of demonstrations "word ... word label", each with its text, and queries as `evaluate` takes them."""

    groups: list[Tensor]
    texts: list[str]
    queries: list[tuple[Tensor, str, int]]
    labels: Tensor


def many_shot_task(
    groups: int = 16, per_group: int = 6, words: int = 2, labels: int = 8, queries: int = 32, *, generator: torch.Generator
) -> ManyShot:
    """Every demonstration has `words` words of its own and a label drawn by coin; a query repeats one's words and asks for its label, so it
    can be answered from that demonstration alone. Tokens: labels first, then words; a group's text spells its words."""
    count = groups * per_group
    answers = torch.randint(labels, (count,), generator=generator)
    spelled = labels + torch.randperm(count * words, generator=generator).view(count, words)
    rows = torch.cat((spelled, answers[:, None]), 1).view(groups, -1)
    texts = [" ".join(f"w{x}" for x in part.flatten().tolist()) for part in spelled.view(groups, per_group, words)]
    asked = torch.randint(count, (queries,), generator=generator).tolist()
    found = [(spelled[n], " ".join(f"w{x}" for x in spelled[n].tolist()), int(answers[n])) for n in asked]
    return ManyShot(list(rows), texts, found, torch.arange(labels))


__all__ = ["BM25", "Account", "DemonstrationCache", "ManyShot", "group_mask", "many_shot_task"]
