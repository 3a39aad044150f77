"""Do sinks appear? One tiny layer learns bigrams and three tokens that ask for a copy of the token before them.

Where nothing is asked of attention, rows that must sum to one park their weight on the first token (Gu et al., 2024; Guo et al., 2024).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..algebra import Mechanism
from ..nn import Attention, Decoder
from .statistics import kurtosis, sink_rate

BOS, TRIGGERS, VOCAB = 0, (1, 2, 3), 32


@dataclass(frozen=True)
class SinkResult:
    """sink_rate: share of heads and samples whose first token gets over 0.3. accuracy: of copies. kurtosis: of the stream. loss: of training."""

    sink_rate: float
    accuracy: float
    kurtosis: float
    loss: tuple[float, ...]


def text(count: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens (count, length + 1) and which of the last `length` are copies: a fixed bigram chain; a trigger repeats the token before it."""
    chain = torch.Generator().manual_seed(7)
    table = torch.softmax(2.5 * torch.randn(VOCAB, VOCAB, generator=chain), -1)
    table[:, BOS] = 0
    table[:, list(TRIGGERS)] = 0.1 / 3
    table[list(TRIGGERS)] = 0
    rest = [t for t in range(1, VOCAB) if t not in TRIGGERS]
    table[list(TRIGGERS), :][:, rest] = 1.0
    tokens = torch.full((count, length + 1), BOS)
    copied = torch.zeros(count, length, dtype=torch.bool)
    for at in range(1, length + 1):
        last = tokens[:, at - 1]
        asked = torch.isin(last, torch.tensor(TRIGGERS)) if at > 1 else torch.zeros(count, dtype=torch.bool)
        drawn = torch.multinomial(table[torch.where(asked, BOS, last)], 1, generator=generator)[:, 0]
        before = tokens[:, at - 2] if at > 1 else drawn
        usable = asked & (before != BOS)
        tokens[:, at] = torch.where(usable, before, drawn)
        copied[:, at - 1] = usable
    return tokens, copied


def sink_experiment(
    mechanism: str | Mechanism, *, steps: int = 300, length: int = 32, dim: int = 64, heads: int = 2, lr: float = 3e-3, seed: int = 0
) -> SinkResult:
    """Train one layer of `mechanism` for `steps` of 64 sequences (about 5 s on two cores) and look at its weights."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = Decoder(mechanism, vocab=VOCAB, dim=dim, layers=1, heads=heads, context_len=length)
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.01)
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 20)
        tokens, _ = text(64, length, generator)
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    with torch.no_grad():
        tokens, copied = text(256, length, generator)
        right = model(tokens[:, :-1]).argmax(-1) == tokens[:, 1:]
        x = model.embed(tokens[:, :-1])
        block = model.blocks[0]
        mixer = block.mixer
        assert isinstance(mixer, Attention)
        found = mixer.weights(block.norm1(x))  # type: ignore[operator]
    rate = float("nan") if found is None else sink_rate(found)
    return SinkResult(rate, float(right[copied].double().mean()), kurtosis(block(x)), tuple(losses))
