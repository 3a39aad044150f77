"""Checks of attention-pattern-injection."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard import models
from regard.interpret.patterns import Predicate, contexts, held, matching, sentences, shifted
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64, gap_with_gradients
from regard.lab.checks.shared.layers import drawn
from regard.lab.verification import check
from regard.nn.attention import Attention
from regard.nn.decoder import Decoder
from regard.nn.embedder import Embedder
from regard.tasks.documents import repeats
from regard.tasks.training import fit
from regard.zoo.analysis.attention_pattern_injection import PAL, Plan, Use, WithAdapters, discover, inject, standing_out


def wrong_pairs(predicate: Predicate, ids: Tensor, hand: Callable[[list[int], int, int], bool]) -> int:
    found = predicate(ids)
    return sum(
        bool(found[b, i, j]) != hand(row, i, j) for b, row in enumerate(ids.tolist()) for i in range(len(row)) for j in range(len(row))
    )


def spans(row: list[int], begin: int, end: int) -> list[tuple[int, int]]:
    stops = [n for n, x in enumerate(row) if x == end]
    return list(zip([n for n, x in enumerate(row) if x == begin], stops, strict=False))


@check(
    "attention-pattern-injection",
    "pairs of the predicates on 50 texts by loops, and rows without a pair: how many are wrong",
    below=0.0,
    control="neighbours on the other side",
)
def _() -> tuple[float, float]:
    ids = torch.randint(2, 9, (50, 14))
    ids[:, 0], ids[:, 4], ids[:, 5], ids[:, 11] = 0, 1, 0, 1  # two sentences, two tokens behind them
    wrong = wrong_pairs(matching(), ids, lambda x, i, j: x[i] == x[j] and i != j)
    wrong += wrong_pairs(matching((0, 1, 5), itself=True), ids, lambda x, i, j: x[i] == x[j] and x[i] not in (0, 1, 5))
    wrong += wrong_pairs(sentences(0, 1), ids, lambda x, i, j: any(a <= i <= b and a <= j <= b for a, b in spans(x, 0, 1)))
    wrong += wrong_pairs(contexts(1), ids, lambda x, i, j: i == 0 or (i < x.index(1)) == (j < x.index(1)))
    wrong += wrong_pairs(contexts(1, None), ids, lambda x, i, j: (i < x.index(1)) == (j < x.index(1)))
    wrong += wrong_pairs(shifted(1), ids, lambda x, i, j: j == i + 1) + wrong_pairs(shifted(-2), ids, lambda x, i, j: i - 2 <= j < i)
    logits, pattern = torch.randn(3, 2, 6, 6).masked_fill(torch.ones(6, 6).triu(1).bool(), -math.inf), torch.rand(3, 6, 6) < 0.3
    for flat in (False, True):
        found = held(logits, pattern, flat)
        for b, h, i in ((b, h, i) for b in range(3) for h in range(2) for i in range(6)):
            pairs = [j for j in range(i + 1) if pattern[b, i, j]] or list(range(i + 1))
            own = [(0.0 if flat else float(logits[b, h, i, j])) if j in pairs else -math.inf for j in range(6)]
            wrong += own != found[b, h, i].tolist()
    return float(wrong), float(wrong_pairs(shifted(1), ids, lambda x, i, j: j == i - 1))


def bert(layers: int = 2) -> Any:
    from transformers import BertConfig, BertModel

    options = {"num_attention_heads": 4, "max_position_embeddings": 20, "attn_implementation": "sdpa"}
    torch.manual_seed(3)
    made = BertModel(
        BertConfig(vocab_size=12, hidden_size=16, num_hidden_layers=layers, intermediate_size=24, **options), add_pooling_layer=False
    )
    return drawn(made.eval(), 0.1)


def texts() -> tuple[Tensor, Tensor]:
    ids, real = torch.randint(2, 9, (3, 11)), torch.ones(3, 11, dtype=torch.bool)
    ids[:, 0], ids[:, 5] = 0, 1
    real[1, 8:], real[2, 6:] = False, False
    return ids, real


def attended(layer: Any, x: Tensor, real: Tensor, shape: Callable[[int, Tensor], Tensor]) -> Tensor:
    """BERT's attention, its output and norm; shape(head, logits (B, T, T)) gives a head's weights."""
    own, outs = layer.attention.self, []
    for h in range(4):
        rows = slice(4 * h, 4 * h + 4)
        q, k, v = (x @ p.weight[rows].T + p.bias[rows] for p in (own.query, own.key, own.value))
        outs.append(shape(h, (q @ k.mT / 2).masked_fill(~real[:, None], -math.inf)) @ v)
    out = layer.attention.output
    return out.LayerNorm(out.dense(torch.cat(outs, -1)) + x)  # type: ignore[no-any-return]


def fed(layer: Any, h: Tensor, extra: Tensor | float = 0.0) -> Tensor:
    return layer.output.LayerNorm(layer.output.dense(F.gelu(layer.intermediate.dense(h))) + h + extra)  # type: ignore[no-any-return]


def followed(s: Tensor, pattern: Tensor, even: bool) -> Tensor:
    """Weights by rows: over the visible pairs, or all visible keys where there are none."""
    rows = []
    for b in range(len(s)):
        for i in range(s.shape[1]):
            seen = [j for j in range(s.shape[2]) if float(s[b, i, j].detach()) > -math.inf]
            pairs = [j for j in seen if pattern[b, i, j]] or seen
            e = torch.stack([torch.ones((), dtype=F64) if even else (s[b, i, j] - s[b, i, seen].max()).exp() for j in pairs])
            rows.append(torch.zeros(s.shape[2], dtype=F64).index_put((torch.tensor(pairs),), e / e.sum()))
    return torch.stack(rows).view_as(s)


@check(
    "attention-pattern-injection",
    "BERT, two layers, padded, heads masked and heads synthesised: states and gradients equal rows by hand; the model afterwards as before",
    below=1e-9,
    control="nothing injected",
)
def _() -> tuple[float, float]:
    model, (ids, real) = bert(), texts()
    plan: Plan = {(0, 1): Use(matching()), (0, 3): Use(shifted(1), True), (1, 0): Use(sentences(0, 1)), (1, 2): Use(contexts(1), True)}
    before = model(ids, attention_mask=real).last_hidden_state
    with inject(model, plan, ids):
        found = model(ids, attention_mask=real).last_hidden_state
    x = model.embeddings(ids)
    for n, layer in enumerate(model.encoder.layer):

        def shape(h: int, s: Tensor, n: int = n) -> Tensor:
            use = plan.get((n, h))
            return s.softmax(-1) if use is None else followed(s, use.predicate(ids), use.synthesise)

        x = fed(layer, attended(layer, x, real, shape))
    same = torch.equal(before, model(ids, attention_mask=real).last_hidden_state)
    leaves = tuple(p for name, p in model.named_parameters() if "encoder" in name and "key.bias" not in name)
    own = gap_with_gradients(found[real], x[real], leaves)
    return own if same else 1.0, naive.gap(before[real], x[real])


@check(
    "attention-pattern-injection",
    "adapters in BERT: zero at first (bit-equal, both ways of starting); drawn ones equal the released layer by hand, with gradients, model frozen",
    below=1e-9,
    control="added behind the norm",
)
def _() -> tuple[float, float]:
    model, (ids, real) = bert(), texts()
    uses = [Use(matching()), Use(sentences(0, 1)), Use(shifted(-1), True), Use(shifted(1), True), None, None]
    before, wrong = model(ids, attention_mask=real).last_hidden_state, 0.0
    for start in ("up", "all"):
        fresh = WithAdapters(model, 16, uses, width=12, start=start).double()
        wrong += not torch.equal(fresh(ids, attention_mask=real, real=real).last_hidden_state, before)
        wrong += any(bool(p.any()) for p in fresh.pals.parameters()) != (start == "up")
    whole = WithAdapters(model.requires_grad_(False), 16, uses, width=12).double()
    drawn(whole.pals)
    found = whole(ids, attention_mask=real, real=real).last_hidden_state

    def extra(pal: PAL, x: Tensor) -> Tensor:
        h, outs = x @ pal.down.weight.T + pal.down.bias, []
        for n, use in enumerate(uses):
            rows = slice(2 * n, 2 * n + 2)
            q, k, v = (h @ p.weight[rows].T + p.bias[rows] for p in (pal.q, pal.k, pal.v))
            s = (q @ k.mT / 2**0.5).masked_fill(~real[:, None], -math.inf)
            outs.append((s.softmax(-1) if use is None else followed(s, use.predicate(ids), use.synthesise)) @ v)
        y = torch.cat(outs, -1) @ pal.up.weight.T + pal.up.bias
        return y * 0.5 * (1 + torch.erf(y / 2**0.5))

    def hand(inside: bool) -> Tensor:
        x = model.embeddings(ids)
        for layer, pal in zip(model.encoder.layer, whole.pals, strict=True):
            h, more = attended(layer, x, real, lambda head, s: s.softmax(-1)), extra(pal, x)  # type: ignore[arg-type]
            x = fed(layer, h, more) if inside else fed(layer, h) + more
        return x

    leaves = tuple(p for name, p in whole.pals.named_parameters() if "k.bias" not in name)
    return wrong + gap_with_gradients(found[real], hand(True)[real], leaves), naive.gap(found[real], hand(False)[real])


@check(
    "attention-pattern-injection",
    "relevance in BERT, padded, batch by batch: loops over plain attention's maps; 1 for a planted head, the pattern's density for even weights",
    below=1e-9,
    control="over the padded length",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    model, (ids, real) = bert(), texts()
    predicates = {"match": matching(), "before": shifted(-1)}
    found = discover(model, [(ids[:2], real[:2]), (ids[2:], real[2:])], predicates)
    model.set_attn_implementation("eager")
    maps = model(ids, attention_mask=real, output_attentions=True).attentions
    truth, padded = torch.zeros(2, 2, 4, dtype=F64), torch.zeros(2, 2, 4, dtype=F64)
    for b in range(3):
        length = int(real[b].sum())
        for i in range(length):
            for j in range(length):
                for n, pair in enumerate((ids[b, i] == ids[b, j] and i != j, j == i - 1)):
                    for layer in range(2):
                        truth[n, layer] += maps[layer][b, :, i, j] * float(pair) / length / 3
                        padded[n, layer] += maps[layer][b, :, i, j] * float(pair) / 11 / 3
    gap = max(naive.gap(found[name].scores, truth[n]) for n, name in enumerate(predicates))
    model.set_attn_implementation("sdpa")
    table = found["match"].scores.flatten()
    mean = sum(table.tolist()) / 8
    least = mean + 1.5 * math.sqrt(sum((x - mean) ** 2 for x in table.tolist()) / 8)
    named = [(n // 4, n % 4) for n in range(8) if float(table[n]) >= least]
    gap += sorted(standing_out(found["match"], 1.5)) != named
    with inject(model, {(1, 2): Use(matching(itself=True))}, ids):
        gap = max(gap, abs(float(discover(model, [(ids, real)], {"match": matching(itself=True)})["match"].scores[1, 2]) - 1))
    for p in model.encoder.layer[0].attention.self.query.parameters():
        p.zero_()
    density = sum(float(matching()(ids[b : b + 1, : int(real[b].sum())]).double().mean()) for b in range(3)) / 3
    even = discover(model, [(ids, real)], predicates)["match"].scores[0]
    return max(gap, naive.gap(even, torch.full((4,), density, dtype=F64))), naive.gap(found["match"].scores, padded[0])


class Tagger(nn.Module):
    """A layer of attention in both directions over words, and a line to two classes a token."""

    def __init__(self, predicate: Predicate | None):
        super().__init__()
        self.host = Embedder(Decoder([Attention(32, 4, causal=False)], vocab=200, dim=32, layers=1))
        self.line, self.predicate = nn.Linear(32, 2), predicate

    def forward(self, ids: Tensor) -> Tensor:
        with ExitStack() as stack:
            if self.predicate is not None:
                stack.enter_context(inject(self.host, {(0, 0): Use(self.predicate)}, ids))
            return self.line(self.host.states(self.host.embed(ids), torch.ones_like(ids).bool()))  # type: ignore[no-any-return]


@functools.cache
def tagging_error(kind: str, seed: int = 0) -> float:
    """Share of tokens of 1000 texts that are wrongly told to be repeated or not, after 250 steps."""
    kinds: dict[str, Predicate | None] = {"match": matching(), "none": None, "shuffled": lambda ids: matching()(ids.flip(1))}
    torch.manual_seed(seed)
    model = Tagger(kinds[kind])
    fit(model, lambda g: repeats(32, g), lambda b: F.cross_entropy(model(b[0]).flatten(0, 1), b[1].flatten()), 250, lr=5e-3, seed=seed)
    ids, label = repeats(1000, torch.Generator().manual_seed(9))
    with torch.no_grad():
        return float((model(ids).argmax(-1) != label).double().mean())


@check(
    "attention-pattern-injection",
    "repeated words of 24 drawn from 200, one layer with one head held to matching tokens: share of tokens told wrongly",
    below=0.005,
    control="the head held to the pattern of other tokens",
)
def _() -> tuple[float, float]:
    return tagging_error("match"), tagging_error("shuffled")


@check(
    "attention-pattern-injection",
    "the same without injection, over the error with it and one in a thousand",
    above=10.0,
    control="with the pattern of other tokens, over that without injection",
)
def _() -> tuple[float, float]:
    return tagging_error("none") / (tagging_error("match") + 1e-3), tagging_error("shuffled") / tagging_error("none")


@check(
    "attention-pattern-injection",
    "causal transformers model (tiny): a masked head's weights by eager attention and the pattern; the others' as they were",
    below=1e-5,
    control="the other head of the layer",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    from regard.taps import read

    model, ids = models.load("tiny"), torch.randint(97, 103, (2, 9))
    eager = models.load("tiny", attn_implementation="eager")(ids, output_attentions=True).attentions[0].double()
    with inject(model, {(0, 2): Use(matching())}, ids), read(model, "weights", layers=[0]) as seen:
        model(ids)
    own = seen["weights", 0].double()
    truth = eager.clone()
    truth[:, 2] = followed(eager[:, 2].log(), matching()(ids), False)
    return naive.gap(own, truth), naive.gap(own[:, 2], eager[:, 1])
