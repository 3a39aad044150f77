"""Abrupt learning in context: a net of attention alone learns to copy labels, all at once, or learns the classes by heart (id 152; Reddy, 2023).

x_1, l_1, .., x_N, l_N, x_q -> label of x_q;  token = one-hot place ; content;   u = x + V softmax_causal(x' K' Q x), twice;  then an MLP of 3 ReLU
layers on the last token.  Induction: layer 1 looks from a label to its item, layer 2 from the query to the label whose item it is.
Three nested logits: p1 = e^b1 / (e^b1 + 2N - 1), p2 = e^(b2 p1) / (e^(b2 p1) + 2N - 1), loss = log(1 + (L - 1) e^(-xi p2)): a plateau, then a cliff.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.algebra import Causal
from regard.catalog.registry import register
from regard.engine.door import attend
from regard.errors import RegardError
from regard.plots import Plot, figure
from regard.results import Result
from regard.tasks.item_labels import Asked, ItemLabels
from regard.tasks.training import fit

PROBES: dict[str, dict[str, Any]] = {
    "novel": {"bursty": 1.0, "novel": 1.0},  # classes never seen: only the context tells
    "flip": {"bursty": 1.0, "flip": True},  # the context says otherwise than the weights
    "weights": {"bursty": 0.0},  # the context says nothing
}


class InductionNet(nn.Module):
    """tokens (B, T, width) -> logits (B, labels) of the last one. Weights start N(0, 1 / width), biases of the MLP at 0."""

    def __init__(self, width: int, labels: int, layers: int = 2, key_dim: int | None = None, hidden: Sequence[int] | None = None):
        super().__init__()
        if layers < 1:
            raise RegardError(f"layers={layers}; expected 1 or more")
        keys = key_dim or width
        self.q, self.k = (nn.ModuleList(nn.Linear(width, keys, False) for _ in range(layers)) for _ in range(2))
        self.v = nn.ModuleList(nn.Linear(width, width, False) for _ in range(layers))
        sizes = [width, *((width,) * 3 if hidden is None else hidden)]
        self.mlp = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        self.readout = nn.Linear(sizes[-1], labels)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        x = tokens
        for q, k, v in zip(self.q, self.k, self.v, strict=True):
            x = x + attend(q(x)[:, None], k(x)[:, None], v(x)[:, None], mask=Causal(), scale=1.0)[:, 0]
        x = x[:, -1]
        for layer in self.mlp:
            x = layer(x).relu()
        return self.readout(x)  # type: ignore[no-any-return]

    @torch.no_grad()
    def weights(self, tokens: Tensor) -> list[Tensor]:
        """Each layer's weights (B, T, T)."""
        x, found = tokens, []
        for q, k, v in zip(self.q, self.k, self.v, strict=True):
            s = (q(x) @ k(x).mT).masked_fill(torch.ones(x.shape[1], x.shape[1], device=x.device).triu(1).bool(), -torch.inf)
            found.append(s.softmax(-1))
            x = x + found[-1] @ v(x)
        return found


@torch.no_grad()
def accuracy(model: nn.Module, asked: Asked) -> float:
    return float((model(asked.tokens).argmax(-1) == asked.label).double().mean())


@torch.no_grad()
def progress(model: InductionNet, asked: Asked) -> dict[str, float]:
    """previous: what labels give to their items in the first layer. copied: what the query gives to all labels, and target: to labels of its own class,
    in the last. in_context: share of answers that are a label of the context."""
    maps = model.weights(asked.tokens)
    pairs = asked.items.shape[1]
    at = torch.arange(pairs)
    read = maps[-1][:, -1, 1:-1:2]
    given = model(asked.tokens).argmax(-1)
    return {
        "previous": float(maps[0][:, 2 * at + 1, 2 * at].mean()),
        "copied": float(read.sum(1).mean()),
        "target": float((read * (asked.items == asked.item[:, None])).sum(1).mean()),
        "in_context": float((asked.labels == given[:, None]).any(1).double().mean()),
    }


