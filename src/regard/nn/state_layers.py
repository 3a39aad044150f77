"""Two layers that come of writing attention and gated recurrences as the same systems: attention with a learned normaliser, and an LSTM whose
forget gate decays as a selective state space's does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..algebra import Causal, Recurrent
from ..engine import step
from ..engine.door import attend
from ..errors import RegardError
from .parts import ShortConv, takes, whole
from .selective_scan import SCAN

PLAIN = Recurrent(scaled=False)
NORMALISERS: dict[str, Callable[[Tensor], Tensor]] = {"exp": torch.exp, "softplus": F.softplus, "sigmoid": torch.sigmoid}


class NormalizedAttention(nn.Module):
    """x (B, L, dim) -> (B, L, dim), causal: sum_{j <= i} (q_i.k_j) v_j / eta_i,  eta_i = exp(w.x_i + b) a head; no scale and no softmax.

    key_dim: channels of q and k over all heads (None: dim), the state a value channel. norm: "exp", or "softplus" or "sigmoid". dropout: of the
    weights, in training (the matrix is then made). Sieber et al., 2024. `step` carries the sum of k v^T.
    """

    def __init__(self, dim: int, heads: int = 1, key_dim: int | None = None, norm: str = "exp", bias: bool = True, dropout: float = 0.0):
        super().__init__()
        keys = dim if key_dim is None else key_dim
        if dim % heads or keys % heads or norm not in NORMALISERS or not 0 <= dropout < 1:
            raise RegardError(
                f"dim={dim}, key_dim={keys}, heads={heads}, norm={norm!r}, dropout={dropout}; expected multiples of heads, a norm of "
                f"{', '.join(NORMALISERS)}, dropout in [0, 1)"
            )
        self.dim, self.heads, self.norm, self.dropout = dim, heads, norm, dropout
        self.qk, self.v, self.eta = nn.Linear(dim, 2 * keys, bias), nn.Linear(dim, dim, bias), nn.Linear(dim, heads, bias)
        self.out = nn.Linear(dim, dim)

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k (B, H, L, key_dim / H), v (B, H, L, dim / H), eta (B, H, L)."""
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (*self.qk(x).chunk(2, -1), self.v(x)))
        eta = self.eta(x)
        return q, k, v, NORMALISERS[self.norm](eta.to(torch.promote_types(eta.dtype, torch.float32))).transpose(1, 2)

    def close(self, o: Tensor, eta: Tensor) -> Tensor:
        return self.out((o / eta[..., None]).to(o.dtype).transpose(1, 2).flatten(-2))  # type: ignore[no-any-return]

    @takes(x="batch length dim")
    def forward(self, x: Tensor) -> Tensor:
        q, k, v, eta = self.parts(x)
        if self.dropout and self.training:
            return self.close(F.dropout((q @ k.mT).tril(), self.dropout) @ v, eta)
        return self.close(attend(q, k, v, PLAIN, mask=Causal()), eta)

    @whole
    @takes(x="batch length dim")
    def step(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        q, k, v, eta = self.parts(x)
        o, state = step(q, k, v, PLAIN, state)
        return self.close(o, eta), state


class QLSTMCell(nn.Module):
    """x (B, L, hidden) -> the same: h_i = f_i h_{i-1} + sigmoid(W_i x_i) x_i,  y = sigmoid(W_o x_i) h_i;  f = sigmoid(W_f x_i), or reversed:
    sigmoid(-W_f x_i)^relu(alpha) = exp(-alpha softplus(W_f x_i)), alpha learned from 1."""

    def __init__(self, hidden: int, reversed: bool = True):
        super().__init__()
        self.hidden, self.reversed = hidden, reversed
        self.gates = nn.Linear(hidden, 3 * hidden)
        self.alpha = nn.Parameter(torch.ones(())) if reversed else None
        nn.init.normal_(self.gates.weight, std=hidden**-0.5)

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log of the forget gate, what is written and the output gate, (B, L, hidden) each."""
        forget, write, read = self.gates(x).chunk(3, -1)
        log_f = F.logsigmoid(forget) if self.alpha is None else self.alpha.relu() * F.logsigmoid(-forget)
        return log_f, torch.sigmoid(write) * x, torch.sigmoid(read)

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """state (B, hidden): h before the first token; gives the outputs and h behind the last."""
        log_f, written, read = self.parts(x)
        if state is not None:
            written = torch.cat((written[:, :1] + log_f[:, :1].exp() * state[:, None].to(x.dtype), written[:, 1:]), 1)
        v = written.mT[..., None]
        ones = torch.ones_like(v)
        h = attend(ones, ones, v, SCAN, mask=Causal(), log_decay=log_f.mT[..., None])[..., 0].mT
        return read * h, h[:, -1]


@dataclass
class QLSTMState:
    """conv: the convolution's last inputs; h (B, hidden)."""

    conv: Tensor
    h: Tensor


class QLSTM(nn.Module):
    """x (B, L, dim) -> (B, L, dim): (gate, y) = W x, y through a causal depthwise convolution and the cell, W_out(gelu(gate) y).

    expansion: hidden over dim. Projections without bias; their first values N(0, 1 / inputs), the convolution's as nn.Conv1d's. Sieber et al., 2024.
    """

    def __init__(self, dim: int, expansion: float = 2, kernel: int = 4, reversed: bool = True):
        super().__init__()
        self.dim, hidden = dim, int(dim * expansion)
        self.input, self.output = nn.Linear(dim, 2 * hidden, bias=False), nn.Linear(hidden, dim, bias=False)
        self.conv, self.cell = ShortConv(hidden, kernel, bias=True), QLSTMCell(hidden, reversed)
        assert self.conv.bias is not None
        nn.init.uniform_(self.conv.bias, -(kernel**-0.5), kernel**-0.5)
        nn.init.normal_(self.input.weight, std=dim**-0.5)
        nn.init.normal_(self.output.weight, std=hidden**-0.5)

    @takes(x="batch length dim")
    def forward(self, x: Tensor) -> Tensor:
        return self.run(x, None)[0]

    @whole
    @takes(x="batch length dim")
    def step(self, x: Tensor, state: QLSTMState | None = None) -> tuple[Tensor, QLSTMState]:
        return self.run(x, state)

    def run(self, x: Tensor, state: QLSTMState | None) -> tuple[Tensor, QLSTMState]:
        gate, y = self.input(x).chunk(2, -1)
        y, conv = self.conv(y, None if state is None else state.conv)
        y, h = self.cell(y, None if state is None else state.h)
        return self.output(F.gelu(gate) * y), QLSTMState(conv, h)
