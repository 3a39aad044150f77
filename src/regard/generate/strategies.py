"""Strategies that every user compares with: no draft, tokens looked up in the text so far, a small model's guesses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..catalog.registry import entries
from ..errors import RegardError, nearest
from .host import Host, Seen
from .state import State, Strategy
from .tree import Draft, chain


class Plain(Strategy):
    """No guesses: one token a pass."""

    def draft(self, state: State) -> Draft:
        return chain(state.root[:, None])


class PromptLookup(Strategy):
    """What followed the last time the newest tokens came (Saxena, 2023): up to `guesses` tokens after the newest place before where the
    last `longest`, else one fewer, ... else `shortest` tokens stand."""

    def __init__(self, guesses: int = 10, longest: int = 3, shortest: int = 1):
        if guesses < 1 or not 1 <= shortest <= longest:
            raise RegardError(
                f"guesses={guesses}, longest={longest}, shortest={shortest}: expected 1 or more, and 1 <= shortest <= longest"
            )
        self.guesses, self.longest, self.shortest = guesses, longest, shortest

    def draft(self, state: State) -> Draft:
        found = [self.look(text) for text in state.texts]
        width = max(map(len, found))
        tokens = [[text[-1], *guess, *[0] * (width - len(guess))] for text, guess in zip(state.texts, found, strict=True)]
        live = [[True] * (1 + len(guess)) + [False] * (width - len(guess)) for guess in found]
        device = state.root.device
        return chain(torch.tensor(tokens, device=device), torch.tensor(live, device=device))

    def look(self, text: list[int]) -> list[int]:
        for size in range(min(self.longest, len(text) - 1), self.shortest - 1, -1):
            key = text[-size:]
            for start in range(len(text) - size - 1, -1, -1):
                if text[start : start + size] == key:
                    return text[start + size : start + size + self.guesses]
        return []


class DraftModel(Strategy):
    """Guesses of a smaller model of the same vocabulary, one after another (Leviathan et al., 2023).

    temperature 0: its most probable tokens; else drawn from its softmax(logits / temperature), of which acceptance knows the odds.
    """

    def __init__(self, model: nn.Module, guesses: int = 4, temperature: float = 0.0, generator: torch.Generator | None = None):
        if guesses < 1 or temperature < 0:
            raise RegardError(f"guesses={guesses}, temperature={temperature}: expected at least 1, and 0 or more")
        self.model, self.guesses, self.temperature, self.generator = model, guesses, temperature, generator
        self.host: Host | None = None

    def begin(self, state: State) -> None:
        own, other = (model.get_input_embeddings().num_embeddings for model in (self.model, state.host.model))  # type: ignore[operator, union-attr]
        if own != other:
            raise RegardError(f"the draft has {own} tokens and the model {other}; expected a draft for the model's vocabulary")
        self.host = Host(self.model)
        width = max(len(text) for text in state.texts) - 1
        device = state.root.device
        ids = torch.tensor([[0] * (width + 1 - len(text)) + text[:-1] for text in state.texts], dtype=torch.long, device=device)
        valid = torch.tensor([[False] * (width + 1 - len(text)) + [True] * (len(text) - 1) for text in state.texts], device=device)
        self.host.read(ids.view(len(state.texts), width), valid.view(len(state.texts), width))

    def draft(self, state: State) -> Draft:
        """The draft reads its own guesses but the last, which it has read when they stay."""
        assert self.host is not None
        tokens, odds, start = [state.root], [], self.host.valid.shape[1]
        every = torch.ones_like(state.root)
        for _ in range(self.guesses):
            logits = self.host.verify(chain(tokens[-1][:, None])).logits[:, -1].float()
            self.host.keep(torch.zeros_like(state.root)[:, None], every)
            if self.temperature == 0:
                tokens.append(logits.argmax(-1))
            else:
                odds.append((logits / self.temperature).softmax(-1))
                tokens.append(torch.multinomial(odds[-1], 1, generator=self.generator)[:, 0])
        self.host.verify(chain(tokens[-1][:, None]))  # its last guess too, in case that it stays
        self.host.keep(torch.zeros_like(state.root)[:, None], every)
        self.start = start
        known = torch.stack([*odds, torch.zeros_like(odds[0])], 1) if odds else None
        return chain(torch.stack(tokens, 1), odds=known)

    def learn(self, state: State, draft: Draft, seen: Seen, path: Tensor, count: Tensor) -> None:
        """Of what the draft read, the accepted tokens stay: they are the first of the chain."""
        host = self.host
        assert host is not None
        read = host.valid.shape[1] - self.start
        host.valid, host.places = host.valid[:, : self.start], host.places[:, : self.start]
        host.length = host.length - read
        host.keep(path, count)


NAMED: dict[str, type[Strategy]] = {"plain": Plain, "prompt-lookup": PromptLookup}


def named() -> list[str]:
    """Strategies that `generate` makes from a name alone."""
    return sorted([*NAMED, *(name for name, entry in entries().items() if entry.kind == "strategy")])


def made(strategy: str | Strategy, **options: Any) -> Strategy:
    """The strategy of a name; RegardError for an unknown one, or one that needs more than a name."""
    if isinstance(strategy, Strategy):
        return strategy
    if strategy not in named():
        raise RegardError(
            f"strategy {strategy!r} is not known; expected one of {', '.join(named())}, or a Strategy.{nearest(strategy, named())}"
        )
    try:
        return NAMED[strategy](**options) if strategy in NAMED else entries()[strategy].factory(**options)
    except TypeError as why:
        raise RegardError(f"strategy {strategy!r} needs more than a name ({why}); expected a Strategy that was made with it") from None