@dataclass
class Emergence(Result):
    """steps; accuracy and progress by name, a number a step that was looked at; the trained model."""

    model: InductionNet
    steps: list[int] = field(default_factory=list)
    measures: dict[str, list[float]] = field(default_factory=dict)

    def __getitem__(self, name: str) -> list[float]:
        return self.measures[name]

    def plateau(self, name: str = "novel", low: float = 0.35, high: float = 0.65) -> int:
        """Steps between which the measure was first above `low` and first above `high` (to the end, if it never was)."""
        begin = next((s for s, x in zip(self.steps, self[name], strict=True) if x > low), self.steps[-1])
        return next((s for s, x in zip(self.steps, self[name], strict=True) if x > high), self.steps[-1]) - begin

    def plot(self) -> Plot:
        """All measures by step."""
        lines = {name: [(float(s), x) for s, x in zip(self.steps, found, strict=True)] for name, found in self.measures.items()}
        return figure("Learning in context and in weights", "step", "share", lines)


@register("abrupt-icl", kind="experiment")
def emergence(
    data: ItemLabels,
    *,
    pairs: int = 8,
    copies: int = 2,
    bursty: float = 1.0,
    novel: float = 0.0,
    distinct: bool = True,
    layers: int = 2,
    steps: int = 200_000,
    batch: int = 128,
    optimizer: str = "sgd",
    lr: float = 0.01,
    weight_decay: float = 1e-6,
    every: int = 1000,
    count: int = 500,
    seed: int = 0,
) -> Emergence:
    """Train the net on sequences and look at it every so many steps, with `count` fixed sequences of each probe. Defaults are the paper's."""
    if steps < 1 or every < 1:
        raise RegardError(f"steps={steps}, every={every}; expected 1 or more")
    torch.manual_seed(seed)
    model = InductionNet(data.width, len(data.embeddings), layers)
    common: dict[str, Any] = {"pairs": pairs, "copies": copies, "distinct": distinct}
    held = torch.Generator().manual_seed(seed + 1)
    probes = {"test": data.draw(count, held, bursty=bursty, novel=novel, **common)}
    probes |= {name: data.draw(count, held, **common, **options) for name, options in PROBES.items()}
    found = Emergence(model)

    def watch(step: int) -> None:
        if step % every == 0 or step == steps:
            now = {name: accuracy(model, asked) for name, asked in probes.items()} | progress(model, probes["novel"])
            found.steps.append(step)
            for name, x in now.items():
                found.measures.setdefault(name, []).append(x)

    def draw(generator: torch.Generator) -> Asked:
        return data.draw(batch, generator, bursty=bursty, novel=novel, **common)

    fit(
        model,
        draw,
        lambda a: F.cross_entropy(model(a.tokens), a.label),
        steps,
        lr=lr,
        seed=seed,
        optimizer=optimizer,
        watch=watch,
        weight_decay=weight_decay,
    )
    return found


def nested_logits(
    pairs: int = 8, labels: int = 32, *, lr: float = 0.05, start: float = 0.01, steps: int = 20_000, depth: int = 3
) -> list[float]:
    """The losses of gradient descent on the phenomenological model, all logits from `start`. depth: 3; 1: the last logit alone (p2 = 1)."""
    if depth not in (1, 3) or pairs < 1 or labels < 2:
        raise RegardError(f"depth={depth}, pairs={pairs}, labels={labels}; expected depth 3 or 1, a pair and two labels at least")
    b1 = b2 = xi = start
    others, losses = 2 * pairs - 1, []
    for _ in range(steps):
        p1 = 1 / (1 + others * math.exp(-b1))
        p2 = 1 / (1 + others * math.exp(-b2 * p1)) if depth == 3 else 1.0
        rest = (labels - 1) * math.exp(-xi * p2)
        losses.append(math.log1p(rest))
        rate = lr * rest / (1 + rest)  # -lr d loss / d (xi p2)
        inner = xi * p2 * (1 - p2)
        b1, b2, xi = b1 + rate * inner * b2 * p1 * (1 - p1), b2 + rate * inner * p1, xi + rate * p2
    return losses


def abruptness(losses: Sequence[float], high: float = 0.9, low: float = 0.1) -> float:
    """Steps from `high` to `low` of the first loss, over the steps before: small for a plateau and a cliff. RegardError where `low` is not reached."""
    fall = [next((n for n, x in enumerate(losses) if x <= share * losses[0]), None) for share in (high, low)]
    if fall[0] is None or fall[1] is None:
        raise RegardError(f"the loss goes from {losses[0]:.3g} to {min(losses):.3g}; expected more steps, to reach {low} of the first")
    return (fall[1] - fall[0]) / max(1, fall[0])
