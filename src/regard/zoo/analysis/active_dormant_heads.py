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
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.catalog.registry import register
from regard.errors import RegardError
from regard.interpret.tables import HeadResult, HeadTable, table_of
from regard.nn.attention import Attention
from regard.nn.parts import head_norm
from regard.plots import Plot, figure
from regard.results import Result
from regard.taps import edit, read
from regard.taps.points import At
from regard.tasks.training import fit

BOS = 0


@dataclass(frozen=True)
class Backcopy:
    """table (vocab, vocab): bigrams, none from or to BOS = 0. triggers: token ids."""

    table: Tensor
    triggers: Tensor

    def draw(self, count: int, length: int, generator: torch.Generator) -> Tensor:
        """Tokens (count, length + 1), BOS first; the first token is of the chain's marginal without triggers."""
        start = stationary(self.table).index_fill(0, self.triggers, 0.0)
        tokens = [torch.full((count,), BOS), torch.multinomial(start, count, True, generator=generator)]
        for _ in range(length - 1):
            new = torch.multinomial(self.table[tokens[-1]], 1, generator=generator)[:, 0]
            tokens.append(torch.where(torch.isin(tokens[-1], self.triggers), tokens[-2], new))
        return torch.stack(tokens, 1)


def stationary(table: Tensor) -> Tensor:
    """The marginal of a chain: 200 steps from the even one, averaged over two to quiet periods."""
    p = torch.full((len(table),), 1.0 / (len(table) - 1), dtype=table.dtype).index_fill(0, torch.tensor(BOS), 0.0)
    for _ in range(200):
        p = 0.5 * (p + p @ table)
    return p / p.sum()


def backcopy(table: Tensor | None = None, triggers: int = 3, vocab: int = 24, alpha: float = 0.3, seed: int = 7) -> Backcopy:
    """The task: bigrams over `vocab` tokens besides BOS (None: rows drawn from Dirichlet(alpha)), its most frequent ones as triggers."""
    if table is None:
        state = torch.random.get_rng_state()
        torch.manual_seed(seed)
        rows = torch.distributions.Dirichlet(torch.full((vocab,), alpha)).sample((vocab,))
        torch.random.set_rng_state(state)
        table = F.pad(rows, (1, 0, 1, 0))
        table[BOS, 1:] = 1.0 / vocab
    if table.dim() != 2 or table.shape[0] != table.shape[1] or bool((table < 0).any()) or bool(table[:, BOS].any()):
        raise RegardError(f"table has shape {tuple(table.shape)}; expected (vocab, vocab) of probabilities, none of token 0")
    if not 0 < triggers < len(table) - 1:
        raise RegardError(f"triggers={triggers}; expected 1 to {len(table) - 2}")
    return Backcopy(table, stationary(table).topk(triggers).indices)


def text_bigrams(text: str) -> Tensor:
    """The character bigrams of a text, BOS before them: the paper's table is that of tiny Shakespeare, 65 characters."""
    letters = {c: n + 1 for n, c in enumerate(sorted(set(text)))}
    ids = torch.tensor([letters[c] for c in text])
    table = torch.zeros(len(letters) + 1, len(letters) + 1)
    table.index_put_((ids[:-1], ids[1:]), torch.ones(len(ids) - 1), accumulate=True)
    table[BOS, 1:] = torch.bincount(ids, minlength=len(letters) + 1)[1:].float()
    empty = table.sum(1) == 0
    table[empty] = table[BOS].clone()
    return table / table.sum(1, keepdim=True)


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
class SinkReport(HeadResult):
    """A number a head. dormant, active: mean weight on the first token on dormant and active rows; previous: on the token before, on active
    rows; total: summed weights of dormant rows (1 under softmax); value: |v_first| over the mean of the others; gap: the first token's logit
    minus the mean of the others before it, on dormant rows (None where there are no logits). residual (layers,): |h_first| over the mean."""

    dormant: HeadTable
    active: HeadTable
    previous: HeadTable
    total: HeadTable
    value: HeadTable
    gap: HeadTable | None
    residual: Tensor | None


@torch.no_grad()
def sink_report(model: nn.Module, ids: Tensor, active: Tensor, logits: bool = True, residual: bool = False) -> SinkReport:
    """ids (B, L), first token first; active (B, L) bool: rows on which a head should act. Any tapped decoder."""
    points = ["weights", "v", *(["logits"] if logits else []), *(["residual_out"] if residual else [])]
    with read(model, points) as seen:
        model(ids)
    inner = torch.ones_like(active)
    inner[:, :2] = False  # rows whose first token is themselves or the one before
    rows = {"active": active & inner, "dormant": ~active & inner}
    if not all(bool(x.any()) for x in rows.values()):
        raise RegardError("active marks all rows or none (behind the first two); expected both kinds")

    def mean(x: Tensor, kind: str) -> Tensor:
        """x (B, H, L) over the rows of a kind: (H,)."""
        return x.transpose(1, 2)[rows[kind]].mean(0)

    columns: dict[str, list[Tensor]] = {name: [] for name in ("dormant", "active", "previous", "total", "value", "gap")}
    for layer, w in seen.items("weights"):
        columns["dormant"].append(mean(w[..., 0], "dormant"))
        columns["active"].append(mean(w[..., 0], "active"))
        columns["previous"].append(mean(F.pad(w.diagonal(-1, -2, -1), (1, 0)), "active"))
        columns["total"].append(mean(w.sum(-1), "dormant"))
        norms = seen["v", layer].norm(dim=-1).mean(0)
        ratio = norms[:, 0] / norms[:, 1:].mean(1)
        columns["value"].append(ratio.repeat_interleave(w.shape[1] // len(ratio)))
        if logits:
            s = seen["logits", layer]
            others = torch.where(torch.ones_like(s, dtype=torch.bool).tril(-1), s, 0.0)[..., 1:].sum(-1)
            columns["gap"].append(mean(s[..., 0] - others / (torch.arange(s.shape[-1]) - 1).clamp_min(1), "dormant"))
    tables = {name: table_of(x, name) for name, x in columns.items() if x}
    streams = torch.stack([h.norm(dim=-1).mean(0) for _, h in seen.items("residual_out")]) if residual else None
    return SinkReport(**{"gap": None, **tables}, residual=None if streams is None else streams[:, 0] / streams[:, 1:].mean(1))  # type: ignore[arg-type]


def forced(model: nn.Module, kind: str, layers: list[int] | None = None, heads: list[int] | None = None) -> AbstractContextManager[Any]:
    """A `with` block in which heads are made to look at the first token ("sink"), the one before ("previous"), themselves ("identity") or
    nothing ("zero"), or the first token's values are zero ("no_value"). Rows that see nothing stay so."""
    if kind == "no_value":
        return edit(model, {"v": torch.zeros_like}, layers=layers, heads=heads, positions=[0])
    if kind not in ("sink", "previous", "identity", "zero"):
        raise RegardError(f"kind={kind!r}; expected sink, previous, identity, zero or no_value")

    def rows(w: Tensor, at: At) -> Tensor:
        place = at.start + torch.arange(w.shape[2], device=w.device)
        key = {"sink": 0 * place, "previous": (place - 1).clamp_min(0), "identity": place, "zero": 0 * place}[kind]
        one = F.one_hot(key, w.shape[-1]).to(w) * (0.0 if kind == "zero" else 1.0)
        return torch.where((w != 0).any(-1, keepdim=True), one, 0.0)

    return edit(model, {"weights": rows}, layers=layers, heads=heads)


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
