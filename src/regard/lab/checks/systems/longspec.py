"""Checks of longspec."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regard.generate import State, generate
from regard.generate.hybrid import hybrid_tree_attention
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64, gap_with_gradients
from regard.lab.checks.shared.decoding import accept_blindly, continued, llama, taught, wrong
from regard.lab.verification import check
from regard.zoo.systems.longspec import LongSpec


def shaken(model: Any, **options: Any) -> LongSpec:
    draft = LongSpec(model, **options).double()
    for p in draft.parameters():
        p.data.add_(0.2 * torch.randn_like(p))
    return draft


@check(
    "longspec",
    "tree attention over 200 keys and a tree of 40, grouped heads, a tail of huge scores: gap to one masked softmax",
    below=1e-10,
    control="both parts weighed alike",
)
def _() -> tuple[float, float]:
    own, other = 0.0, 0.0
    for size, prefix in ((1.0, 200), (60.0, 200), (1.0, 0)):
        q, k, v = (
            torch.randn(2, 4, 40, 8, dtype=F64),
            torch.randn(2, 2, prefix + 40, 8, dtype=F64),
            torch.randn(2, 2, prefix + 40, 8, dtype=F64),
        )
        k[:, :, prefix:] *= size
        mask = (torch.rand(2, 40, 40) < 0.2).tril() | torch.eye(40).bool()
        s = torch.einsum("bhid,bhjd->bhij", q, k.repeat_interleave(2, 1)) * 8**-0.5
        seen = torch.cat((torch.ones(2, 40, prefix, dtype=torch.bool), mask), 2)
        truth = s.masked_fill(~seen[:, None], -torch.inf).softmax(-1) @ v.repeat_interleave(2, 1)
        own = max(own, naive.gap(hybrid_tree_attention(q, k, v, prefix, mask), truth))
        if prefix:
            halves = [
                s[..., part].masked_fill(~seen[:, None, :, part], -torch.inf).softmax(-1) @ v[:, :, part].repeat_interleave(2, 1)
                for part in (slice(prefix), slice(prefix, None))
            ]
            other = max(other, naive.gap(hybrid_tree_attention(q, k, v, prefix, mask), (halves[0] + halves[1]) / 2))
    return own, other


def by_hand(
    draft: LongSpec, model: Any, text: list[int], keys: Tensor, values: Tensor, sees: int, places: list[int] | None = None
) -> Tensor:
    """Logits of the text's last token; the target's first `sees` keys (Hkv, L, D) are read. Token by token and head by head."""
    e, n, d = model.model.embed_tokens.weight, len(text), 8
    places = list(range(n)) if places is None else places

    def norm(x: Tensor, layer: Any) -> Tensor:
        return x / (x.square().mean() + model.config.rms_norm_eps).sqrt() * layer.weight

    def turn(x: Tensor, place: int) -> Tensor:
        rates = 10000.0 ** (-torch.arange(4, dtype=F64) / 4) * place
        a, b = x[:4], x[4:]
        return torch.cat((a * rates.cos() - b * rates.sin(), a * rates.sin() + b * rates.cos()))

    h, outs = e[text[-1]], []
    q = draft.q(norm(h, draft.norm1))
    for at in range(4):
        g, seen = at // 2, range(max(0, n - 1 - draft.window), n)
        ks = [turn(draft.k(norm(e[text[j]], draft.norm1))[d * g : d * g + d], places[j]) for j in seen]
        vs = torch.stack([draft.v(norm(e[text[j]], draft.norm1))[d * g : d * g + d] for j in seen])
        p = naive.softmax(torch.stack([(turn(q[d * at : d * at + d], places[-1]) * k).sum() * d**-0.5 for k in ks]))
        outs.append(p @ vs)
    h = h + draft.out(torch.cat(outs))
    if sees > 0:
        q, outs = draft.cross_q(norm(h, draft.norm2)), []
        for at in range(4):
            p = naive.softmax(
                torch.stack([(turn(q[d * at : d * at + d], places[-1]) * keys[at // 2, j]).sum() * d**-0.5 for j in range(sees)])
            )
            outs.append(p @ values[at // 2, :sees])
        h = h + draft.cross_out(torch.cat(outs))
    y = norm(h, draft.norm3)
    gate = draft.gate(y)
    return model.lm_head(h + draft.down(gate * torch.sigmoid(gate) * draft.up(y)))


@check(
    "longspec",
    "training logits, two and three tokens stale, window 4, positions behind a sink and an offset: outputs and gradients equal loops",
    below=1e-4,
    control="a cache that is one token fresher",
)
def _() -> tuple[float, float]:
    model = llama().requires_grad_(False)
    draft, ids = shaken(model, window=4), torch.randint(1, 50, (2, 9))
    places = torch.tensor([0, 1, *range(40, 47)])
    own, other = 0.0, 0.0
    for stale, where in ((2, None), (3, places)):
        keys, values = torch.randn(2, 2, 2, 9, 8, dtype=F64)
        at = None if where is None else where.expand(2, -1)
        rows = [
            [
                [
                    by_hand(
                        draft,
                        model,
                        ids[b, : t + 1].tolist(),
                        keys[b],
                        values[b],
                        t + 1 - stale + more,
                        None if where is None else where[: t + 1].tolist(),
                    )
                    for t in range(9)
                ]
                for b in range(2)
            ]
            for more in (0, 1)
        ]
        truth, fresh = (torch.stack([torch.stack(row) for row in one]) for one in rows)
        found = draft(ids, keys, values, stale, at)
        own, other = (
            max(own, gap_with_gradients(found, truth, tuple(draft.parameters()))),
            max(other, naive.gap(draft(ids, keys, values, stale, at), fresh)),
        )
    return own, other


@check(
    "longspec",
    "target's keys and values behind t - 3 changed: change of the training output at t and before",
    below=0.0,
    control="at the tokens that read them",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    model = llama()
    draft, ids, kv = shaken(model, window=4), torch.randint(1, 50, (1, 12)), torch.randn(2, 1, 2, 12, 8, dtype=F64)
    other = kv.clone()
    other[:, :, :, 5] += 1
    a, b = (draft(ids, *x, stale=3) for x in (kv, other))
    return naive.gap(a[:, :8], b[:, :8]), naive.gap(a[:, 8:], b[:, 8:])


@check(
    "longspec",
    "a tree by loops (beams over whole levels, each node's own text): nodes and parents that differ",
    below=0.0,
    control="positions without depth",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    model = llama(20)
    draft, ids = shaken(model, window=6, levels=(3, 5, 4)), torch.randint(1, 20, (2, 11))
    trees: list[Any] = []

    class Watched(LongSpec):
        def draft(self, state: State) -> Any:
            found = super().draft(state)
            layer = state.host.cache.layers[-1]
            trees.append((found, [list(text) for text in state.texts], layer.keys.clone(), layer.values.clone(), state.host.valid.clone()))
            return found

    draft.__class__ = Watched
    generate(model, ids, draft, max_new_tokens=3, ends=())
    gaps = [0, 0]
    for found, texts, keys, values, valid in trees:
        for row in range(2):
            k, v = keys[row][:, valid[row]], values[row][:, valid[row]]
            for which in (0, 1):
                level, nodes, parents = [(0, 0.0)], [[texts[row][-1]]], [0]
                for width in (3, 5, 4):
                    chances = []
                    for node, score in level:
                        way = nodes[node][1:]
                        text = texts[row] + way
                        places = list(range(len(text))) if which == 0 else [*range(len(texts[row])), *[len(texts[row]) - 1] * len(way)]
                        # the window ends at the root: nodes behind it are seen beside it
                        wide = draft.window
                        draft.window = wide + len(way)
                        logits = by_hand(draft, model, text, k, v, k.shape[1], places)
                        draft.window = wide
                        chances += [(score + float(x), node, word) for word, x in enumerate(logits.log_softmax(-1))]
                    level = []
                    for score, node, word in sorted(chances, reverse=True)[:width]:
                        level.append((len(nodes), score))
                        nodes.append([*nodes[node], word])
                        parents.append(node)
                gaps[which] += sum(a != b[-1] for a, b in zip(found.tokens[row].tolist(), nodes, strict=True))
                gaps[which] += sum(a != b for a, b in zip(found.parents[row].tolist(), parents, strict=True))
    return float(gaps[0]), float(gaps[1])


@check(
    "longspec",
    "greedy output, drafts at random, three trees: tokens that differ",
    below=0.0,
    control="guesses that nobody verifies",
)
def _() -> tuple[float, float]:
    model, ids, found = llama(), torch.randint(1, 50, (1, 6)), []
    truth = continued(model, ids, 60)
    for levels in ((4, 16, 16, 16, 16), (2,), (3, 5, 2)):
        draft = shaken(model, levels=levels)
        found.append([wrong(model, ids, draft, truth), wrong(model, ids, draft, truth, accept=accept_blindly)])
    return max(a for a, _ in found), min(b for _, b in found)


@check(
    "longspec", "tokens a pass of a draft trained for 40 steps on text that a table makes", above=3.0, control="a draft of random weights"
)
def _() -> tuple[float, float]:
    table = torch.randperm(30)

    def texts() -> Tensor:
        rows = [torch.randint(30, (16,))]
        for _ in range(23):
            rows.append(torch.where(torch.rand(16) < 0.9, table[rows[-1]], torch.randint(30, (16,))))
        return torch.stack(rows, 1)

    model = taught(llama(30, dim=32).float(), texts, 80, 1e-2)
    draft, ids = LongSpec(model, window=8, levels=(2, 2, 2, 2)), texts()[:1, :5]

    def speed() -> float:
        out = generate(model, ids, draft, max_new_tokens=60, ends=())
        assert max(k.shape[2] for k, _ in draft.kept) <= 9  # constant, whatever the length
        return out.tokens_per_step

    first = {key: x.clone() for key, x in draft.state_dict().items()}
    for p in draft.parameters():
        p.data.add_(0.3 * torch.randn_like(p))
    before = speed()
    draft.load_state_dict(first)
    optimizer = torch.optim.Adam(draft.parameters(), 1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        draft.loss(texts()).backward()
        optimizer.step()
    return speed(), before
