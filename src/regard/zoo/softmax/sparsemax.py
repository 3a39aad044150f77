"""Sparsemax: the projection of scores onto the simplex, with exact zeros (id 5; Martins & Astudillo, 2016).

p_i = argmin_{p in simplex} |p - s_i|^2 = relu(s_i - tau_i),   tau_i such that the row sums to one

What it is for, `selective_attention`: of many facts, one answers a question.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.algebra import RowLocal, Weighted
from regard.catalog.registry import register
from regard.engine import weights
from regard.nn.attention import Attention
from regard.results import Result
from regard.tasks.training import fit


def above(s: Tensor, c: Tensor) -> Tensor:
    return torch.relu(s - c)


@register("sparsemax")
def sparsemax() -> Weighted:
    """alpha-entmax at alpha = 2."""
    return Weighted(normalizer=RowLocal(above, shift="root", floor=1.0))


class SparsemaxFunction(torch.autograd.Function):
    """Exact by sorting; backward is s * (v - mean of v over the support)."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, z: Tensor) -> Tensor:
        ranked = z.sort(-1, descending=True).values
        sums = ranked.cumsum(-1) - 1
        rank = torch.arange(1, z.shape[-1] + 1, device=z.device, dtype=z.dtype)
        size = (rank * ranked > sums).sum(-1, keepdim=True).clamp_min(1)  # a row of -inf has none
        p = torch.where(z > float("-inf"), (z - sums.gather(-1, size - 1) / size).clamp_min(0), 0.0)
        ctx.save_for_backward(p)
        return p

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> Tensor:
        support = (ctx.saved_tensors[0] > 0).to(grads[0].dtype)  # type: ignore[attr-defined]
        mean = (grads[0] * support).sum(-1, keepdim=True) / support.sum(-1, keepdim=True).clamp_min(1)
        return support * (grads[0] - mean)


def sparsemax_weights(z: Tensor, dim: int = -1) -> Tensor:
    """The map itself along `dim`; entries of -inf get weight 0, and a row of nothing else is zero."""
    return SparsemaxFunction.apply(z.movedim(dim, -1)).movedim(-1, dim)  # type: ignore[no-any-return, no-untyped-call]


def sparsemax_loss(z: Tensor, target: Tensor) -> Tensor:
    """Loss (...,) of logits z (..., C): -q.z + 1/2 sum_{p>0} (z^2 - tau^2) + 1/2 |q|^2, gradient sparsemax(z) - q.

    target: class numbers (...,), or a distribution q (..., C) over labels. Zero iff the margin is at least 1.
    """
    q = torch.nn.functional.one_hot(target, z.shape[-1]).to(z.dtype) if not target.is_floating_point() else target
    p = sparsemax_weights(z)
    on = p > 0
    tau = ((z * on).sum(-1, keepdim=True) - 1) / on.sum(-1, keepdim=True)
    return (-q * z).sum(-1) + 0.5 * torch.where(on, z.square() - tau.square(), 0.0).sum(-1) + 0.5 * q.square().sum(-1)


class Reader(nn.Module):
    """Facts (B, n, 2), a key and a value symbol each, and a question (B,), a key -> logits of the answer (B, symbols): one layer of attention."""

    def __init__(self, mechanism: str, symbols: int, dim: int):
        super().__init__()
        self.key, self.value = nn.Embedding(symbols, dim), nn.Embedding(symbols, dim)
        self.attention, self.head = Attention(2 * dim, 1, mechanism, causal=False), nn.Linear(2 * dim, symbols)

    def sides(self, facts: Tensor, question: Tensor) -> tuple[Tensor, Tensor]:
        """What asks (B, 1, 2 dim) and what is asked (B, n, 2 dim)."""
        asked = self.key(question)
        return torch.cat((asked, torch.zeros_like(asked)), -1)[:, None], torch.cat((self.key(facts[..., 0]), self.value(facts[..., 1])), -1)

    def forward(self, facts: Tensor, question: Tensor) -> Tensor:
        query, context = self.sides(facts, question)
        return self.head(self.attention(query, context)[:, 0])  # type: ignore[no-any-return]

    @torch.no_grad()
    def weights(self, facts: Tensor, question: Tensor) -> Tensor:
        """(B, n)."""
        query, context = self.sides(facts, question)
        q, k, _, _ = self.attention.heads_of(query, context, 0, None)
        found = weights(q, k, self.attention.mechanism)
        assert found is not None
        return found[:, 0, 0]


@dataclass(frozen=True)
class Selected(Result):
    """By mechanism. accuracy: of answers. support: how many facts have a weight above 0. right: the weight of the fact that answers."""

    mechanism: tuple[str, ...]
    accuracy: tuple[float, ...]
    support: tuple[float, ...]
    right: tuple[float, ...]


def selective_attention(
    mechanisms: tuple[str, ...] = ("softmax", "sparsemax"), *, facts: int = 16, symbols: int = 32, dim: int = 16, steps: int = 400, lr: float = 1e-2,
    seed: int = 0,
) -> Selected:  # fmt: skip
    """Train a `Reader` a mechanism to answer from one of `facts` facts with different keys, and look at how many it reads to do so."""

    def draw(generator: torch.Generator, count: int = 64) -> tuple[Tensor, Tensor, Tensor]:
        keys = torch.rand(count, symbols, generator=generator).argsort(-1)[:, :facts]
        values, at = torch.randint(symbols, (count, facts), generator=generator), torch.randint(facts, (count, 1), generator=generator)
        return torch.stack((keys, values), -1), keys.gather(1, at)[:, 0], at

    found: list[tuple[float, float, float]] = []
    for mechanism in mechanisms:
        torch.manual_seed(seed)
        model = Reader(mechanism, symbols, dim)

        def loss(batch: tuple[Tensor, Tensor, Tensor], model: Reader = model) -> Tensor:
            told, question, at = batch
            return F.cross_entropy(model(told, question), told[..., 1].gather(1, at)[:, 0])

        fit(model, draw, loss, steps, lr=lr, seed=seed)
        with torch.no_grad():
            told, question, at = draw(torch.Generator().manual_seed(seed + 1), 512)
            right = (model(told, question).argmax(-1) == told[..., 1].gather(1, at)[:, 0]).double().mean()
            w = model.weights(told, question)
            found.append((float(right), float((w > 0).double().sum(-1).mean()), float(w.gather(1, at).mean())))
    accuracy, support, mass = zip(*found, strict=True)
    return Selected(tuple(mechanisms), accuracy, support, mass)
