"""Active and dormant heads: the Bigram-Backcopy task, in which a head copies behind triggers and parks on the first token elsewhere
(id 137; Guo et al., 2024).

A trigger is followed by the token before it, any other token by a draw of its bigrams. On a dormant row the head should add nothing:
with p = e^a / (e^a + n) on the first token, b its value and m what the n others give, of mean 0 and variance s^2, the loss is
((1 - p)^2 s^2 + p^2 b^2) / 2. Its gradient flow drives a up like (log t) / 2 while b is small, and b down as p rises; ReLU attention
needs neither.

Not built: the interventions' tables of LLaMA and OLMo (the report and the forced heads run on any tapped decoder).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.catalog.registry import register
from regard.errors import RegardError
from regard.nn.attention import Attention
from regard.nn.parts import head_norm
from regard.plots import Plot, figure
from regard.results import Result
from regard.tasks.backcopy import Backcopy
from regard.tasks.training import fit


class BackcopyBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)) where there is one."""

    def __init__(self, attention: Attention, dim: int, mlp: bool, norm: str):
        super().__init__()
        self.norm1, self.attention = head_norm(norm, dim), attention
        self.norm2 = head_norm(norm, dim) if mlp else None
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.ReLU(), nn.Linear(4 * dim, dim)) if mlp else None

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x if self.mlp is None or self.norm2 is None else x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class BackcopyModel(nn.Module):
    """ids (B, L) -> logits (B, L, vocab): learned positions, `layers` blocks of attention ("softmax", or "relu": relu(q.k / sqrt d) / i),
    with or without norms and MLPs. frozen: "v" or "out", projections held at the identity."""

    def __init__(
        self,
        vocab: int,
        dim: int = 256,
        layers: int = 1,
        heads: int = 1,
        attention: str = "softmax",
        *,
        length: int = 256,
        mlp: bool = True,
        norm: bool = True,
        frozen: tuple[str, ...] = (),
    ):
        super().__init__()
        if attention not in ("softmax", "relu") or set(frozen) - {"v", "out"}:
            raise RegardError(f"attention={attention!r}, frozen={frozen}; expected softmax or relu, and some of v and out")
        self.embed, self.place = nn.Embedding(vocab, dim), nn.Parameter(0.02 * torch.randn(length, dim))
        kind = "layer" if norm else ""
        found = [Attention(dim, heads, attention, context_len=length) for _ in range(layers)]
        self.blocks = nn.ModuleList(BackcopyBlock(one, dim, mlp, kind) for one in found)
        self.norm, self.out = head_norm(kind, dim), nn.Linear(dim, vocab, bias=False)
        for projection in (getattr(one, name) for one in found for name in frozen):
            projection.weight.data.copy_(torch.eye(dim))
            projection.requires_grad_(False)

    def forward(self, ids: Tensor) -> Tensor:
        if ids.shape[1] > len(self.place):
            raise RegardError(f"ids has {ids.shape[1]} tokens; expected at most length={len(self.place)}")
        x = self.embed(ids) + self.place[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.out(self.norm(x))  # type: ignore[no-any-return]


@register("active-dormant-heads", kind="experiment")
def train_backcopy(
    task: Backcopy,
    attention: str = "softmax",
    *,
    steps: int = 10_000,
    length: int = 256,
    dim: int = 256,
    layers: int = 1,
    heads: int = 1,
    batch: int = 512,
    lr: float = 3e-4,
    weight_decay: float = 1e-4,
    optimizer: str = "adamw",
    seed: int = 0,
    **options: Any,
) -> BackcopyModel:
    """A model trained on the task; the defaults are the paper's. options: of `BackcopyModel`."""
    torch.manual_seed(seed)
    model = BackcopyModel(len(task.table), dim, layers, heads, attention, length=length, **options)

    def loss(ids: Tensor) -> Tensor:
        return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())

    more = {"betas": (0.9, 0.99)} if optimizer in ("adam", "adamw") else {"momentum": 0.9}
    fit(model, lambda g: task.draw(batch, length, g), loss, steps, lr=lr, seed=seed, optimizer=optimizer, weight_decay=weight_decay, **more)
    return model


@dataclass(frozen=True)
class Flow(Result):
    """times, sink (the logit a), value (the length of b), at each time kept."""

    times: tuple[float, ...]
    sink: tuple[float, ...]
    value: tuple[float, ...]

    @property
    def growth(self) -> float:
        """d a / d log t over the last half of the kept times."""
        half = len(self.times) // 2
        return (self.sink[-1] - self.sink[half]) / (math.log(self.times[-1]) - math.log(self.times[half]))

    def plot(self) -> Plot:
        """Sink logit and value over log10 of the time."""
        at = [math.log10(t) for t in self.times]
        lines = {name: list(zip(at, y, strict=True)) for name, y in (("sink logit", self.sink), ("value", self.value))}
        return figure("Mutual reinforcement", "log10 t", "", lines)


def mutual_reinforcement(
    keys: int = 8,
    spread: float = 1.0,
    value: float = 1.0,
    *,
    learn_value: bool = True,
    learn_sink: bool = True,
    end: float = 1e4,
    kept: int = 40,
) -> Flow:
    """The reduced model's gradient flow from a = 0 and b = `value` to the time `end`, by Euler steps shorter than the flow is stiff;
    `kept` times evenly in log t. keys: n; spread: s. learn_value, learn_sink: which of the two moves."""
    if keys < 1 or spread <= 0 or end <= 1 or kept < 2:
        raise RegardError(f"keys={keys}, spread={spread}, end={end}, kept={kept}; expected 1 or more, above 0, above 1, and 2 or more")
    a, b, t = 0.0, value, 0.0
    times, sinks, values = [], [], []
    for mark in [end ** (n / (kept - 1)) for n in range(kept)]:
        while t < mark:
            p = 1 / (1 + keys * math.exp(-a))
            pull = p * (1 - p) * ((1 - p) * spread**2 - p * b * b)
            stiff = p * (1 - p) * (spread**2 + b * b) * (1 if b else 2 * (1 - p)) + 1e-12
            step = min(0.01 * max(1.0, t), 0.2 / stiff, mark - t)
            a += step * learn_sink * pull
            b *= math.exp(-step * learn_value * p * p)
            t += step
        times.append(mark)
        sinks.append(a)
        values.append(abs(b))
    return Flow(tuple(times), tuple(sinks), tuple(values))
