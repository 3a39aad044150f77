"""Checks of medusa."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import torch
from torch import Tensor

from regard.generate import Draft, Shape, State, Typical, generate
from regard.generate.tree import best_shape
from regard.lab import naive
from regard.lab.checks.shared.decoding import accept_blindly, continued, llama, taught, tree_gap, wrong
from regard.lab.verification import check
from regard.zoo.systems.medusa import MC_SIM_7B_63, Medusa


def markov(rows: int, length: int, vocab: int = 12) -> Tensor:
    """Text in which each two tokens are followed by one of two, nine times in ten by the first."""
    table = torch.stack([torch.randperm(vocab, generator=torch.Generator().manual_seed(i))[:2] for i in range(vocab * vocab)])
    ids = torch.randint(vocab, (rows, 2))
    for _ in range(length - 2):
        second = (torch.rand(rows) < 0.1).long()
        ids = torch.cat((ids, table[ids[:, -2] * vocab + ids[:, -1], second][:, None]), 1)
    return ids


@functools.cache
def trained() -> tuple[Any, Medusa]:
    """A small model of that text, and heads trained on it."""
    model = taught(llama(12, dim=48).float(), lambda: markov(24, 32), 250)
    heads = Medusa(model, 4)
    optimizer = torch.optim.Adam(heads.parameters(), 3e-3)
    for _ in range(100):
        ids = markov(24, 32)
        with torch.no_grad():
            hidden = model.model(ids, use_cache=False).last_hidden_state
        optimizer.zero_grad()
        heads.loss(hidden, ids).backward()
        optimizer.step()
    return model, heads


class Blind(Medusa):
    """Guesses drawn at random."""

    def draft(self, state: State) -> Draft:
        found = super().draft(state)
        found.tokens[:, 1:] = torch.randint(12, found.tokens[:, 1:].shape)
        return found


@check(
    "medusa",
    "greedy output, 300 tokens, heads untrained and trained: tokens that differ",
    below=0.0,
    control="guesses that nobody verifies",
)
def _() -> tuple[float, float]:
    found = []
    for model, heads in (trained(), (trained()[0], Medusa(trained()[0], 4))):
        ids = markov(1, 5)
        truth = continued(model, ids, 300)
        found.append([wrong(model, ids, heads, truth), wrong(model, ids, heads, truth, accept=accept_blindly)])
    return max(a for a, _ in found), min(b for _, b in found)


@check("medusa", "tokens a pass on order-2 text, heads trained", above=1.5, control="a chain of three random tokens")
def _() -> tuple[float, float]:
    model, heads = trained()
    blind = Blind(model, 4, tree=[[0], [0, 0], [0, 0, 0]])
    return tuple(generate(model, markov(4, 5), how, max_new_tokens=100, ends=()).tokens_per_step for how in (heads, blind))


@check("medusa", "logits of the 64 nodes equal those of their paths read as text", below=1e-9, control="positions in node order")
def _() -> tuple[float, float]:
    model, ids = llama(), torch.randint(50, (1, 11))
    tokens = torch.cat((ids[:, -1:], torch.randint(50, (1, 63))), 1)
    drafts = [Draft(tokens, MC_SIM_7B_63.parents[None]) for _ in range(2)]
    return tree_gap(model, ids, drafts[0]), tree_gap(model, ids, drafts[1], flat=True)


@check("medusa", "at first every head's logits are the output layer's", below=0.0, control="biases drawn, as in the released code")
def _() -> tuple[float, float]:
    model, hidden = llama(), torch.randn(3, 32, dtype=torch.float64)
    truth = model.lm_head(hidden)
    return tuple(max(naive.gap(one, truth) for one in Medusa(model, 4, zero_bias=kind)(hidden)) for kind in (True, False))


@check(
    "medusa",
    "heads, both losses and the guesses of a tree, written out: gap of values and gradients",
    below=1e-10,
    control="head k taught the token after t + k",
)
def _() -> tuple[float, float]:
    model = llama(20)
    heads = Medusa(model, 3, layers=2, zero_bias=False).double()
    for p in heads.parameters():
        p.data.add_(0.3 * torch.randn_like(p))
    ids = torch.randint(20, (2, 9))
    hidden = model.model(ids, use_cache=False).last_hidden_state.detach().requires_grad_()
    blocks: list[Any] = list(heads.heads)

    def by_hand(late: int) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for k, head in enumerate(blocks, 1):
            rows = []
            for b, t in itertools.product(range(2), range(9 - k - late)):
                x = hidden[b, t]
                for block in head[:2]:
                    y = block.linear.weight @ x + block.linear.bias
                    x = x + y * torch.sigmoid(y)
                rows.append(-(head[2].weight @ x).log_softmax(-1)[ids[b, t + k + late]])
            total = total + 0.8**k * torch.stack(rows).mean()
        return total

    found = [naive.gap(heads.loss(hidden, ids), by_hand(late)) for late in (1, 0)]
    slopes = [torch.autograd.grad(loss, [hidden, *heads.parameters()]) for loss in (heads.loss(hidden, ids), by_hand(1))]
    slope = max(naive.gap(a, b) for a, b in zip(*slopes, strict=True))
    logits = model(ids, use_cache=False).logits
    own = -torch.stack([logits[b, t].log_softmax(-1)[ids[b, t + 1]] for b in range(2) for t in range(8)]).mean()
    before = torch.randn_like(logits)
    was = before.softmax(-1)
    apart = (was * (was.log() - logits.log_softmax(-1))).sum(-1).mean()
    joint = max(
        naive.gap(heads.joint_loss(model, ids), own + 0.2 * by_hand(1)),
        naive.gap(heads.joint_loss(model, ids, weight=0.5, before=before), apart + 0.5 * by_hand(1)),
    )
    heads.shape = Shape.of([[0], [2], [0, 1], [2, 0], [2, 0, 3]])
    draft = heads.draft(State(None, ids[:, -1], [], hidden[:, -1]))
    order = heads(hidden[:, -1]).sort(-1, descending=True).indices
    want = torch.stack([ids[:, -1], order[0][:, 0], order[0][:, 2], order[1][:, 1], order[1][:, 0], order[2][:, 3]], 1)
    return max(found[0], slope, joint, float((draft.tokens != want).sum())), found[1]


@check("medusa", "typical acceptance by loops over random trees: rows that differ", below=0.0, control="eps and delta exchanged")
def _() -> tuple[float, float]:
    wrong_rows = [0, 0]
    for _ in range(40):
        parents = torch.tensor([[0, *(int(torch.randint(i, ())) for i in range(1, 12))]])
        draft, logits = Draft(torch.randint(6, (1, 12)), parents), 1.5 * torch.randn(1, 12, 6)
        best: tuple[int, float, int] = (0, 0.0, 0)
        for node in range(12):
            depth, likely, at, fits = 0, 0.0, node, True
            while at:
                up = int(parents[0, at])
                p = (logits[0, up] / 0.7).softmax(-1)
                entropy = -sum(float(x) * math.log(float(x) + 1e-5) for x in p)
                own = float(p[draft.tokens[0, at]])
                fits &= own > min(0.09, 0.3 * math.exp(-entropy))
                depth, likely, at = depth + 1, likely + math.log(own), up
            if fits and depth and (depth, likely) > best[:2]:
                best = (depth, likely, node)
        truth = best[2], int(logits[0, best[2]].argmax())
        for at, rule in enumerate((Typical(), Typical(eps=0.3, delta=0.09))):
            found = rule(draft, logits)
            wrong_rows[at] += (int(found[0]), int(found[1])) != truth
    return float(wrong_rows[0]), float(wrong_rows[1])


@check(
    "medusa",
    "the searched tree of 20 nodes has the largest products of accuracies: loss of their sum",
    below=1e-12,
    control="the first 20 of the fixed tree",
)
def _() -> tuple[float, float]:
    a = torch.rand(3, 5, dtype=torch.float64).sort(-1, descending=True).values * 0.6

    def worth(paths: Any) -> list[float]:
        return sorted((math.prod(float(a[d, r]) for d, r in enumerate(path)) for path in paths), reverse=True)

    every = [path for depth in (1, 2, 3) for path in itertools.product(range(5), repeat=depth)]
    best = sum(worth(every)[:20])
    fixed = [path for path in MC_SIM_7B_63.paths if max(path) < 5 and len(path) < 4][:20]
    model, heads = trained()
    ids = markov(6, 20)
    hits = heads.accuracies(model, ids, 3)
    hidden = model.model(ids, use_cache=False).last_hidden_state
    for k, r in itertools.product(range(4), range(3)):
        order = heads(hidden)[k].sort(-1, descending=True).indices
        assert abs(float(hits[k, r]) - float((order[:, : 20 - k - 2, r] == ids[:, k + 2 :]).double().mean())) < 1e-9
    assert len(heads.search_tree(model, ids, 9, 3).paths) == 9
    return best - sum(worth(best_shape(a, 20).paths)), best - sum(worth(fixed))
