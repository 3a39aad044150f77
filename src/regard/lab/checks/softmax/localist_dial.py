"""Checks of localist-dial."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from regard.engine import weights
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.weighted import qkv
from regard.lab.verification import check
from regard.zoo.softmax import localist_dial as localist


def blocks_with_margin(delta: float) -> tuple[Tensor, Tensor]:
    """Weights and inside (12, 60) of random logits whose inside exceeds outside by at least delta."""
    inside = torch.zeros(12, 60, dtype=torch.bool)
    inside[:, :10] = True
    s = torch.randn(12, 60, dtype=F64)
    low_in, high_out = s[:, :10].amin(1, keepdim=True), s[:, 10:].amax(1, keepdim=True)
    s[:, :10] += (high_out - low_in + delta).clamp_min(0)
    return s.softmax(-1), inside


@check(
    "localist-dial",
    "margins 1, 3, 6: leak and entropy over their bounds, largest over rows",
    below=1.0,
    control="logits whose margin is one less",
)
def _() -> tuple[float, float]:
    def worst(less: float) -> float:
        found = []
        for delta in (1.0, 3.0, 6.0):
            w, inside = blocks_with_margin(delta)
            if less:  # all inside equal and all outside equal, at a smaller margin than is claimed
                w = torch.where(inside, delta - less, 0.0).double().softmax(-1)
            leaked = localist.leak(w, inside)
            entropy = -torch.special.xlogy(w, w).sum(-1)
            found += [(leaked / localist.leak_bound(inside, delta)).max(), (entropy / localist.entropy_bound(inside, leaked)).max()]
        return float(torch.stack(found).max()) - 1e-12

    return worst(0.0), worst(1.0)


@check("localist-dial", "dial 0 == plain attention, leak falls as it turns, and is < 1e-6 at 1 - 1e-12", below=1e-6, control="dial 0.9")
def _() -> tuple[float, float]:
    q, k, v = qkv(24)
    block = (torch.arange(24) // 6).double()[None]
    inside = block[0, :, None] == block[0, None]

    def leaked(dial: float) -> float:
        w = weights(q, k, "localist-dial", query_block=block, key_block=block, dial=torch.full((1, 1, 1), dial, dtype=F64))
        assert w is not None
        return float(localist.leak(w, inside).max())

    turns = [leaked(x) for x in (0.0, 0.3, 0.6, 0.9)]
    falling = all(b < a for a, b in itertools.pairwise(turns))
    free = naive.gap(attend(q, k, v, "localist-dial", query_block=block, key_block=block), attend(q, k, v))
    return max(leaked(1 - 1e-12), free) if falling and leaked(1.0) == 0 else math.inf, leaked(0.9)


@check(
    "localist-dial",
    "group lasso, one relevant block of four: relative gap of the observed critical lambda to |grad at 0| / w_b",
    below=0.05,
    control="the gradient without its weight",
)
def _() -> tuple[float, float]:
    torch.manual_seed(1)
    x, truth = torch.randn(200, 16, dtype=F64), torch.zeros(16, dtype=F64)
    truth[:4] = torch.tensor([1.0, -0.5, 0.8, 0.3], dtype=F64)
    y = x @ truth + 0.1 * torch.randn(200, dtype=F64)

    def loss(groups: list[Tensor]) -> Tensor:
        return ((x @ torch.cat(groups) - y) ** 2).mean() / 2

    def zeroed(strength: float) -> list[bool]:
        groups = [torch.full((4,), 0.1, dtype=F64, requires_grad=True) for _ in range(4)]
        for _ in range(400):
            grads = torch.autograd.grad(loss(groups), groups)
            with torch.no_grad():
                for w, g in zip(groups, grads, strict=True):
                    w -= 0.2 * g
            localist.proximal_step([w.data for w in groups], 0.2, strength)
        return [float(w.detach().norm()) == 0 for w in groups]

    empty = [torch.zeros(4, dtype=F64, requires_grad=True) for _ in range(4)]
    gradient = torch.autograd.grad(loss(empty), empty)[0]
    predicted = localist.critical_strength(gradient)
    low, high = 0.0, 4 * predicted
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (low, middle) if zeroed(middle)[0] else (middle, high)
    sparse = zeroed(predicted / 2) == [False, True, True, True]
    return abs(high / predicted - 1) if sparse else math.inf, abs(high / float(gradient.norm()) - 1)
