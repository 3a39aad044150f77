"""Checks of weights found by projection or iteration: sparsemax, entmax, Sinkhorn."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor
from torch.autograd import gradcheck

from ...algebra import Causal, Mechanism, Padding
from ...catalog import get
from ...engine import attend, weights
from ...mechanisms.weighted.entmax import entmax_weights
from ...mechanisms.weighted.sparsemax import sparsemax_loss, sparsemax_weights
from .. import naive, statistics
from ..experiments.flow import attention_flow
from ..verification import check
from .weighted import identity_values, qkv, weights_of

F64 = torch.float64


@check(
    "sparsemax", "weights are the projection onto the simplex, ties and causal masks included", below=1e-12, control="softmax cut at 1/n"
)
def _() -> tuple[float, float]:
    s = 2 * torch.randn(60, 60, dtype=F64)
    s[::7, 3] = s[::7, 5]
    truth = torch.zeros_like(s)
    for i in range(60):
        truth[i, : i + 1] = naive.projection(s[i, : i + 1])
    p = s.masked_fill(~torch.ones(60, 60, dtype=torch.bool).tril(), -math.inf).softmax(-1)
    cut = torch.where(p > 1 / 60, p, 0.0)
    return naive.gap(weights_of(s, "sparsemax", Causal()), truth), naive.gap(cut / cut.sum(-1, keepdim=True), truth)


@check("sparsemax", "at least 70% of weights are exactly zero at logit std 2, n = 64", above=0.7, control="softmax")
def _() -> tuple[float, float]:
    s = 2 * torch.randn(200, 64, dtype=F64)
    return float((weights_of(s, "sparsemax") == 0).double().mean()), float((weights_of(s, "softmax") == 0).double().mean())


@check("sparsemax", "the loss's gradient is sparsemax(z) - onehot", below=1e-12, control="cross-entropy's gradient")
def _() -> tuple[float, float]:
    z = (2 * torch.randn(20, 9, dtype=F64)).requires_grad_()
    target = torch.randint(9, (20,))
    truth = torch.stack([naive.projection(row) for row in z.detach()]) - torch.nn.functional.one_hot(target, 9)
    (own,) = torch.autograd.grad(sparsemax_loss(z, target).sum(), z)
    (other,) = torch.autograd.grad(torch.nn.functional.cross_entropy(z, target, reduction="sum"), z)
    return naive.gap(own, truth), naive.gap(other, truth)


@check("sparsemax", "the loss is 0 at margin 1", below=1e-15, control="margin 0.99")
def _() -> tuple[float, float]:
    def loss(margin: float) -> float:
        return float(sparsemax_loss(torch.tensor([margin, 0.0, -1.0], dtype=F64), torch.tensor(0)))

    return loss(1.0), loss(0.99)


@check("entmax", "alpha = 1.5, 2 and 1.37 equal bisection from the definition", below=1e-10, control="alpha = 1.5 for all")
def _() -> tuple[float, float]:
    s = 2 * torch.randn(20, 64, dtype=F64)
    own, other = 0.0, 0.0
    for alpha in (1.5, 2.0, 1.37):
        truth = torch.stack([naive.entmax(row, alpha) for row in s])
        own = max(own, naive.gap(weights_of(s, get("entmax"), alpha=torch.tensor([alpha], dtype=F64)), truth))
        own = max(own, naive.gap(entmax_weights(s, alpha), truth), naive.gap(weights_of(s, get("entmax", alpha=alpha)), truth))
        other = max(other, naive.gap(entmax_weights(s, 1.5), truth))
    return own, other


@check(
    "entmax",
    "d/dalpha equals central differences at alpha = 1.37, in attention and in the function",
    below=1e-6,
    control="no gradient to alpha",
)
def _() -> tuple[float, float]:
    q, k, v = qkv(19)
    seed = torch.randn(1, 2, 19, 8, dtype=F64)
    alpha = torch.full((2,), 1.37, dtype=F64, requires_grad=True)

    def f(alpha: Tensor) -> Tensor:
        return (attend(q, k, v, "entmax", alpha=alpha, mask=Causal()) * seed).sum()

    (own,) = torch.autograd.grad(f(alpha), alpha)
    eye = 1e-6 * torch.eye(2, dtype=F64)
    numeric = torch.stack([(f(alpha.detach() + e) - f(alpha.detach() - e)) / 2e-6 for e in eye])
    z = torch.randn(30, dtype=F64)
    a = torch.tensor(1.37, dtype=F64, requires_grad=True)
    (mine,) = torch.autograd.grad(entmax_weights(z, a) @ z, a)
    central = (entmax_weights(z, 1.37 + 1e-6) @ z - entmax_weights(z, 1.37 - 1e-6) @ z) / 2e-6
    return max(naive.gap(own, numeric), abs(float(mine - central))), float(numeric.abs().max())


@check("entmax", "alpha = 1.001 is within 1e-2 of softmax", below=1e-2, control="alpha = 2")
def _() -> tuple[float, float]:
    s = 2 * torch.randn(20, 32, dtype=F64)
    truth = s.softmax(-1)
    return naive.gap(entmax_weights(s, 1.001), truth), naive.gap(entmax_weights(s, 2.0), truth)


@check("entmax", "rows sum to one and hold exact zeros (share of zeros, std-2 logits, n = 64)", above=0.3, control="softmax")
def _() -> tuple[float, float]:
    s = 2 * torch.randn(100, 64, dtype=F64)
    p = weights_of(s, "entmax")
    zeros = float((p == 0).double().mean()) if naive.gap(p.sum(-1), torch.ones(100, dtype=F64)) < 1e-10 else 0.0
    return zeros, float((weights_of(s, "softmax") == 0).double().mean())


@check("sinkformer", "1 iteration is softmax", below=1e-12, control="3 iterations")
def _() -> tuple[float, float]:
    q, k, v = qkv(24)
    truth = naive.attention(q, k, v, naive.softmax)
    return naive.gap(attend(q, k, v, get("sinkformer", iterations=1)), truth), naive.gap(attend(q, k, v, get("sinkformer")), truth)


def dense_weights(q: Tensor, k: Tensor, mechanism: str | Mechanism, **inputs: Tensor) -> Tensor:
    n = k.shape[2]
    return attend(q, k, identity_values(n, q.shape[1]), mechanism, **inputs)


@check("sinkformer", "after 101 iterations rows and columns sum to 1", below=1e-6, control="softmax's columns")
def _() -> tuple[float, float]:
    q, k, _ = qkv(24)

    def off(p: Tensor) -> float:
        return max(float((p.sum(-1) - 1).abs().max()), float((p.sum(-2) - 1).abs().max()))

    return off(dense_weights(q, k, get("sinkformer", iterations=101))), off(dense_weights(q, k, "softmax"))


@check("sinkformer", "a symmetric score matrix gives symmetric converged weights", below=1e-6, control="softmax")
def _() -> tuple[float, float]:
    q, _, _ = qkv(24)

    def skew(p: Tensor) -> float:
        return naive.gap(p, p.transpose(-1, -2))

    return skew(dense_weights(q, q, get("sinkformer", iterations=101))), skew(dense_weights(q, q, "softmax"))


@check("sinkformer", "padded keys get zero weight and rows still sum to 1", below=1e-10, control="padding not masked")
def _() -> tuple[float, float]:
    q, k, _ = qkv(24)
    keep = torch.ones(1, 24, dtype=torch.bool)
    keep[:, 20:] = False
    padded = attend(q, k, identity_values(24, 2), get("sinkformer", iterations=5), mask=Padding(), keep=keep)
    plain = dense_weights(q, k, get("sinkformer", iterations=5))
    return float(padded[..., 20:].abs().max() + (padded.sum(-1) - 1).abs().max()), float(plain[..., 20:].abs().max())


@check(
    "entmax",
    "statistics of a trained-like head: alpha 1.5 leaves under half of its pairs, and is more confident than softmax",
    below=0.5,
    control="softmax's density",
)
def _() -> tuple[float, float]:
    q, k, _ = qkv(64, std=2.0)
    maps = [weights(q, k, m, mask=Causal()) for m in (get("entmax", alpha=1.5), get("softmax"))]
    assert maps[0] is not None and maps[1] is not None
    surer = bool((statistics.confidence(maps[0]) > statistics.confidence(maps[1])).all())
    return statistics.density(maps[0]) if surer else math.inf, statistics.density(maps[1])


@check(
    "sinkformer",
    "tied symmetric weights: the flow of particles is a gradient (asymmetry of its Jacobian), and its energy falls at every step",
    below=1e-6,
    control="softmax: one iteration",
)
def _() -> tuple[float, float]:
    x, root = torch.randn(9, 3, dtype=F64), torch.randn(3, 3, dtype=F64)
    own, other = (attention_flow(x, root @ root.T / 6, iterations=n, step_size=0.05) for n in (501, 1))
    falling = all(b < a for a, b in itertools.pairwise(own.energy))
    return own.asymmetry if falling else math.inf, other.asymmetry


@check("sinkformer", "gradcheck of 5 unrolled iterations passes (1)", above=1.0, control="the column potential detached")
def _() -> tuple[float, float]:
    q, k, v = (x.requires_grad_() for x in qkv(7, 3))

    def passes(detach: bool) -> float:
        mechanism = get("sinkformer", iterations=5, detach_columns=detach)
        return float(gradcheck(lambda q, k, v: attend(q, k, v, mechanism), (q, k, v), raise_exception=False))

    return passes(False), passes(True)


@check("sparsemax", "the function's backward passes gradcheck (1)", above=1.0, control="a straight-through gradient")
def _() -> tuple[float, float]:
    z = torch.randn(5, 9, dtype=F64, requires_grad=True)
    through = gradcheck(lambda z: z + (sparsemax_weights(z) - z).detach(), (z,), raise_exception=False)
    return float(gradcheck(sparsemax_weights, (z,), raise_exception=False)), float(through)
