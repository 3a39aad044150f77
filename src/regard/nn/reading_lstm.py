"""LSTMs that look at a memory before every step (Xu et al., 2015), and those that run over a memory both ways."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .additive import AdditiveAttention, Reading, first_values
from .parts import takes


def thinned(x: Tensor, rate: float, training: bool) -> Tensor:
    """Dropout that is not rescaled in training: evaluation multiplies by 1 - rate."""
    return F.dropout(x, rate, training) * (1 - rate) if rate else x


class LSTMState(NamedTuple):
    hidden: Tensor
    memory: Tensor


class GatedStep(nn.Module):
    """x (B, inner), state (B, hidden) each, context (B, features) where there is one -> the next state:
    [i, f, o, g] = W x + U h + V z + b, c' = sigmoid(f) c + sigmoid(i) tanh(g), h' = sigmoid(o) tanh(c').

    gate_dropout: of i, f and o before the sigmoid. std: of first weights (square blocks of W and U are orthogonal)."""

    def __init__(self, inner: int, hidden: int, features: int | None = None, gate_dropout: float = 0.0, std: float = 0.01):
        super().__init__()
        self.gate_dropout = gate_dropout
        self.feed, self.recur = nn.Linear(inner, 4 * hidden), nn.Linear(hidden, 4 * hidden, bias=False)
        self.see = None if features is None else nn.Linear(features, 4 * hidden, bias=False)
        first_values(self.feed, std, 4)
        first_values(self.recur, std, 4)
        if self.see is not None:
            first_values(self.see, std)

    def forward(self, x: Tensor, state: LSTMState, context: Tensor | None = None) -> LSTMState:
        gates = self.feed(x) + self.recur(state.hidden)
        gates = gates if self.see is None else gates + self.see(context)
        squashed, new = gates.split((3 * state.hidden.shape[1], state.hidden.shape[1]), -1)
        enter, forget, leave = torch.sigmoid(thinned(squashed, self.gate_dropout, self.training)).chunk(3, -1)
        memory = forget * state.memory + enter * torch.tanh(new)
        return LSTMState(leave * torch.tanh(memory), memory)


class ReadingLSTM(GatedStep):
    """A `GatedStep` whose context its own `attention` reads by the state before the step; first states are tanh(linear) of a summary of the memory."""

    def __init__(self, inner: int, hidden: int, features: int, attention: AdditiveAttention, gate_dropout: float = 0.0, std: float = 0.01):
        super().__init__(inner, hidden, features, gate_dropout, std)
        self.attention = attention
        self.start_hidden, self.start_memory = nn.Linear(features, hidden), nn.Linear(features, hidden)
        first_values(self.start_hidden, std)
        first_values(self.start_memory, std)

    def start(self, summary: Tensor) -> LSTMState:
        return LSTMState(torch.tanh(self.start_hidden(summary)), torch.tanh(self.start_memory(summary)))

    def read(
        self,
        x: Tensor,
        state: LSTMState,
        memory: Tensor,
        keys: Tensor | None = None,
        pick: Tensor | None = None,
        expected: bool = False,
    ) -> tuple[LSTMState, Reading]:
        reading = self.attention(state.hidden, memory, keys, pick, expected)
        return self(x, state, reading.context), reading


class TwoWayLSTM(nn.Module):
    """memory (B, L, features) -> (B, L, 2 hidden): at each place the state of an LSTM that came from the first, beside that of one from the last; both
    start at zeros."""

    def __init__(self, features: int, hidden: int, gate_dropout: float = 0.0, std: float = 0.01):
        super().__init__()
        self.features, self.hidden = features, hidden
        self.forth, self.back = (GatedStep(features, hidden, None, gate_dropout, std) for _ in range(2))

    @takes(memory="batch places features")
    def forward(self, memory: Tensor) -> Tensor:
        found = []
        for step, places in ((self.forth, memory.unbind(1)), (self.back, memory.flip(1).unbind(1))):
            zeros = memory.new_zeros(len(memory), self.hidden)
            state, seen = LSTMState(zeros, zeros), []
            for x in places:
                state = step(x, state)
                seen.append(state.hidden)
            found.append(torch.stack(seen, 1) if seen else memory.new_zeros(len(memory), 0, self.hidden))
        return torch.cat((found[0], found[1].flip(1)), -1)
