"""Attention patterns: found in heads by predicates, and put into heads of the same or another model (id 278; Li et al., 2022).

GR(P, h) = mean over texts x of 1/|x| sum_ij a_ij [P(x_i, x_j)];  a predicate belongs to heads of GR >= mean + 1 standard deviation over all heads
mask: softmax(q k' / sqrt(d)) over the pairs of P alone;  synthesise: weights even over P, whatever q and k;  rows without a pair see all
adapter (PAL): gelu(W_up SA_P(W_down x)) of a layer's input x, added beside the MLP before the norm; width 256, 4 heads, no output projection
Not as released: the host's dropout behind its MLP reaches an adapter's output too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard import taps
from regard.catalog.registry import register
from regard.errors import RegardError
from regard.interpret.heads import check_heads
from regard.interpret.patterns import PatternMass, Predicate, held
from regard.interpret.tables import Head, HeadTable, table_of
from regard.nn.parts import takes
from regard.taps.points import At


@dataclass(frozen=True)
class Use:
    """A predicate in a head. synthesise: even weights, without q and k."""

    predicate: Predicate
    synthesise: bool = False


Plan = Mapping[Head, Use]


@torch.no_grad()
def discover(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor | None]], predicates: Mapping[str, Predicate], mask: str = "attention_mask"
) -> dict[str, HeadTable]:
    """Global relevance of each predicate in each head. batches: (ids (B, T), real (B, T) bool or None); real goes to the model as its argument `mask`."""
    totals: dict[str, list[Tensor]] = {}
    count = 0
    for ids, real in batches:
        shown = torch.ones_like(ids, dtype=torch.bool) if real is None else real
        pairs = {name: p(ids) & shown[:, :, None] & shown[:, None] for name, p in predicates.items()}
        with taps.read(model, [PatternMass(x, name) for name, x in pairs.items()]) as seen:
            model(ids, **({} if real is None else {mask: real}))
        for name in predicates:
            found = [(x / shown.sum(1).to(x)[:, None]).double().sum(0).cpu() for _, x in seen.items(name)]
            totals[name] = found if name not in totals else [a + b for a, b in zip(totals[name], found, strict=True)]
        count += len(ids)
    if not count or not predicates:
        raise RegardError("batches or predicates is empty; expected one or more of each")
    return {name: table_of((x / count for x in found), name) for name, found in totals.items()}


def standing_out(table: HeadTable, deviations: float = 1.0) -> list[Head]:
    """Heads at least so many standard deviations above the mean of all, the greatest first."""
    known = table.scores[~table.scores.isnan()]
    return table.above(float(known.mean() + deviations * known.std(correction=0)))


def planned(layers: int, uses: Iterable[Use], repeats: int = 3) -> dict[Head, Use]:
    """In every layer the n-th of the uses in heads n, n + count, ..., `repeats` times; other heads stay free."""
    chosen = list(uses)
    return {(layer, len(chosen) * turn + n): use for layer in range(layers) for turn in range(repeats) for n, use in enumerate(chosen)}


@register("attention-pattern-injection", kind="function")
def inject(model: nn.Module, plan: Plan, ids: Tensor) -> AbstractContextManager[Any]:
    """`with inject(model, plan, ids): model(ids)`: these heads follow their predicates on these ids (B, T); gradients flow, the model is as it was
    behind the block. Any tapped model of softmax attention; padding and causality of the model's own stay."""
    if not plan:
        raise RegardError("plan is empty; expected some (layer, head) -> Use")
    check_heads(model, plan)
    made: dict[Predicate, Tensor] = {}
    for use in plan.values():
        if use.predicate not in made:
            made[use.predicate] = use.predicate(ids)
    chosen = {layer: sorted(head for at, head in plan if at == layer) for layer, _ in plan}

    def shape(x: Tensor, at: At) -> Tensor:
        if x.shape[2:] != (ids.shape[1],) * 2 or len(x) != len(ids):
            raise RegardError(
                f"logits {tuple(x.shape)} in layer {at.layer} are not of ids {tuple(ids.shape)}; expected one call on these ids, without a cache"
            )
        uses = [plan[at.layer, head] for head in chosen[at.layer]]
        out = x.clone()
        for head, use in zip(chosen[at.layer], uses, strict=True):
            out[:, head : head + 1] = held(x[:, head : head + 1], made[use.predicate].to(x.device), use.synthesise)
        return out

    return taps.edit(model, {"logits": shape}, layers=sorted(chosen))


