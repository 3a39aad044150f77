"""Do sinks appear? One tiny layer learns bigrams and three tokens that ask for a copy of the token before them.

Where nothing is asked of attention, rows that must sum to one park their weight on the first token (Gu et al., 2024; Guo et al., 2024).

Massive activations, and norms of keys and values at the sink, in any tapped decoder: `regard.interpret.sink_report(model, ids, active, residual=True)`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.algebra import (
    Causal,
    FeatureMap,
    Headwise,
    Input,
    Mask,
    Mechanism,
    Prefix,
    Recurrent,
    RowLocal,
    Segments,
    Weighted,
    Window,
    elu_plus_one,
    identity,
)
from regard.algebra.mask import conjuncts
from regard.algebra.normalizer import exp_shifted, with_sink
from regard.catalog import get
from regard.catalog.registry import register
from regard.engine import weights
from regard.errors import RegardError, nearest
from regard.nn.attention import Attention, LayerState
from regard.nn.parts import whole
from regard.plots import figure
from regard.tasks.statistics import importance, kurtosis, sink_rate

BOS, TRIGGERS, VOCAB = 0, (1, 2, 3), 32


def sink_metric(weights: Tensor, eps: float = 0.3) -> Tensor:
    """Sink_k^eps (L,), in percent: for each position k the share of maps (samples, layers, heads, L, L) whose importance
    alpha_k = mean_{i >= k} A_ik exceeds eps. The paper reports k = 0, L = 64, eps = 0.3."""
    return 100 * (importance(weights) > eps).double().flatten(0, -2).mean(0)


def studied(name: str) -> Mechanism:
    """The study's ways to weigh: "softmax", "sigmoid" and "elu" (phi(q).phi(k) of elu + 1), the latter two also "-normalised" by their
    sums, "linear-normalised" (dot products over their absolute sum), and "k-bias": softmax with a learned null logit q.k*."""
    sink = Input("sink", "bhq", default=float("-inf"), layer=Headwise("q", act=None, std=0.02))
    known: dict[str, Mechanism] = {
        "softmax": Weighted(),
        "sigmoid": get("sigmoid"),
        "sigmoid-normalised": Weighted(normalizer=RowLocal(torch.sigmoid, torch.sigmoid)),
        "elu": Recurrent(FeatureMap(elu_plus_one), scaled=False),
        "elu-normalised": Recurrent(FeatureMap(elu_plus_one), readout="sum", scaled=False),
        "linear-normalised": Weighted(normalizer=RowLocal(identity, torch.abs)),
        "k-bias": Weighted(normalizer=RowLocal(exp_shifted, exp_shifted, with_sink, shift="max0", inputs=(sink,))),
    }
    if name not in known:
        raise RegardError(f"name={name!r}; expected one of {', '.join(known)}.{nearest(name, known)}")
    return known[name]


def bigrams() -> Tensor:
    """(VOCAB, VOCAB) the fixed chain's probabilities of the next token; a trigger's row is that of the first token."""
    table = torch.softmax(2.5 * torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(7)), -1)
    table[:, BOS], table[:, list(TRIGGERS)] = 0.0, 0.1 / 3
    table[list(TRIGGERS)] = table[BOS].clone()
    return table / table.sum(-1, keepdim=True)


class Tiny(nn.Module):
    """The chain's log probabilities, plus one layer of attention read by the output alone: a head that adds to every token what only
    triggers ask for spoils the others. post_norm: the norm stands behind attention, not before it. prefix: tokens that see one another both
    ways (a prefix language model); window: how many tokens back, its own included, a token sees."""

    known: Tensor

    def __init__(
        self,
        mechanism: str | Mechanism,
        dim: int,
        heads: int,
        length: int,
        post_norm: bool = False,
        prefix: int = 0,
        window: int | None = None,
    ):
        super().__init__()
        self.post_norm, self.prefix = post_norm, prefix
        causal = Causal() if window is None else Causal() & Window(window)
        self.mask = causal | Prefix(prefix) if prefix else causal
        self.embed, self.head, self.norm = nn.Embedding(VOCAB, dim), nn.Linear(dim, VOCAB, bias=False), nn.RMSNorm(dim, eps=1e-6)
        self.attention = Attention(dim, heads, mechanism, rope=True, context_len=length, causal=not prefix)
        self.register_buffer("known", bigrams().clamp_min(1e-4).log())

    def stream(self, tokens: Tensor) -> Tensor:
        """What attention reads, (B, L, dim)."""
        x = self.embed(tokens)
        return x if self.post_norm else self.norm(x)  # type: ignore[no-any-return]

    def added(self, x: Tensor) -> Tensor:
        """What attention gives, (B, L, dim)."""
        y = self.attention(x, mask=self.mask)
        return self.norm(y) if self.post_norm else y  # type: ignore[no-any-return]

    def weights(self, x: Tensor) -> Tensor | None:
        q, k, v, _ = self.attention.heads_of(x, x, 0, None)
        made = self.attention.inputs(x, {"q": q, "k": k, "v": v})
        return weights(q, k, self.attention.mechanism, mask=self.mask, **made)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.known[tokens] + self.head(self.added(self.stream(tokens)))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class SinkResult:
    """head_rates: for each head the share of samples whose first token gets over 0.3; sink_rate: their mean. positions (L,): `sink_metric` of every
    place, in percent (None without weights). accuracy: of copies. kurtosis: of
    what attention adds. logit_range: mean over rows of the largest minus the smallest visible logit. loss: of training."""

    head_rates: tuple[float, ...]
    accuracy: float
    kurtosis: float
    logit_range: float
    loss: tuple[float, ...]
    positions: tuple[float, ...] | None = None

    @property
    def sink_rate(self) -> float:
        return sum(self.head_rates) / max(1, len(self.head_rates)) if self.head_rates else float("nan")

    def plot(self) -> str:
        """The loss of training as an SVG."""
        return figure("Training", "step", "loss", {"loss": [(float(n), x) for n, x in enumerate(self.loss)]})


def text(count: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens (count, length + 1) and which of the last `length` are copies: a fixed bigram chain; a trigger repeats the token before it."""
    table, triggers = bigrams(), torch.tensor(TRIGGERS)
    tokens = torch.full((count, length + 1), BOS)
    copied = torch.zeros(count, length, dtype=torch.bool)
    for at in range(1, length + 1):
        tokens[:, at] = torch.multinomial(table[tokens[:, at - 1]], 1, generator=generator)[:, 0]
        if at > 1:
            before = tokens[:, at - 2]
            copied[:, at - 1] = torch.isin(tokens[:, at - 1], triggers) & (before != BOS)
            tokens[:, at] = torch.where(copied[:, at - 1], before, tokens[:, at])
    return tokens, copied


