"""What a strategy is: it drafts from where a generation stands, and learns from what the model says."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .host import Host, Seen
from .tree import Draft


@dataclass
class State:
    """Where a generation stands. root (B,): the last token of each row, not yet read by the model; texts: all tokens of each row,
    the root last; hidden (B, D): the state from which the root was chosen (None before anything was read)."""

    host: Host
    root: Tensor
    texts: list[list[int]]
    hidden: Tensor | None


class Strategy:
    """Supplies drafts. A strategy serves one `generate` at a time; what it has learned may serve the next."""

    def begin(self, state: State) -> None:
        """The prompt was read."""

    def draft(self, state: State) -> Draft:
        """Guesses after `state.root`, the tree's node 0."""
        raise NotImplementedError

    def watch(self, state: State, draft: Draft) -> AbstractContextManager[Any]:
        """What is open while the model reads the draft."""
        return nullcontext()

    def learn(self, state: State, draft: Draft, seen: Seen, path: Tensor, count: Tensor) -> None:
        """What the model said of the nodes; path (B, m), count (B,): those that stayed. The state is that after the step."""
