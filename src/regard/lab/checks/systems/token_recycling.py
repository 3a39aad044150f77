"""Checks of token-recycling."""

from __future__ import annotations

from typing import Any

import torch

from regard.generate import Draft, Shape, generate
from regard.generate.state import State
from regard.lab.checks.shared.decoding import accept_blindly, bigrams, continued, llama, tree_gap, wrong
from regard.lab.verification import check
from regard.zoo.systems.token_recycling import DEFAULT_80, TokenRecycling


class Forgetful(TokenRecycling):
    """The table is never refreshed."""

    def learn(self, *args: Any) -> None:
        pass


@check(
    "token-recycling",
    "greedy output, 400 tokens, a stub and a Llama: tokens that differ",
    below=0.0,
    control="guesses that nobody verifies",
)
def _() -> tuple[float, float]:
    stub, model = bigrams(), llama()
    cases = [(stub, torch.randint(200, (1, 7)), 400), (model, torch.randint(50, (2, 5)), 100)]
    found = []
    for one, ids, count in cases:
        truth = continued(one, ids, count)
        found.append([wrong(one, ids, TokenRecycling(), truth), wrong(one, ids, TokenRecycling(), truth, accept=accept_blindly)])
    return max(a for a, _ in found), min(b for _, b in found)


@check("token-recycling", "tokens a pass on the stub, 400 tokens", above=2.0, control="a table that is never refreshed")
def _() -> tuple[float, float]:
    stub, ids = bigrams(), torch.randint(200, (1, 7))
    return tuple(generate(stub, ids, how, max_new_tokens=400, ends=()).tokens_per_step for how in (TokenRecycling(), Forgetful()))


@check(
    "token-recycling",
    "table after three passes of a batch by loops (top-k at every node read, the last of equal tokens): entries that differ",
    below=0.0,
    control="the first of equal tokens",
)
def _() -> tuple[float, float]:
    model, ids, seen = llama(20), torch.randint(20, (2, 5)), []

    class Watched(TokenRecycling):
        def learn(self, state: State, draft: Draft, seen_: Any, path: Any, count: Any) -> None:
            seen.append((draft.tokens.clone(), seen_.logits.clone()))
            super().learn(state, draft, seen_, path, count)

    how = Watched(k=4, tree=[[0], [1], [3], [0, 0], [0, 2]])
    while len(seen) < 3:
        generate(model, ids, how, max_new_tokens=8, ends=())
    del seen[3:]
    how.table = None
    generate(model, ids, how, max_new_tokens=1, ends=())  # sizes the table; the last pass of a generation teaches nothing
    table = torch.zeros(20, 4, dtype=torch.long)
    first = table.clone()
    for tokens, logits in seen:
        known = set()
        for row in range(2):
            for node in range(6):
                word = int(tokens[row, node])
                table[word] = logits[row, node].sort(descending=True).indices[:4]
                if word not in known:
                    first[word] = table[word]
                known.add(word)
    for tokens, logits in seen:
        TokenRecycling.learn(how, None, Draft(tokens, torch.zeros(1, 6)), type("Seen", (), {"logits": logits}), None, None)
    assert how.table is not None and how.table.numel() == 20 * 4
    return float((how.table != table).sum()), float((how.table != first).sum())


@check("token-recycling", "drafts by look-ups in a loop: tokens that differ", below=0.0, control="each child's rank read as 0")
def _() -> tuple[float, float]:
    how = TokenRecycling()
    how.table = torch.randint(50, (50, 8), dtype=torch.int32)
    root = torch.randint(50, (3,))
    draft = how.draft(State(None, root, [], None))
    numbers = {path: at + 1 for at, path in enumerate(DEFAULT_80.paths)}
    assert sorted(len(path) for path in DEFAULT_80.paths) == [1] * 8 + [2] * 21 + [3] * 25 + [4] * 15 + [5] * 8 + [6] * 3
    gaps = [0, 0]
    for row in range(3):
        for path, at in numbers.items():
            word = flat = int(root[row])
            for rank in path:
                word, flat = int(how.table[word, rank]), int(how.table[flat, 0])
            gaps[0] += int(draft.tokens[row, at] != word)
            gaps[1] += int(draft.tokens[row, at] != flat)
    return float(gaps[0]), float(gaps[1])


@check("token-recycling", "logits of the 81 nodes equal those of their paths read as text", below=1e-9, control="positions in node order")
def _() -> tuple[float, float]:
    model, ids = llama(), torch.randint(50, (1, 11))

    def draft(shape: Shape = DEFAULT_80) -> Draft:
        torch.manual_seed(1)
        tokens = torch.randint(50, (1, 81))
        tokens[:, 0] = ids[:, -1]
        return Draft(tokens, shape.parents[None])

    return tree_gap(model, ids, draft()), tree_gap(model, ids, draft(), flat=True)
