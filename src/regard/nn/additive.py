"""Attention over a memory by a small net of query and key: softly, or at one place (Bahdanau et al., 2014; Xu et al., 2015)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import RegardError
from .parts import takes, whole


def first_values(layer: nn.Linear | nn.Embedding, std: float, blocks: int = 1, orthogonal: bool = True) -> None:
    """Zero biases; weights normal of deviation std, or orthogonal where square and `orthogonal`, each of `blocks` groups of outputs on its own."""
    with torch.no_grad():
        for block in layer.weight.chunk(blocks, 0):
            if orthogonal and block.shape[0] == block.shape[1]:
                nn.init.orthogonal_(block)
            else:
                nn.init.normal_(block, std=std)
        if isinstance(layer, nn.Linear) and layer.bias is not None:
            nn.init.zeros_(layer.bias)


class Reading(NamedTuple):
    """context (B, D). log_weights (B, L). pick (B,): the places that were read, None where context is the expectation."""

    context: Tensor
    log_weights: Tensor
    pick: Tensor | None


class AdditiveAttention(nn.Module):
    """query (B, hidden), memory (B, L, features) -> Reading, whose context is sum_i p_i memory_i.

    p = softmax_i(scale (w . tanh(W memory_i + U query + b) + c)). layers: above 1, W memory_i + b passes layers - 1 times through tanh(linear).
    selector: the context times sigmoid(f . query + g). std: of first weights (square ones are orthogonal, but for W).
    """

    def __init__(self, features: int, hidden: int, layers: int = 1, selector: bool = False, scale: float = 1.0, std: float = 0.01):
        super().__init__()
        if layers < 1:
            raise RegardError(f"layers={layers}; expected at least 1")
        self.features, self.hidden, self.scale = features, hidden, scale
        self.key = nn.Linear(features, features)
        self.deep = nn.ModuleList(nn.Linear(features, features) for _ in range(layers - 1))
        self.query, self.energy = nn.Linear(hidden, features, bias=False), nn.Linear(features, 1)
        self.selector = nn.Linear(hidden, 1) if selector else None
        first_values(self.key, std, orthogonal=False)
        for layer in (*self.deep, self.query, self.energy, *([self.selector] if self.selector else [])):
            first_values(layer, std)  # type: ignore[arg-type]

    @whole
    def keys(self, memory: Tensor) -> Tensor:
        """W memory_i + b (B, L, features), through the deeper layers where there are any: the same for all queries."""
        keys = self.key(memory)
        for layer in self.deep:
            keys = torch.tanh(layer(keys))
        return keys  # type: ignore[no-any-return]

    def choose(self, log_weights: Tensor) -> Tensor | None:
        """Places to read (B,), or None for the expectation over all."""
        return None

    @takes(query="batch hidden", memory="batch places features", keys="batch places features", pick="batch")
    def forward(
        self, query: Tensor, memory: Tensor, keys: Tensor | None = None, pick: Tensor | None = None, expected: bool = False
    ) -> Reading:
        """keys: those of the memory, where they are at hand. pick (B,) int: places to read instead of what the layer would choose; expected: the
        expectation instead of it."""
        if memory.shape[1] == 0:
            raise RegardError("memory has no places; expected at least one to read")
        keys = self.keys(memory) if keys is None else keys
        log_weights = (self.scale * self.energy(torch.tanh(keys + self.query(query)[:, None]))[..., 0]).log_softmax(-1)
        pick = self.choose(log_weights) if pick is None and not expected else pick
        if pick is None:
            context = (log_weights.exp()[..., None].to(memory.dtype) * memory).sum(1)
        else:
            context = memory.take_along_dim(pick[:, None, None], 1)[:, 0]
        if self.selector is not None:
            context = torch.sigmoid(self.selector(query)) * context
        return Reading(context, log_weights, pick)


class HardAttention(AdditiveAttention):
    """The same weights, but one place is read, drawn by them: no gradient reaches them through the context.

    reads: in evaluation "sample", "argmax" or "expectation". In training a place is drawn, always.
    """

    def __init__(
        self,
        features: int,
        hidden: int,
        layers: int = 1,
        selector: bool = False,
        scale: float = 1.0,
        std: float = 0.01,
        reads: str = "expectation",
    ):
        super().__init__(features, hidden, layers, selector, scale, std)
        if reads not in ("sample", "argmax", "expectation"):
            raise RegardError(f"reads={reads!r}; expected 'sample', 'argmax' or 'expectation'")
        self.reads = reads

    def choose(self, log_weights: Tensor) -> Tensor | None:
        if self.training or self.reads == "sample":
            return torch.multinomial(log_weights.detach().float().exp(), 1)[:, 0]
        return log_weights.argmax(-1) if self.reads == "argmax" else None
