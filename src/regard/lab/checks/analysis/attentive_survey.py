"""Checks of attentive-survey."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from regard.lab import naive
from regard.lab.checks.shared.gaps import gaps
from regard.lab.verification import check
from regard.nn.alignments import ALIGNMENTS, alignment
from regard.tasks.training import fit
from regard.zoo.analysis.attentive_survey import AXES, FORMS, HAN, CoAttention, MemoryHops, RNNSearch, SurveyAttention, find


def drawn(module: nn.Module) -> Any:
    module.double()
    for p in module.parameters():
        p.data.normal_(std=0.5)
    return module


def aligned(name: str, m: Any, q: Tensor, k: Tensor, keys: Tensor, j: int) -> Tensor:
    """e of one query (D,) and one key (D,), by the survey's formula."""
    if name in ("similarity", "dot", "scaled"):
        return (q * k).sum() / {"similarity": q.norm() * k.norm(), "dot": 1.0, "scaled": math.sqrt(len(q))}[name]
    if name == "generalized kernel":
        return (torch.where(q > 0, q + 1, q.exp()) * torch.where(k > 0, k + 1, k.exp())).sum()
    if name in ("general", "biased general", "activated general"):
        turned = m.w.weight @ q
        if name == "biased general":
            return k @ (turned + m.w.bias)
        return k @ turned if name == "general" else torch.tanh(k @ turned + m.b)
    if name == "concat":
        return m.w.weight[0] @ torch.tanh(m.both.weight @ torch.cat((q, k)) + m.both.bias)
    if name == "location":
        return torch.tanh(m.w.weight @ q)[j]
    if name == "feature":
        return m.w.weight[0] @ torch.tanh(m.one.weight @ k + m.two.weight @ (k - keys.mean(0)) + m.two.bias)
    h = torch.tanh(m.q.weight @ q + m.k.weight @ k + m.k.bias)
    if name == "deep":
        h = torch.tanh(m.deeper[0].weight @ h + m.deeper[0].bias)
    return m.w.weight[0] @ h


@check("attentive-survey", "the twelve alignments: gap to a double loop, and of gradients", below=1e-10, control="queries in another order")
def _() -> tuple[float, float]:
    own, other = [], []
    assert len(ALIGNMENTS) == 12
    for name in ALIGNMENTS:
        m = drawn(alignment(name, 6))
        q, k = (torch.randn(2, n, 6, dtype=torch.float64, requires_grad=True) for n in (3, 5))
        truth = torch.stack(
            [
                torch.stack([torch.stack([aligned(name, m, x, y, ys, j) for j, y in enumerate(ys)]) for x in xs])
                for xs, ys in zip(q, k, strict=True)
            ]
        )
        inputs = [k] if name == "feature" else [q] if name == "location" else [q, k]
        own.append(gaps(m(q, k), truth, inputs))
        if name != "feature":
            other.append(naive.gap(m(q.flip(1), k), truth))
    return max(own), min(other)


def read(name: str) -> tuple[Tensor, Tensor]:
    """Weights of a form on (B=2, Tq=5, Tk=7, d=8), whose last dimension or dimensions are a distribution."""
    make = FORMS[name][0]
    q, k = torch.randn(2, 5, 8), torch.randn(2, 7, 8)
    ids = torch.randint(1, 8, (2, 3, 4))
    if name == "hierarchical attention":
        return make(8, 8, 3)(ids)[1:]
    if name in ("encoder-decoder", "pointer network"):
        return (make(8, 8)(ids[:, 0], ids[:, 1])[1],) * 2
    if "co-attention" in name:
        return make(8)(q, k)[2:]
    if name == "self-attention":
        return (make(8)(q)[1],) * 2
    if name == "memory network":
        return (make(8)(q[:, 0], k)[1],) * 2
    if name == "multi-representational":
        return (make(8)(torch.randn(2, 5, 3, 8))[1],) * 2
    p = make(8)(q, k, k)[1]
    return (p.transpose(2, 3) if name == "multi-dimensional" else p,) * 2


