"""An Attentive Survey: attention by four axes, with its alignments and distributions as parts (id 17; Chaudhari et al., 2019).

e_ij = a(k_j, q_i);  alpha = p(e);  c_i = sum_j alpha_ij v_j.   local: centre i, or T sigmoid(v^T tanh(W q)), times exp(-(j - p_i)^2 / (2 (D/2)^2))
axes: sequences (distinctive, co, self), abstraction (single, multi), positions (soft, hard, local), representations (single, multi,
multi-dimensional).   Other rows by these axes: `regard.names(sequences="self", positions="local")`. Not built: REINFORCE for hard
positions (the straight-through estimator is).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from regard.catalog.axes import AXES, Axes
from regard.catalog.registry import register
from regard.errors import RegardError
from regard.nn import alignments
from regard.nn.alignments import Net
from regard.nn.parts import takes
from regard.zoo.softmax.entmax import entmax_weights
from regard.zoo.softmax.sparsemax import sparsemax_weights

DISTRIBUTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda e: e.softmax(-1),
    "sparsemax": sparsemax_weights,
    "entmax": entmax_weights,
    "sigmoid": torch.sigmoid,
}


@register("attentive-survey", kind="module")
class SurveyAttention(nn.Module):
    """queries (B, Tq, D), keys (B, Tk, D), values (B, Tk, Dv) -> context (B, Tq, Dv), weights (B, Tq, Tk).

    alignment: of regard.nn.alignments, with its options. distribution: softmax, sparsemax, entmax (1.5) or sigmoid. positions: "soft"; "hard", one
    place a query, drawn in training (with gradients straight through) and the likeliest in evaluation; "local-m", keys within `width` of the
    query's own place; "local-p", those near a predicted centre, width being D. dim: of queries and keys.
    """

    axes: Axes  # what the row's forms have, for `regard.names`

    def __init__(
        self,
        dim: int,
        alignment: str = "scaled",
        distribution: str = "softmax",
        positions: str = "soft",
        width: float = 4.0,
        **options: Any,
    ):
        super().__init__()
        if distribution not in DISTRIBUTIONS or positions not in ("soft", "hard", "local-m", "local-p") or width <= 0:
            raise RegardError(
                f"distribution={distribution!r}, positions={positions!r}, width={width}: expected one of {', '.join(DISTRIBUTIONS)}; soft, hard, "
                "local-m or local-p; and a width above 0"
            )
        self.align, self.distribution, self.positions, self.width = (
            alignments.alignment(alignment, dim, **options),
            distribution,
            positions,
            width,
        )
        self.centre = (
            nn.Sequential(nn.Linear(dim, dim, bias=False), nn.Tanh(), nn.Linear(dim, 1, bias=False)) if positions == "local-p" else None
        )

    @takes(queries="batch queries dim", keys="batch keys dim", values="batch keys value", keep="batch keys")
    def forward(self, queries: Tensor, keys: Tensor, values: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """keep (B, Tk) bool: keys that are there. Queries that see none get zeros."""
        e, at = self.align(queries, keys), torch.arange(keys.shape[1], device=keys.device)
        seen = torch.ones_like(e, dtype=torch.bool) if keep is None else keep[:, None].expand_as(e)
        if self.positions == "local-m":
            seen = seen & ((at - torch.arange(e.shape[1], device=e.device)[:, None]).abs() <= self.width)
        alive = seen.any(-1, keepdim=True)
        e = torch.where(alive, e.masked_fill(~seen, torch.finfo(e.dtype).min / 4), 0.0)
        p = torch.where(seen, DISTRIBUTIONS[self.distribution](e), 0.0)
        if self.centre is not None:
            centre = keys.shape[1] * torch.sigmoid(self.centre(queries))
            p = p * torch.exp(-2 * ((at - centre) / self.width) ** 2)
        if self.positions == "hard":
            share = torch.where(alive, p / p.sum(-1, keepdim=True).clamp_min(1e-30), 1.0 / p.shape[-1])
            pick = torch.multinomial(share.detach().flatten(0, 1), 1).view(*p.shape[:2], 1) if self.training else p.argmax(-1, keepdim=True)
            p = torch.zeros_like(p).scatter(-1, pick, 1.0) * alive + (p - p.detach())
        return p @ values, p


class SelfReading(nn.Module):
    """x (B, T, D) -> context, weights: query, key and value are one sequence."""

    def __init__(self, dim: int, **options: Any):
        super().__init__()
        self.attention = SurveyAttention(dim, **options)

    def forward(self, x: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.attention(x, x, x, keep)  # type: ignore[no-any-return]


class CoAttention(nn.Module):
    """x (B, T1, D), y (B, T2, D) -> contexts (B, D) each, weights (B, T1), (B, T2) (Lu et al., 2016).

    parallel: C = tanh(y W x^T), H_x = tanh(W_x x + C^T W_y y) and the other way round, weights softmax(w^T H). alternating: x is summed up, then y
    given that, then x given that.
    """

    def __init__(self, dim: int, hidden: int | None = None, alternating: bool = False):
        super().__init__()
        hidden = dim if hidden is None else hidden
        self.alternating = alternating
        self.x, self.y = (nn.Linear(dim, hidden, bias=False) for _ in range(2))
        self.affinity = None if alternating else nn.Linear(dim, dim, bias=False)
        self.guide = nn.Linear(dim, hidden, bias=False) if alternating else None
        self.w_x, self.w_y = (nn.Linear(hidden, 1, bias=False) for _ in range(2))

    @takes(x="batch first dim", y="batch second dim")
    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if self.affinity is not None:
            c = torch.tanh(y @ self.affinity(x).mT)  # (B, T2, T1)
            a = self.w_x(torch.tanh(self.x(x) + c.mT @ self.y(y)))[..., 0].softmax(-1)
            b = self.w_y(torch.tanh(self.y(y) + c @ self.x(x)))[..., 0].softmax(-1)
            return (a[:, None] @ x)[:, 0], (b[:, None] @ y)[:, 0], a, b
        assert self.guide is not None

        def summed(x: Tensor, own: nn.Linear, w: nn.Linear, given: Tensor | None) -> tuple[Tensor, Tensor]:
            h = own(x) if given is None else own(x) + self.guide(given)[:, None]  # type: ignore[misc]
            p = w(torch.tanh(h))[..., 0].softmax(-1)
            return (p[:, None] @ x)[:, 0], p

        first, _ = summed(x, self.x, self.w_x, None)
        read_y, b = summed(y, self.y, self.w_y, first)
        read_x, a = summed(x, self.x, self.w_x, read_y)
        return read_x, read_y, a, b


class Summary(nn.Module):
    """x (B, T, D) -> (B, D) and weights (B, T): softmax of u^T tanh(W x + b), u a learned context."""

    def __init__(self, dim: int):
        super().__init__()
        self.net, self.u = nn.Linear(dim, dim), nn.Linear(dim, 1, bias=False)

    def forward(self, x: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
        e = self.u(torch.tanh(self.net(x)))[..., 0]
        p = e.softmax(-1) if keep is None else e.masked_fill(~keep, torch.finfo(e.dtype).min).softmax(-1) * keep
        return (p[:, None] @ x)[:, 0], p


class HAN(nn.Module):
    """Documents ids (B, sentences, words), 0 no word -> logits (B, classes), weights of sentences and of words (Yang et al., 2016): a GRU in both
    directions and a summary over words, then over sentences."""

    def __init__(self, vocab: int, dim: int, classes: int):
        super().__init__()
        if dim % 2:
            raise RegardError(f"dim={dim}: expected an even number, half for each direction")
        self.embed = nn.Embedding(vocab, dim, padding_idx=0)
        self.words, self.sentences = (nn.GRU(dim, dim // 2, batch_first=True, bidirectional=True) for _ in range(2))
        self.of_words, self.of_sentences, self.head = Summary(dim), Summary(dim), nn.Linear(dim, classes)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if ids.dim() != 3:
            raise RegardError(f"ids {tuple(ids.shape)}: expected (B, sentences, words)")
        there = ids > 0
        words, _ = self.words(self.embed(ids.flatten(0, 1)))
        sentence, p = self.of_words(words, there.flatten(0, 1))
        states, _ = self.sentences(sentence.unflatten(0, ids.shape[:2]))
        document, weights = self.of_sentences(states, there.any(-1))
        return self.head(document), weights, p.unflatten(0, ids.shape[:2])


class RNNSearch(nn.Module):
    """source (B, S), target (B, T) ids -> logits (B, T, vocab) of each next target token, weights (B, T, S) (Bahdanau et al., 2014): a GRU reads
    the source, another writes and looks back by additive alignment. pointer: logits are the alignments themselves, over source places (Vinyals et
    al., 2015), vocab being S."""

    def __init__(self, vocab: int, dim: int, pointer: bool = False):
        super().__init__()
        self.embed, self.pointer, self.align = nn.Embedding(vocab, dim), pointer, Net(dim)
        self.reader, self.writer = nn.GRU(dim, dim, batch_first=True), nn.GRUCell(dim if pointer else 2 * dim, dim)
        self.head = None if pointer else nn.Linear(2 * dim, vocab)

    @takes(source="batch source", target="batch target")
    def forward(self, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        states, last = self.reader(self.embed(source))
        h, outs, weights = last[0], [], []
        for x in self.embed(target).unbind(1):
            e = self.align(h[:, None], states)[:, 0]
            p = e.softmax(-1)
            context = (p[:, None] @ states)[:, 0]
            h = self.writer(x if self.pointer else torch.cat((x, context), -1), h)
            scores = self.align(h[:, None], states)[:, 0] if self.pointer else e
            weights.append(scores.softmax(-1) if self.pointer else p)
            outs.append(scores if self.head is None else self.head(torch.cat((h, context), -1)))
        return torch.stack(outs, 1), torch.stack(weights, 1)


class MemoryHops(nn.Module):
    """query (B, D), memory (B, T, D) -> (B, D), weights (B, hops, T) (Sukhbaatar et al., 2015): u <- u + sum_j softmax(u^T A m_j) C m_j."""

    def __init__(self, dim: int, hops: int = 2):
        super().__init__()
        self.a, self.c = (nn.ModuleList(nn.Linear(dim, dim, bias=False) for _ in range(hops)) for _ in range(2))

    @takes(query="batch dim", memory="batch places dim")
    def forward(self, query: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        weights = []
        for a, c in zip(self.a, self.c, strict=True):
            weights.append((a(memory) @ query[..., None])[..., 0].softmax(-1))
            query = query + (weights[-1][:, None] @ c(memory))[:, 0]
        return query, torch.stack(weights, 1)


class MultiRepresentation(nn.Module):
    """Several embeddings of one input (B, T, representations, D) -> (B, T, D), weights (B, T, representations): softmax of w^T e."""

    def __init__(self, dim: int):
        super().__init__()
        self.w = nn.Linear(dim, 1)

    @takes(x="batch places kinds dim")
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        p = self.w(x)[..., 0].softmax(-1)
        return (p[..., None, :] @ x)[..., 0, :], p


class MultiDimensional(nn.Module):
    """queries (B, Tq, D), keys (B, Tk, D), values (B, Tk, Dv) -> context (B, Tq, Dv), weights (B, Tq, Tk, Dv): a softmax for each channel of values
    (Shen et al., 2018), e_ij = W tanh(W_q q + W_k k + b)."""

    def __init__(self, dim: int, value_dim: int | None = None):
        super().__init__()
        self.net, self.out = Net(dim), nn.Linear(dim, dim if value_dim is None else value_dim)

    @takes(queries="batch queries dim", keys="batch keys dim", values="batch keys value")
    def forward(self, queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        p = self.out(self.net.hidden(queries, keys)).softmax(2)
        return (p * values[:, None]).sum(2), p


def tags(sequences: str, abstraction: str = "single", positions: str = "soft", representations: str = "single") -> dict[str, str]:
    return {"sequences": sequences, "abstraction": abstraction, "positions": positions, "representations": representations}


FORMS: dict[str, tuple[Callable[..., nn.Module], dict[str, str]]] = {
    "attention": (SurveyAttention, tags("distinctive")),
    "hard attention": (lambda dim, **how: SurveyAttention(dim, positions="hard", **how), tags("distinctive", positions="hard")),
    "local-m attention": (lambda dim, **how: SurveyAttention(dim, positions="local-m", **how), tags("distinctive", positions="local")),
    "local-p attention": (lambda dim, **how: SurveyAttention(dim, positions="local-p", **how), tags("distinctive", positions="local")),
    "self-attention": (SelfReading, tags("self")),
    "parallel co-attention": (CoAttention, tags("co")),
    "alternating co-attention": (lambda dim, **how: CoAttention(dim, alternating=True, **how), tags("co")),
    "hierarchical attention": (HAN, tags("self", "multi")),
    "encoder-decoder": (RNNSearch, tags("distinctive")),
    "pointer network": (lambda vocab, dim: RNNSearch(vocab, dim, pointer=True), tags("distinctive")),
    "memory network": (MemoryHops, tags("distinctive", "multi")),
    "multi-representational": (MultiRepresentation, tags("self", representations="multi")),
    "multi-dimensional": (MultiDimensional, tags("distinctive", representations="multi-dimensional")),
}
SurveyAttention.axes = {axis: frozenset(own[axis] for _, own in FORMS.values()) for axis in AXES}
INTERPRETABILITY = (
    "regard.interpret.rollout",
    "regard.interpret.ablated",
    "regard.taps.read",
)  # what attention's weights can be held against


def find(**axes: str) -> dict[str, Callable[..., nn.Module]]:
    """Forms by name whose tags match: find(sequences="co"), find(positions="hard", sequences="distinctive")."""
    for axis, value in axes.items():
        if axis not in AXES or value not in AXES[axis]:
            raise RegardError(f"{axis}={value!r}: expected {'; '.join(f'{name}: ' + ', '.join(values) for name, values in AXES.items())}")
    return {name: make for name, (make, own) in FORMS.items() if all(own[axis] == value for axis, value in axes.items())}


__all__ = ["AXES", "DISTRIBUTIONS", "FORMS", "INTERPRETABILITY", "SurveyAttention", "find"]
