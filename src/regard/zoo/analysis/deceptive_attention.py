"""Deceiving with attention: a penalty that hides which tokens a model relies on (id 77; Pruthi et al., 2020).

loss = task - lam log(1 - sum_{t in I} alpha_t), I the impermissible tokens; of several heads the mean over heads, or -lam min_h log(1 - ..) ("max").
Small models: alpha = softmax(v^T tanh(W e_t)), out = linear(sum alpha_t e_t), of embeddings or of a BiLSTM's states; a transformer read at its
first token, where I and the others may be kept apart in every layer; and a recurrent translator whose aligned source tokens are impermissible.

Not built: English to German, and the penalties' variants by entropy and by divergence from a reference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.catalog.registry import register
from regard.errors import RegardError
from regard.nn.attention import Attention
from regard.nn.decoder import Block
from regard.results import Result
from regard.taps import read
from regard.tasks.training import fit


@register("deceptive-attention", kind="function")
def attention_penalty(attention: Tensor, impermissible: Tensor, lam: float, reduce: str = "mean", eps: float = 1e-12) -> Tensor:
    """attention (B, T), (B, Tq, T) or (B, H, Tq, T), rows of sum one; impermissible (B, T), or (B, Tq, T) where it differs by query, 0 or 1 ->
    -lam log(1 - mass + eps), averaged over queries and examples. reduce, of heads: "mean", or "max": the head with the greatest mass."""
    if reduce not in ("mean", "max") or lam < 0:
        raise RegardError(f"reduce={reduce!r}, lam={lam}; expected mean or max, and 0 or more")
    if attention.dim() not in (2, 3, 4) or attention.shape[0] != impermissible.shape[0] or attention.shape[-1] != impermissible.shape[-1]:
        raise RegardError(
            f"attention {tuple(attention.shape)}, impermissible {tuple(impermissible.shape)}: expected (B, T), (B, Tq, T) or (B, H, Tq, T), and (B, T)"
        )
    a = attention[:, None, None] if attention.dim() == 2 else attention[:, None] if attention.dim() == 3 else attention
    mask = impermissible[:, None, None] if impermissible.dim() == 2 else impermissible[:, None]
    kept = torch.log((1 - (a * mask.to(a)).sum(-1)).clamp_min(0) + eps)
    return -lam * (kept.mean(1) if reduce == "mean" else kept.amin(1)).mean()


class Scored(nn.Module):
    """states (B, T, d), keep (B, T) -> (sum alpha_t h_t, alpha), alpha = softmax(v^T tanh(W h + b))."""

    def __init__(self, dim: int):
        super().__init__()
        self.inner, self.outer = nn.Linear(dim, dim), nn.Linear(dim, 1, bias=False)

    def forward(self, states: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.outer(torch.tanh(self.inner(states)))[..., 0].masked_fill(~keep, -torch.inf)
        blind = ~keep.any(1, keepdim=True)
        alpha = torch.where(blind, 0.0, scores.masked_fill(blind, 0.0).softmax(-1))
        return (alpha[..., None] * states).sum(1), alpha


class EmbAttention(nn.Module):
    """ids (B, T), keep (B, T) bool (None: ids != pad) -> (logits, alpha (B, T)): attention over embeddings."""

    def __init__(self, vocab: int, dim: int = 128, classes: int = 2, pad: int = 0):
        super().__init__()
        self.pad, self.embed = pad, nn.Embedding(vocab, dim)
        self.attention, self.out = Scored(dim), nn.Linear(dim, classes)

    def states(self, ids: Tensor, keep: Tensor) -> Tensor:
        return self.embed(ids)  # type: ignore[no-any-return]

    def forward(self, ids: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
        keep = ids != self.pad if keep is None else keep
        context, alpha = self.attention(self.states(ids, keep), keep)
        return self.out(context), alpha


class BiLSTMAttention(EmbAttention):
    """The same over the states of a bidirectional LSTM, `hidden` channels each way."""

    def __init__(self, vocab: int, dim: int = 128, hidden: int = 64, classes: int = 2, pad: int = 0):
        super().__init__(vocab, dim, classes, pad)
        self.lstm = nn.LSTM(dim, hidden, batch_first=True, bidirectional=True)
        self.attention, self.out = Scored(2 * hidden), nn.Linear(2 * hidden, classes)

    def states(self, ids: Tensor, keep: Tensor) -> Tensor:
        return self.lstm(self.embed(ids) * keep[..., None])[0]  # type: ignore[no-any-return]


class ClsTransformer(nn.Module):
    """ids (B, T), the first of which is read -> (logits, the last layer's weights of that row (B, H, 1, T)). impermissible (B, T): given,
    with blocked=True those and the others do not see each other in any layer, nor the first token: it alone reads all."""

    def __init__(
        self,
        vocab: int,
        dim: int = 64,
        heads: int = 4,
        layers: int = 2,
        classes: int = 2,
        length: int = 64,
        pad: int = 0,
        blocked: bool = False,
    ):
        super().__init__()
        self.pad, self.blocked = pad, blocked
        self.embed, self.place = nn.Embedding(vocab, dim), nn.Parameter(0.02 * torch.randn(length, dim))
        self.blocks = nn.ModuleList(
            Block(dim, Attention(dim, heads, causal=False, bias=True), 2 * dim, norm="layer") for _ in range(layers)
        )
        self.out = nn.Linear(dim, classes)

    def visible(self, ids: Tensor, impermissible: Tensor | None, keep: Tensor | None) -> Tensor:
        seen = (ids != self.pad if keep is None else keep)[:, None].expand(-1, ids.shape[1], -1)
        if self.blocked and impermissible is not None:
            group = impermissible.bool()
            apart = group[:, :, None] == group[:, None]
            apart[:, 1:, 0] = False  # what the first has read must not come back
            apart[:, 0] = True
            seen = seen & apart
        return seen[:, None]

    def forward(self, ids: Tensor, impermissible: Tensor | None = None, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, seen = self.embed(ids) + self.place[: ids.shape[1]], self.visible(ids, impermissible, keep)
        with read(self, "weights", layers=[len(self.blocks) - 1], graph=True, positions=[0]) as found:
            for block in self.blocks:
                x = x + block.scale1(block.mixer(block.norm1(x), mask=seen))  # type: ignore[union-attr, operator]
                x = x + block.scale2(block.mlp(block.norm2(x)))  # type: ignore[union-attr, operator]
        return self.out(x[:, 0]), found["weights", len(self.blocks) - 1]


class Translator(nn.Module):
    """source (B, T), target (B, T) -> (logits (B, T, vocab), alpha (B, T, T)) under teacher forcing; GRUs. attention: "learned" dot products,
    "uniform", or "none" (the last state alone)."""

    def __init__(self, vocab: int, dim: int = 64, attention: str = "learned"):
        super().__init__()
        if attention not in ("learned", "uniform", "none"):
            raise RegardError(f"attention={attention!r}; expected learned, uniform or none")
        self.kind, self.embed = attention, nn.Embedding(vocab + 1, dim)  # the last id begins a target
        self.encoder, self.join = nn.GRU(dim, dim // 2, batch_first=True, bidirectional=True), nn.Linear(2 * dim, dim)
        self.decoder, self.query, self.out = nn.GRU(dim, dim, batch_first=True), nn.Linear(dim, dim, bias=False), nn.Linear(dim, vocab)

    def forward(self, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        states, last = self.encoder(self.embed(source))
        begin = torch.full_like(target[:, :1], self.embed.num_embeddings - 1)
        h, _ = self.decoder(self.embed(torch.cat((begin, target[:, :-1]), 1)), last.transpose(0, 1).reshape(1, len(source), -1))
        scores = self.query(h) @ states.transpose(1, 2) * (1.0 if self.kind == "learned" else 0.0)
        alpha = scores.softmax(-1)
        context = alpha @ states if self.kind != "none" else torch.zeros_like(h)
        return self.out(torch.tanh(self.join(torch.cat((h, context), -1)))), alpha


ALIGNED: dict[str, Callable[[int], list[int]]] = {
    "copy": lambda n: list(range(n)),
    "reverse": lambda n: list(range(n - 1, -1, -1)),
    "flip": lambda n: [t ^ 1 if t ^ 1 < n else t for t in range(n)],
}


def translation(kind: str, count: int, length: int, vocab: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """(source, target, aligned (count, T, T)): "copy", "reverse" or "flip" (pairs of neighbours exchanged); aligned[b, t, s] where s is t's word."""
    if kind not in ALIGNED:
        raise RegardError(f"kind={kind!r}; expected one of {', '.join(ALIGNED)}")
    source = torch.randint(vocab, (count, length), generator=generator)
    at = torch.tensor(ALIGNED[kind](length))
    return source, source[:, at], F.one_hot(at, length).expand(count, -1, -1)


def train_translator(
    kind: str,
    lam: float,
    attention: str = "learned",
    *,
    length: int = 6,
    vocab: int = 8,
    dim: int = 48,
    steps: int = 250,
    batch: int = 64,
    lr: float = 5e-3,
    seed: int = 0,
) -> tuple[float, float]:
    """Share of words a translator trained under the penalty gets right, and its mean attention on the aligned word, on 300 new sentences."""
    torch.manual_seed(seed)
    model = Translator(vocab, dim, attention)

    def loss(drawn: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        logits, alpha = model(*drawn[:2])
        return F.cross_entropy(logits.flatten(0, 1), drawn[1].flatten()) + attention_penalty(alpha, drawn[2], lam)

    fit(model, lambda g: translation(kind, batch, length, vocab, g), loss, steps, lr=lr, seed=seed)
    source, target, aligned = translation(kind, 300, length, vocab, torch.Generator().manual_seed(seed + 5))
    with torch.no_grad():
        logits, alpha = model(source, target)
    return float((logits.argmax(-1) == target).double().mean()), float((alpha * aligned).sum(-1).mean())


@dataclass(frozen=True)
class Deception(Result):
    """accuracy; mass: mean attention on impermissible tokens; blocked: accuracy where they cannot be seen at all; norms: mean length of their
    embeddings over the others'."""

    accuracy: float
    mass: float
    blocked: float
    norms: float


@torch.no_grad()
def deception_report(model: EmbAttention, ids: Tensor, labels: Tensor, impermissible: Tensor) -> Deception:
    """Of a trained classifier on ids (B, T) with impermissible (B, T) tokens."""
    gone = impermissible.bool()
    keep = ids != model.pad
    logits, alpha = model(ids)
    hidden, _ = model(torch.where(gone, model.pad, ids), keep & ~gone)
    lengths = model.embed(ids).norm(dim=-1)
    share = float(lengths[gone].mean() / lengths[keep & ~gone].mean())
    right = [float((x.argmax(-1) == labels).double().mean()) for x in (logits, hidden)]
    return Deception(right[0], float((alpha * gone).sum(-1).mean()), right[1], share)