class Patterned(nn.Module):
    """A model whose calls `(ids, ...)` follow a plan, in training and evaluation: the same parameters."""

    def __init__(self, model: nn.Module, plan: Plan):
        super().__init__()
        self.model, self.plan = model, plan

    def forward(self, ids: Tensor, *args: Any, **options: Any) -> Any:
        with inject(self.model, self.plan, ids):
            return self.model(ids, *args, **options)


class PAL(nn.Module):
    """x (B, T, dim) -> (B, T, dim): attention of `heads` narrow heads, each with its use (None: free). Zero at first: W_up and its bias are
    (start="up"), or every weight is, as released (start="all": then only the last bias ever learns)."""

    def __init__(self, dim: int, uses: Iterable[Use | None], width: int = 256, dropout: float = 0.0, start: str = "up"):
        super().__init__()
        self.dim, self.uses, self.dropout = dim, list(uses), dropout
        if not self.uses or width % len(self.uses) or start not in ("up", "all"):
            raise RegardError(
                f"width={width}, {len(self.uses)} uses, start={start!r}; expected a width that heads share evenly, and start up or all"
            )
        self.down, self.up = nn.Linear(dim, width), nn.Linear(width, dim)
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        for layer in (self.up,) if start == "up" else (self.down, self.q, self.k, self.v, self.up):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    @takes(x="batch length dim", ids="batch length")
    def forward(self, x: Tensor, ids: Tensor, real: Tensor | None = None) -> Tensor:
        """real (B, T) bool: tokens that are no padding."""
        h = self.down(x)
        q, k, v = (y.unflatten(-1, (len(self.uses), -1)).transpose(1, 2) for y in (self.q(h), self.k(h), self.v(h)))
        s = q @ k.mT * q.shape[-1] ** -0.5
        s = (
            s
            if real is None
            else s.masked_fill(~real[:, None, None], torch.finfo(s.dtype).min if not bool(real.any(1).all()) else -torch.inf)
        )
        shaped = [s[:, n : n + 1] if u is None else held(s[:, n : n + 1], u.predicate(ids), u.synthesise) for n, u in enumerate(self.uses)]
        p = F.dropout(torch.cat(shaped, 1).softmax(-1), self.dropout, self.training)
        return F.gelu(self.up((p @ v).transpose(1, 2).flatten(-2)))


class WithAdapters(nn.Module):
    """A model with a `PAL` beside the MLP of each attention layer. Freeze the model to train these alone: `model.requires_grad_(False)`."""

    def __init__(self, model: nn.Module, dim: int, uses: Iterable[Use | None], width: int = 256, dropout: float = 0.0, start: str = "up"):
        super().__init__()
        shared = list(uses)
        self.model = model
        self.pals = nn.ModuleList(PAL(dim, shared, width, dropout, start) for _ in taps.sites(model))

    def forward(self, ids: Tensor, *args: Any, real: Tensor | None = None, **options: Any) -> Any:
        """real (B, T) bool: padding for the adapters; the model takes its own mask."""
        inputs: dict[int, Tensor] = {}

        def keep(x: Tensor, at: At) -> Tensor:
            inputs[at.layer] = x
            return x

        def add(y: Tensor, at: At) -> Tensor:
            return y + self.pals[at.layer](inputs.pop(at.layer), ids, real)

        with taps.edit(self.model, {"residual_in": keep, "mlp": add}):
            return self.model(ids, *args, **options)


class SentenceScorer(nn.Module):
    """states (B, T, dim), places (B, n) of sentences' first tokens -> probabilities (B, n) that they belong to the summary."""

    def __init__(self, dim: int):
        super().__init__()
        self.line = nn.Linear(dim, 1)

    def forward(self, states: Tensor, places: Tensor) -> Tensor:
        return torch.sigmoid(self.line(states.take_along_dim(places[..., None], 1))[..., 0])


class BoundaryScorer(nn.Module):
    """states (B, T, dim) -> logit (B,) that the topic changes, of the first token; weights Xavier, biases 0."""

    def __init__(self, dim: int, hidden: int = 128):
        super().__init__()
        self.lines = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, 1))
        for p in self.lines.parameters():
            nn.init.xavier_uniform_(p) if p.dim() > 1 else nn.init.zeros_(p)

    def forward(self, states: Tensor) -> Tensor:
        return self.lines(states[:, 0])[:, 0]  # type: ignore[no-any-return]