@register("attention-sink", kind="experiment")
def sink_experiment(
    mechanism: str | Mechanism,
    *,
    steps: int = 400,
    length: int = 32,
    dim: int = 32,
    heads: int = 2,
    lr: float = 1e-2,
    batch: int = 32,
    seed: int = 0,
    post_norm: bool = False,
    prefix: int = 0,
    window: int | None = None,
) -> SinkResult:
    """Train one layer of `mechanism` for `steps` of `batch` sequences (a few seconds) and look at its weights. post_norm, prefix, window: the
    model's (`Tiny`); the tokens of a prefix, which see what comes, are not learned."""
    if not 0 <= prefix < length:
        raise RegardError(f"prefix={prefix}; expected 0 to length - 1 = {length - 1}: tokens behind it are learned")
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = Tiny(mechanism, dim, heads, length, post_norm, prefix, window)
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.01)
    warm = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 20))
    losses = []
    for tokens in text(steps * batch, length, generator)[0].split(batch):
        loss = F.cross_entropy(model(tokens[:, :-1])[:, prefix:].flatten(0, 1), tokens[:, 1 + prefix :].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        warm.step()
        losses.append(float(loss.detach()))
    with torch.no_grad():
        tokens, copied = text(256, length, generator)
        copied[:, :prefix] = False
        right = model(tokens[:, :-1]).argmax(-1) == tokens[:, 1:]
        x = model.stream(tokens[:, :-1])
        found = model.weights(x)
        spread = logit_range(model.attention, x)
        added = kurtosis(model.added(x))
    rates = () if found is None else tuple(sink_rate(found[:, h]) for h in range(heads))
    return SinkResult(
        rates,
        float(right[copied].double().mean()),
        added,
        spread,
        tuple(losses),
        None if found is None else tuple(sink_metric(found).tolist()),
    )


@functools.cache
def trained(mechanism: str | Mechanism, seed: int = 0) -> SinkResult:
    """`sink_experiment` with its defaults, run once a process for all that look at its result."""
    return sink_experiment(mechanism, seed=seed)


def logit_range(attention: Attention, x: Tensor) -> float:
    """Mean over rows of max - min of the causally visible scaled dot products."""
    q, k, _, _ = attention.heads_of(x, x, 0, None)
    s = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    seen = torch.ones(s.shape[-2:], dtype=torch.bool).tril()
    return float((s.masked_fill(~seen, -torch.inf).amax(-1) - s.masked_fill(~seen, torch.inf).amin(-1)).mean())


class KeyValueBias(Attention):
    """`Attention` with one more key k* and value v* a head, without query and position. value=False: v* is 0 ("K-bias").

    With v* = 0 and softmax this is the null logit q.k*: p_ij = e^{s_ij} / (e^{s_i*} + sum_j e^{s_ij}). Masks are of the tokens: padding, and tensors
    (..., L), leave the pair in sight. It belongs to no document: packed ones are refused.
    """

    def __init__(self, dim: int, heads: int, mechanism: str | Mechanism = "softmax", *, value: bool = True, **options: Any):
        super().__init__(dim, heads, mechanism, **options)
        self.key_bias = nn.Parameter(torch.randn(self.kv_heads, self.key_dim) * 0.02)
        self.value_bias = nn.Parameter(torch.zeros(self.kv_heads, self.value_dim), requires_grad=value)

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Mask | Tensor | None = None, **inputs: Any) -> Tensor:
        mask, inputs = self.beside(mask, inputs)
        return super().forward(x, context, mask, **inputs)  # type: ignore[no-any-return]

    @whole
    def step(self, x: Tensor, state: LayerState | None = None, mask: Mask | None = None, **inputs: Any) -> tuple[Tensor, LayerState]:
        mask, inputs = self.beside(mask, inputs)
        return super().step(x, state, mask, **inputs)  # type: ignore[no-any-return]

    def beside(self, mask: Any, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """A mask of the tokens and its inputs, with the pair in sight."""
        if isinstance(mask, Mask) and any(isinstance(part, Segments) for part in conjuncts(mask)):
            raise RegardError("packed documents: the key and value of the layer belong to none of them; expected one text a row")
        if isinstance(mask, Tensor) and mask.dim() and mask.shape[-1] > 1:
            mask = F.pad(mask, (1, 0), value=True if mask.dtype == torch.bool else 0.0)
        keep = inputs.get("keep")
        return mask, {**inputs, "keep": F.pad(keep, (1, 0), value=True)} if isinstance(keep, Tensor) else inputs

    def heads_of(
        self,
        x: Tensor,
        source: Tensor,
        position: int | Tensor,
        conv: tuple[Tensor, ...] | None,
        documents: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
        q, k, v, tails = super().heads_of(x, source, position, conv, documents)
        first = position if isinstance(position, int) else int(position[0])
        if first == 0:  # in a stream the pair is read once, before the first token
            k, v = (
                torch.cat((bias.expand(x.shape[0], *bias.shape)[:, :, None], y), 2)
                for bias, y in ((self.key_bias, k), (self.value_bias, v))
            )
        return q, k, v, tails