@check(
    "attentive-survey",
    "every value of every axis has forms that run, weights not negative and of sum 1: largest gap, predicted centres apart",
    below=1e-6,
    control="sigmoid weights",
)
def _() -> tuple[float, float]:
    worst, ran = 0.0, set()
    for axis, values in AXES.items():
        for value in values:
            found = find(**{axis: value})
            assert found, (axis, value)
            ran |= set(found)
    assert ran == set(FORMS) and set(find(sequences="co")) == {"parallel co-attention", "alternating co-attention"}
    assert set(find(positions="hard", sequences="distinctive")) == {"hard attention"}
    for name in sorted(ran - {"local-p attention"}):
        for p in read(name):
            assert bool((p >= 0).all())
            worst = max(worst, float((p.sum(-1) - 1).abs().max()))
    p = SurveyAttention(8, distribution="sigmoid")(torch.randn(2, 5, 8), torch.randn(2, 7, 8), torch.randn(2, 7, 8))[1]
    return worst, float((p.sum(-1) - 1).abs().max())


@check(
    "attentive-survey",
    "distributions and positions by loops: softmax, sparsemax, entmax, sigmoid; windows, predicted centres, the likeliest place; padding",
    below=1e-9,
    control="every key in the window",
)
def _() -> tuple[float, float]:
    q, k, v = (torch.randn(2, n, 6, dtype=torch.float64) for n in (5, 7, 7))
    keep = torch.ones(2, 7, dtype=torch.bool)
    keep[1, 5:] = False
    forms: dict[str, Callable[[Tensor], Tensor]] = {
        "softmax": naive.softmax,
        "sparsemax": naive.projection,
        "entmax": lambda s: naive.entmax(s, 1.5),
        "sigmoid": lambda s: 1 / (1 + torch.exp(-s)),
    }

    def by_hand(m: Any, distribution: str, positions: str, width: float) -> Tensor:
        out = torch.zeros(2, 5, 6, dtype=torch.float64)
        for b in range(2):
            for i in range(5):
                seen = [j for j in range(7) if keep[b, j] and (positions != "local-m" or abs(i - j) <= width)]
                p = forms[distribution](torch.stack([q[b, i] @ k[b, j] / math.sqrt(6) for j in seen]))
                if positions == "hard":
                    p = torch.nn.functional.one_hot(p.argmax(), len(seen)).double()
                if positions == "local-p":
                    t = 7 / (1 + torch.exp(-(m.centre[2].weight[0] @ torch.tanh(m.centre[0].weight @ q[b, i]))))
                    p = p * torch.stack([torch.exp(-((j - t) ** 2) / (2 * (width / 2) ** 2)) for j in seen])
                out[b, i] = p @ v[b, seen]
        return out

    own, other = [], []
    for distribution in forms:
        for positions in ("soft", "hard", "local-m", "local-p"):
            m = drawn(SurveyAttention(6, distribution=distribution, positions=positions, width=2.0)).eval()
            found = m(q, k, v, keep)[0]
            own.append(naive.gap(found, by_hand(m, distribution, positions, 2.0)))
            if positions == "local-m":
                other.append(naive.gap(found, by_hand(m, distribution, positions, 9.0)))
    return max(own), min(other)


@check(
    "attentive-survey",
    "a centre of width 1e6 is soft attention; of a row with one winner sparsemax gives the others exact zeros",
    below=1e-9,
    control="width 4",
)
def _() -> tuple[float, float]:
    q, k, v = (torch.randn(2, n, 6, dtype=torch.float64) for n in (5, 7, 7))
    wide, narrow = (drawn(SurveyAttention(6, positions="local-p", width=w)) for w in (1e6, 4.0))
    narrow.load_state_dict(wide.state_dict())
    soft = SurveyAttention(6)(q, k, v)[0]
    one = SurveyAttention(6, "dot", "sparsemax")(10 * k[:, :1], torch.nn.functional.normalize(k, dim=-1) * 10, v)[1]
    assert bool(((one > 0).sum(-1) == 1).all()) and bool(((one == 0) | (one == 1)).all())
    return naive.gap(wide(q, k, v)[0], soft), naive.gap(narrow(q, k, v)[0], soft)


