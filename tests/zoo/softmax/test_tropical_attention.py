"""Max-plus algebra in loops: products, projections, scores, masks, blocks of rows, gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from regard import RegardError
from regard.zoo.softmax.tropical_attention import TropicalAttention, TropicalBlock, TropicalLinear, hilbert_scores, maxplus_matmul


def product(a: Tensor, b: Tensor) -> Tensor:
    rows = [[max(float(a[i, k]) + float(b[k, j]) for k in range(a.shape[1])) for j in range(b.shape[1])] for i in range(a.shape[0])]
    return torch.tensor(rows, dtype=torch.float64)


def scores(q: Tensor, k: Tensor, symmetric: bool = True) -> Tensor:
    rows = []
    for x in q.tolist():
        gaps = [[a - b for a, b in zip(x, y, strict=True)] for y in k.tolist()]
        rows.append([-(max(g) - min(g)) if symmetric else -(sum(g) - len(g) * min(g)) for g in gaps])
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("room", [1 << 22, 40])
def test_products_and_their_gradients(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regard.zoo.softmax.tropical_attention.ROOM", room)
    a, b = torch.randn(2, 7, 5, dtype=torch.float64, requires_grad=True), torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(maxplus_matmul(a, b), torch.stack([product(one, b) for one in a]))
    seed = torch.randn(2, 7, 3, dtype=torch.float64)
    da, db = torch.autograd.grad((maxplus_matmul(a, b) * seed).sum(), (a, b))
    want_a, want_b = torch.zeros_like(a), torch.zeros_like(b)
    for n in range(2):
        for i in range(7):
            for j in range(3):
                best = int((a[n, i] + b[:, j]).argmax())
                want_a[n, i, best] += seed[n, i, j]
                want_b[best, j] += seed[n, i, j]
    torch.testing.assert_close(da, want_a)
    torch.testing.assert_close(db, want_b)


@pytest.mark.parametrize("room", [1 << 22, 40])
@pytest.mark.parametrize("symmetric", [True, False])
def test_scores_and_their_gradients(room: int, symmetric: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regard.zoo.softmax.tropical_attention.ROOM", room)
    q, k = torch.randn(2, 7, 4, dtype=torch.float64, requires_grad=True), torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    given = {} if symmetric else {"symmetric": False}
    torch.testing.assert_close(hilbert_scores(q, k, **given), torch.stack([scores(*pair, symmetric) for pair in zip(q, k, strict=True)]))
    assert torch.autograd.gradcheck(lambda q, k: hilbert_scores(q, k, symmetric), (q, k))


@pytest.mark.parametrize("options", [{}, {"tropical_norm": True}, {"tropical_proj": False, "symmetric": False}, {"causal": True}])
@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_the_layer(options: dict[str, bool], masked: bool) -> None:
    layer, x = TropicalAttention(6, 2, **options).double(), torch.randn(2, 5, 6, dtype=torch.float64)
    if layer.shift is not None:
        assert torch.equal(layer.shift, torch.ones_like(layer.shift)) and layer.shift.shape == (1, 1, 6)
        nn.init.normal_(layer.shift)
    mask = torch.rand(2, 1, 5, 5) > 0.4
    mask |= torch.eye(5, dtype=torch.bool)
    out, found = layer(x, mask) if masked else layer(x)
    for b in range(2):
        u = torch.log(1 + x[b].clamp_min(0)) - (0 if layer.shift is None else layer.shift[0, 0])
        merged = torch.zeros(5, 6, dtype=torch.float64)
        for h in range(2):
            own = slice(3 * h, 3 * h + 3)
            q, k, v = (
                product(u[:, own], w.weight.T) if options.get("tropical_proj", True) else u[:, own] for w in (layer.q, layer.k, layer.v)
            )
            s = scores(q, k, options.get("symmetric", True))
            seen = torch.ones(5, 5, dtype=torch.bool).tril() if options.get("causal") else torch.ones(5, 5, dtype=torch.bool)
            seen = seen & mask[b, 0] if masked else seen
            s = s.masked_fill(~seen, -math.inf)
            torch.testing.assert_close(found[b, h], s)
            merged[:, own] = torch.exp(product(s, v)) - 1
        torch.testing.assert_close(out[b], merged @ layer.out.weight.T)


def test_projections() -> None:
    linear, x = TropicalLinear(5, 3).double(), torch.randn(2, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(linear(x), torch.stack([product(one, linear.weight.T) for one in x]))
    assert linear.weight.shape == (3, 5) and float(TropicalLinear(200, 100).weight.detach().std()) == pytest.approx(1.0, rel=0.05)


def test_defaults_and_the_encoder_s_block() -> None:
    layer = TropicalAttention(6, 2)
    assert layer.shift is None and layer.symmetric and not layer.causal and isinstance(layer.q, TropicalLinear) and layer.out.bias is None
    block, x = TropicalBlock(6, 2, 10, causal=True).double(), torch.randn(2, 5, 6, dtype=torch.float64)

    def norm(y: Tensor) -> Tensor:
        return (y - y.mean(-1, keepdim=True)) / (y.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()

    for mask in (None, torch.rand(2, 1, 5, 5) > 0.3):
        mask = None if mask is None else mask | torch.eye(5, dtype=torch.bool)
        y = x + block.attention(norm(x), mask)[0]
        up, _, down = block.mlp
        hidden = norm(y) @ up.weight.T + up.bias  # type: ignore[operator, union-attr]
        hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
        torch.testing.assert_close(block(x, mask), y + hidden @ down.weight.T + down.bias)  # type: ignore[operator, union-attr]


def test_says_what_is_wrong() -> None:
    with pytest.raises(RegardError, match="multiple of heads"):
        TropicalAttention(7, 2)
    with pytest.raises(RegardError, match=r"\(\.\.\., D, E\)"):
        maxplus_matmul(torch.ones(2, 3), torch.ones(2, 3))
