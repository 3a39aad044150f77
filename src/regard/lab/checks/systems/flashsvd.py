"""Checks of flashsvd."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.adapt.lowrank import factorised
from regard.algebra import Rope
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64, gap_with_gradients
from regard.lab.memory import largest_tensor, peak_bytes
from regard.lab.verification import check
from regard.zoo.systems.flashsvd import FlashSVDSelfAttention, flashsvd_attention, flashsvd_ffn


def factors(length: int, shared: bool = False, bias: bool = True, width: int = 6) -> Any:
    p, v = torch.randn(2, 1 if shared else 3, length, 4, dtype=F64), torch.randn(3, 4, width, dtype=F64)
    return p.requires_grad_(), v.requires_grad_(), torch.randn(3, width, dtype=F64).requires_grad_() if bias else None


def whole(one: Any, bias: bool = True) -> Tensor:
    out = one[0] @ one[1]
    return out if one[2] is None or not bias else out + one[2][:, None]


@check(
    "flashsvd",
    "ragged lengths, padding, causal with more keys than queries, rotary, shared factors, and the absorbed form: gap of values and gradients",
    below=1e-10,
    control="biases left out",
)
def _() -> tuple[float, float]:
    own, other = 0.0, []
    cases: list[tuple[int, int, dict[str, Any], bool]] = [
        (37, 37, {"causal": True}, False),
        (5, 41, {"causal": True, "scale": 0.3}, True),
        (33, 20, {"mask": torch.rand(2, 20) < 0.6}, False),
        (37, 37, {"causal": True, "mask": torch.arange(37) >= torch.tensor([[0], [9]])}, False),
    ]
    for n, m, options, shared in cases:
        q, k, v = factors(n, shared), factors(m, shared, n != 5), factors(m, shared, width=5)
        leaves = tuple(x for one in (q, k, v) for x in one if x is not None)

        def visible(b: int, i: int, j: int, n: int = n, m: int = m, options: Any = options) -> bool:
            there = "mask" not in options or bool(options["mask"][b, j])
            return there and (not options.get("causal") or j <= i)

        def by_hand(bias: bool, turn: Any = None, q: Any = q, k: Any = k, v: Any = v, see: Any = visible, options: Any = options) -> Tensor:
            big = [whole(one, bias) for one in (q, k, v)]
            if turn is not None:
                big[0], big[1] = turn.rotate(big[0], torch.arange(37)), turn.rotate(big[1], torch.arange(37))
            rows = []
            for b in range(2):
                one = [x[b : b + 1] for x in big]
                rows.append(naive.attention(*one, naive.softmax, lambda i, j, b=b: see(b, i, j), options.get("scale")))
            return torch.cat(rows)

        for extra in ({}, {"absorb": True}, {"block_q": 8, "block_k": 11}):
            own = max(own, gap_with_gradients(flashsvd_attention(q, k, v, **options, **extra), by_hand(True), leaves))
        other.append(naive.gap(flashsvd_attention(q, k, v, **options), by_hand(False)))
        if n == m == 37:
            rope = Rope()
            own = max(own, naive.gap(flashsvd_attention(q, k, v, rotate=rope.rotate, **options), by_hand(True, rope)))
    return own, min(other)


@check(
    "flashsvd",
    "feed-forward with GELU and with SiLU, widths that no block divides: gap of values and gradients",
    below=1e-10,
    control="the other activation",
)
def _() -> tuple[float, float]:
    shapes = ((2, 7, 5), (5, 300), (300,), (300, 4), (4, 9), (9,))
    given = [torch.randn(shape, dtype=F64, requires_grad=True) for shape in shapes]
    p, v1, b1, u2, v2, b2 = given
    truths = [act(p @ v1 + b1) @ u2 @ v2 + b2 for act in (F.gelu, F.silu)]
    own = gap_with_gradients(flashsvd_ffn(*given), truths[0], tuple(given))
    own = max(own, gap_with_gradients(flashsvd_ffn(*given, activation=F.silu, block=17), truths[1], tuple(given)))
    own = max(own, naive.gap(flashsvd_ffn(p, v1, None, u2, v2, None), F.gelu(p @ v1) @ u2 @ v2))
    return own, naive.gap(flashsvd_ffn(*given), truths[1])


@check(
    "flashsvd",
    "L = 512, d = 64, r = 16, width 2048: peak bytes over those of multiplying the factors back first",
    below=0.4,
    control="the same, of multiplying back in another order",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    p, v = torch.randn(1, 4, 512, 16), torch.randn(4, 16, 64)
    x, v1, u2, v2 = torch.randn(1, 512, 32), torch.randn(32, 2048), torch.randn(2048, 32), torch.randn(32, 64)

    def tiles() -> None:
        flashsvd_attention((p, v, None), (p, v, None), (p, v, None))

    def ffn() -> None:
        flashsvd_ffn(x, v1, None, u2, v2, None)

    def back() -> None:
        q, k, values = p @ v, p @ v, p @ v
        F.softmax(q @ k.transpose(-1, -2) / 8, -1) @ values

    def other() -> None:
        values, k = p @ v, p @ v
        F.softmax((p @ v) @ k.transpose(-1, -2) / 8, -1) @ values

    assert largest_tensor(tiles) <= 4 * 512 * 64 and largest_tensor(ffn) < 512 * 2048  # the output, and less than the width
    attention = peak_bytes(tiles) / peak_bytes(back)
    width = peak_bytes(ffn) / peak_bytes(lambda: F.gelu(x @ v1) @ (u2 @ v2))
    return max(attention, width), peak_bytes(other) / peak_bytes(back)


@check("flashsvd", "a layer at full rank is the plain layer: gap", below=1e-9, control="one rank fewer")
def _() -> tuple[float, float]:
    linears = [nn.Linear(16, 16).double() for _ in range(4)]
    x, mask = torch.randn(2, 9, 16, dtype=F64), torch.arange(9) < torch.tensor([[9], [5]])
    q, k, v = (one(x).view(2, 9, 4, 4).transpose(1, 2) for one in linears[:3])
    s = (q @ k.transpose(-1, -2) / 2).masked_fill(~mask[:, None, None], -torch.inf)
    truth = linears[3]((s.softmax(-1) @ v).transpose(1, 2).flatten(2))
    found = [FlashSVDSelfAttention(*linears, heads=4, rank=rank)(x, mask) for rank in (4, 3)]
    return naive.gap(found[0], truth), naive.gap(found[1], truth)


@check(
    "flashsvd",
    "plain, weighed and whitened factors have the least error in their own norm: that over the best of 200 nearby factors",
    below=1.0,
    control="the plain factors, in the whitened norm",
)
def _() -> tuple[float, float]:
    w, x, weigh = (
        torch.randn(12, 8, dtype=F64),
        torch.randn(100, 12, dtype=F64) * torch.logspace(0, 1.5, 12),
        torch.rand(12, dtype=F64) * 10,
    )
    norms = {
        "plain": ({}, lambda e: e.square().sum()),
        "fisher": ({"fisher": weigh}, lambda e: (weigh[:, None] * e.square()).sum()),
        "gram": ({"gram": x.T @ x}, lambda e: (x @ e).square().sum()),
    }
    worst = 0.0
    for options, norm in norms.values():
        left, right = factorised(w, 3, **options)
        own = float(norm(w - left @ right))
        near = [float(norm(w - (left + 0.01 * torch.randn_like(left)) @ (right + 0.01 * torch.randn_like(right)))) for _ in range(200)]
        worst = max(worst, own / min(near))
    plain, best = (factorised(w, 3, **options) for options in ({}, {"gram": x.T @ x}))
    errors = [float((x @ (w - left @ right)).square().sum()) for left, right in (plain, best)]
    return worst, errors[0] / errors[1]