@check(
    "attentive-survey",
    "co-attention in parallel and in turns, memory hops, the decoder that looks back and the pointer: gap to the papers' formulas",
    below=1e-9,
    control="without the other sequence",
)
def _() -> tuple[float, float]:
    x, y = (torch.randn(2, n, 6, dtype=torch.float64) for n in (4, 5))
    m = drawn(CoAttention(6))
    own, found = [], m(x, y)
    for b in range(2):
        c = torch.tanh(y[b] @ m.affinity.weight @ x[b].T)
        h_x, h_y = torch.tanh(x[b] @ m.x.weight.T + c.T @ y[b] @ m.y.weight.T), torch.tanh(y[b] @ m.y.weight.T + c @ x[b] @ m.x.weight.T)
        p_x, p_y = naive.softmax(h_x @ m.w_x.weight[0]), naive.softmax(h_y @ m.w_y.weight[0])
        own += [naive.gap(found[0][b], p_x @ x[b]), naive.gap(found[1][b], p_y @ y[b])]
        alone = naive.softmax(torch.tanh(x[b] @ m.x.weight.T) @ m.w_x.weight[0]) @ x[b]
    other = naive.gap(found[0][1], alone)
    m = drawn(CoAttention(6, alternating=True))
    found = m(x, y)
    for b in range(2):
        s = naive.softmax(torch.tanh(x[b] @ m.x.weight.T) @ m.w_x.weight[0]) @ x[b]
        t = naive.softmax(torch.tanh(y[b] @ m.y.weight.T + m.guide.weight @ s) @ m.w_y.weight[0]) @ y[b]
        r = naive.softmax(torch.tanh(x[b] @ m.x.weight.T + m.guide.weight @ t) @ m.w_x.weight[0]) @ x[b]
        own += [naive.gap(found[0][b], r), naive.gap(found[1][b], t)]
    m = drawn(MemoryHops(6))
    u = x[0, 0]
    for a, c in zip(m.a, m.c, strict=True):
        u = u + naive.softmax(y[0] @ a.weight.T @ u) @ (y[0] @ c.weight.T)
    own.append(naive.gap(m(x[:, 0], y)[0][0], u))
    ids, target = torch.randint(0, 9, (1, 5)), torch.randint(0, 9, (1, 3))
    for pointer in (False, True):
        m = drawn(RNNSearch(9, 6, pointer))
        states, last = m.reader(m.embed(ids))
        h, states, outs = last[0, 0], states[0], []

        def look(h: Tensor, m: Any = m, states: Tensor = states) -> Tensor:
            return torch.stack(
                [m.align.w.weight[0] @ torch.tanh(m.align.q.weight @ h + m.align.k.weight @ s + m.align.k.bias) for s in states]
            )

        for t in target[0]:
            context = naive.softmax(look(h)) @ states
            h = m.writer((m.embed.weight[t] if pointer else torch.cat((m.embed.weight[t], context)))[None], h[None])[0]
            outs.append(look(h) if pointer else m.head(torch.cat((h, context))))
        own.append(naive.gap(m(ids, target)[0][0], torch.stack(outs)))
    return max(own), other


def documents(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(32, 4, 6) ids: one sentence begins with 1, and the label is whether its second word is among the first half of words."""
    ids = torch.randint(2, 18, (32, 4, 6), generator=generator)
    marked = torch.randint(0, 4, (32,), generator=generator)
    ids[torch.arange(32), marked, 0] = 1
    return ids, (ids[torch.arange(32), marked, 1] < 10).long()


class Bag(nn.Module):
    """The mean of all words."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(18, 16), nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 2))

    def forward(self, ids: Tensor) -> tuple[Tensor]:
        return (self.head(self.embed(ids).mean((1, 2))),)


@functools.cache
def accuracy(bag: bool, seed: int) -> float:
    torch.manual_seed(seed)
    model: Any = Bag() if bag else HAN(18, 16, 2)
    fit(model, documents, lambda batch: torch.nn.functional.cross_entropy(model(batch[0])[0], batch[1]), 300, lr=1e-2, seed=seed)
    ids, labels = documents(torch.Generator().manual_seed(9))
    with torch.no_grad():
        return float((model(ids)[0].argmax(-1) == labels).float().mean())


@check(
    "attentive-survey",
    "the label stands behind the mark in one of four sentences, 300 steps: accuracy of hierarchical attention, three seeds' median",
    above=0.9,
    control="the mean of all words",
)
def _() -> tuple[float, float]:
    return tuple(statistics.median(accuracy(bag, seed) for seed in range(3)) for bag in (False, True))  # type: ignore[return-value]
