"""Checks of hidden-transfer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard import models
from regard.generate import Draft, Host, Seen, State
from regard.generate.tree import within
from regard.generate.tuning import states
from regard.lab import naive
from regard.lab.checks.shared.decoding import accept_blindly, continued, llama, wrong
from regard.lab.verification import check
from regard.zoo.systems.hidden_transfer import HiddenTransfer


def shaken(model: Any, layers: list[int]) -> HiddenTransfer:
    maps = HiddenTransfer(model, layers).double()
    for p in maps.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    return maps


def alone(model: Any, maps: HiddenTransfer, text: Tensor, late: int = 1) -> Tensor:
    """Logits (1 + k, V) of the last token of text (L,) and of its pseudo tokens, which stand behind it as the layers run one by one."""
    x, places = model.model.embed_tokens(text[None]), list(range(len(text)))
    for number, layer in enumerate(model.model.layers):
        for i, (at, one) in enumerate(zip(maps.layers, maps.maps, strict=True), 1):
            if at == number:
                x = torch.cat((x, (x[:, len(text) - 1] @ one.weight.T + one.bias)[:, None]), 1)
                places.append(len(text) - 1 + late * i)
        n = len(places)
        turned = model.model.rotary_emb(x, torch.tensor([places]))
        x = layer(x, attention_mask=torch.ones(1, 1, n, n, dtype=torch.bool).tril(), position_embeddings=turned)
    return model.lm_head(model.model.norm(x))[0, len(text) - 1 :]


@check(
    "hidden-transfer",
    "a tree's pass equals every path read alone with its own pseudo tokens behind it: gap of all logits",
    below=1e-9,
    control="pseudo tokens at their anchor's position",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    model = llama(layers=4)
    maps, ids, gaps = shaken(model, [1, 2, 2]), torch.randint(50, (2, 6)), []
    host = Host(model)
    host.read(ids[:, :-1], torch.ones(2, 5, dtype=torch.bool))
    draft = Draft(torch.cat((ids[:, -1:], torch.randint(50, (2, 6))), 1), torch.tensor([[0, 0, 0, 1, 1, 3, 5]]))
    with maps.born(model, host.length[:, None] + draft.depths):
        logits = host.verify(draft).logits.unflatten(1, (4, 7))
    for late in (1, 0):
        worst = 0.0
        for row in range(2):
            for node in range(7):
                path, count = draft.path_to(torch.full((2,), node))
                text = torch.cat((ids[row, :-1], draft.tokens[row, path[row, : count[row]]]))
                worst = max(worst, naive.gap(logits[row, :, node], alone(model, maps, text, late)))
        gaps.append(worst)
    return gaps[0], gaps[1]


@check(
    "hidden-transfer",
    "logits of real tokens are the model's own, and the loss is that of pseudo tokens run one anchor at a time: gap",
    below=1e-8,
    control="guess i taught what the model says at n + i - 1",
)
def _() -> tuple[float, float]:
    model = llama(20, layers=4).requires_grad_(False)
    maps, ids = shaken(model, [1, 3]), torch.randint(20, (2, 7))
    logits = model(ids, use_cache=False).logits

    def by_hand(shift: int) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for i in (1, 2):
            rows = []
            for row in range(2):
                for n in range(7 - i):
                    truth = logits[row, n + i - shift].softmax(-1)
                    guess = alone(model, maps, ids[row, : n + 1])[i].log_softmax(-1)
                    rows.append((truth * (truth.log() - guess)).sum())
            total = total + torch.stack(rows).mean()
        return total

    slopes = [torch.autograd.grad(loss, list(maps.parameters())) for loss in (maps.loss(model, ids), by_hand(0))]
    own = max(naive.gap(a, b) for a, b in zip(*slopes, strict=True))
    own = max(own, naive.gap(maps(model, ids)[:, 0], logits), naive.gap(maps.loss(model, ids), by_hand(0)))
    return own, naive.gap(maps.loss(model, ids), by_hand(1))


@check(
    "hidden-transfer",
    "greedy output, 200 tokens, maps at first and shaken: tokens that differ",
    below=0.0,
    control="guesses that nobody verifies",
)
def _() -> tuple[float, float]:
    model, ids, found = llama(layers=4), torch.randint(50, (1, 6)), []
    truth = continued(model, ids, 200)
    for maps in (HiddenTransfer(model, [1, 2, 3]).double(), shaken(model, [2, 2])):
        found.append([wrong(model, ids, maps, truth), wrong(model, ids, maps, truth, accept=accept_blindly)])
    return max(a for a, _ in found), min(b for _, b in found)


@check("hidden-transfer", "guesses are those of the last accepted token: tokens that differ", below=0.0, control="those of the root")
def _() -> tuple[float, float]:
    maps = HiddenTransfer(llama(layers=4), [1, 2])
    assert sorted(within(2, 3).paths) == [(0,), (0, 0), (0, 1), (0, 2), (1,), (1, 0), (2,), (2, 0)] and len(maps.shape.levels) == 2
    logits, root = torch.randn(2, 3 * 4, 50), torch.tensor([3, 4])
    maps.learn(None, None, Seen(logits, logits), torch.tensor([[0, 1, 3], [0, 2, 2]]), torch.tensor([3, 2]))
    draft, gaps = maps.draft(State(None, root, [], None)), [0, 0]
    for row, last in enumerate((3, 2)):
        for at, path in enumerate(maps.shape.paths, 1):
            for which, node in enumerate((last, 0)):
                best = logits[row, 4 * len(path) + node].sort(descending=True).indices[path[-1]]
                gaps[which] += int(draft.tokens[row, at] != best)
    return float(gaps[0]), float(gaps[1])


@check(
    "hidden-transfer",
    "repeated random strings, the tiny model, 110 steps: how often the first guess, born after layer 2 of 4, is the model's own second token",
    above=0.15,
    control="a map of the last hidden state, as many parameters and steps",
)
def _() -> tuple[float, float]:
    model = models.load("tiny").requires_grad_(False)
    maps, head = HiddenTransfer(model, [2]), nn.Linear(256, 256)
    head.load_state_dict(maps.maps[0].state_dict())

    def text(rows: int = 4, length: int = 24) -> Tensor:
        string = torch.randint(97, 123, (rows, length))
        return torch.cat((torch.zeros(rows, 1, dtype=torch.long), string, string), 1)

    optimizers = [torch.optim.Adam(one.parameters(), 1e-3) for one in (maps, head)]
    for _ in range(110):
        ids = text()
        with torch.no_grad():
            hidden, logits = states(model, ids)
        guess = model.lm_head(head(hidden[:, :-1])).log_softmax(-1).flatten(0, 1)
        other = F.kl_div(guess, logits[:, 1:].log_softmax(-1).flatten(0, 1), reduction="batchmean", log_target=True)
        for loss, optimizer in zip((maps.loss(model, ids), other), optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        ids = text(24)
        hidden, logits = states(model, ids)
        truth = logits[:, 25:-1].argmax(-1)
        guesses = maps(model, ids)[:, 1, 24:-2].argmax(-1), model.lm_head(head(hidden[:, 24:-2])).argmax(-1)
        return tuple(float((one == truth).float().mean()) for one in guesses)
