"""Checks of bipft."""

from __future__ import annotations

import math
import statistics
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.lab import naive
from regard.lab.checks.shared.comparing import F64, gap_with_gradients
from regard.lab.checks.shared.layers import drawn, joined, split
from regard.lab.verification import check
from regard.nn.binary import Binarizer, BinaryLinear, binary_weight, packed, xnor_product
from regard.zoo.systems.bipft import BinaryBert, BinaryBlock, BinarySelfAttention, cost, masked, mlm_loss, residual_terms


def through(value: Tensor, slope: Tensor) -> Tensor:
    """value, with the gradients of slope."""
    return slope + (value - slope).detach()


def signed(x: Tensor, scale: Tensor) -> Tensor:
    """a sign(x) with the gradients of the text: x's where |x| <= a, and a's sum(sign(x) grad) / sqrt(entries)."""
    sign = torch.where(x > 0, 1.0, -1.0).to(x.dtype)
    inside = (x.abs() <= scale.abs()).to(x.dtype)
    return through(sign * scale, inside.detach() * x + sign.detach() * scale / math.sqrt(x.numel()))


def unsigned(x: Tensor, scale: Tensor) -> Tensor:
    y = (x / scale).detach()
    level = (y > 0.5).to(x.dtype)
    inside = ((y >= 0) & (y <= 1)).to(x.dtype)
    slope = torch.where(inside.bool(), level - y, (y > 1).to(x.dtype))
    return through(level * scale, inside * x + slope * scale / math.sqrt(x.numel()))


def linear(layer: BinaryLinear, x: Tensor) -> Tensor:
    w = layer.weight
    value = w.detach().abs().mean() * torch.where(w.detach() > w.detach().mean(), 1.0, -1.0).to(x.dtype)
    return signed(x + layer.shift, layer.binarize.scale) @ through(value, w).T + layer.bias


def attention(layer: Any, x: Tensor, terms: tuple[bool, ...] = (True, True, True, True)) -> Tensor:
    """The context, term by term; terms: which of m_q p_k, p_q m_k, p_q p_k and p_v are there."""
    q, k, v = (
        signed(split(linear(one, x), layer.heads), b.scale)
        for one, b in ((layer.query, layer.binary_q), (layer.key, layer.binary_k), (layer.value, layer.binary_v))
    )
    s = torch.zeros(*q.shape[:3], k.shape[2], dtype=x.dtype)
    p_q, p_k, m_q, m_k, p_v = (x @ one.weight.T + one.bias for one in (layer.p_q, layer.p_k, layer.m_q, layer.m_k, layer.p_v))
    for i in range(x.shape[1]):
        for j in range(x.shape[1]):
            s[:, :, i, j] = (q[:, :, i] * k[:, :, j]).sum(-1)
            for there, a, b in zip(terms, (m_q, p_q, p_q), (p_k, m_k, p_k), strict=False):
                s[:, :, i, j] = s[:, :, i, j] + there * (a[:, i] * b[:, j]).sum(-1, keepdim=True)
    p = unsigned((s / q.shape[-1] ** 0.5).softmax(-1), layer.binary_p.scale)
    return joined(p @ v + (p @ p_v[:, None] if terms[3] else 0.0))


def ready(layer: Any, x: Tensor) -> Any:
    """A layer whose scales are those of a first call."""
    layer = drawn(layer)
    for part in layer.modules():
        if isinstance(part, Binarizer):
            part.scale.data.fill_(1.0)
    layer(x)
    return layer


@check(
    "bipft",
    "attention (ranks 1 and 3) and a whole block equal their text term by term, and so do all gradients straight through",
    below=1e-9,
    control="each one of the four estimated terms left out",
)
def _() -> tuple[float, float]:
    x, own, other = torch.randn(2, 5, 8, dtype=F64, requires_grad=True), 0.0, math.inf
    for rank in (1, 3):
        layer = ready(BinarySelfAttention(8, 2, rank), x)
        found = layer(x)
        own = max(own, gap_with_gradients(found, attention(layer, x), (x, *layer.parameters())))
        for gone in range(4):
            off = attention(layer, x, tuple(at != gone for at in range(4)))
            other = min(other, naive.gap(off, found) + float((off - found).detach().norm()) * (gone < 3))
    block = ready(BinaryBlock(8, 2, 12), x)

    def norm(z: Tensor, layer: Any) -> Tensor:
        z = z - z.mean(-1, keepdim=True)
        return z / (z.square().mean(-1, keepdim=True) + 1e-12).sqrt() * layer.weight + layer.bias

    h = norm(x + linear(block.out, attention(block.attention, x)), block.norm1)
    up = linear(block.up, h)
    truth = norm(h + linear(block.down, up * (1 + torch.erf(up / 2**0.5)) / 2), block.norm2)
    return max(own, gap_with_gradients(block(x), truth, (x, *block.parameters()))), other


@check(
    "bipft",
    "estimators of rank d given the residuals by hand: scores equal q k^T / sqrt(d)",
    below=1e-10,
    control="without the product of the residuals",
)
def _() -> tuple[float, float]:
    q, k = torch.randn(2, 7, 6, dtype=F64), torch.randn(2, 7, 6, dtype=F64)
    bq, bk = (x.sign() * 0.8 for x in (q, k))
    truth = q @ k.mT / 6**0.5
    found = (bq @ bk.mT + residual_terms(q - bq, k - bk, bq, bk)) / 6**0.5
    return naive.gap(found, truth), naive.gap(found - (q - bq) @ (k - bk).mT / 6**0.5, truth)


@check("bipft", "rank of the added scores beyond 2 r, for r = 1, 2", below=0.0, control="beyond r")
@torch.no_grad()
def _() -> tuple[float, float]:
    found = []
    for rank in (1, 2):
        added = drawn(BinarySelfAttention(16, 2, rank)).estimates(torch.randn(1, 20, 16, dtype=F64))[0, 0]
        found.append(int(torch.linalg.matrix_rank(added)) - 2 * rank)
    return float(max(0, *found)), float(max(n + r for n, r in zip(found, (1, 2), strict=True)))


@check(
    "bipft",
    "q_b k_b^T of 150 channels by XNOR and population counts on packed bits, times the scales: gap to the product",
    below=0.0,
    control="AND in place of XNOR",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    q, k = torch.randn(2, 9, 150, dtype=F64), torch.randn(2, 11, 150, dtype=F64)
    truth = q.sign() @ k.sign().mT
    bits = [packed(x) for x in (q, k)]
    own = naive.gap(xnor_product(*bits, 150).double(), truth)
    both = torch.stack([((bits[0][:, :, None] & bits[1][:, None]) >> at & 1).sum(-1) for at in range(63)]).sum(0)
    return own, naive.gap(both.double(), truth)


@check(
    "bipft",
    "most distinct values of any tensor in a product of a block: weights, inputs, q, k, v and probabilities",
    below=2.0,
    control="the inputs themselves",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    x = torch.randn(2, 9, 8, dtype=F64)
    block, seen = ready(BinaryBlock(8, 2, 12), x), []
    handles = [part.register_forward_hook(lambda m, a, y: seen.append(y)) for part in block.modules() if isinstance(part, Binarizer)]
    block(x)
    for handle in handles:
        handle.remove()
    seen += [binary_weight(part.weight) for part in block.modules() if isinstance(part, BinaryLinear)]
    assert len(seen) == 6 + 4 + 6
    return float(max(len(y.double().round(decimals=9).unique()) for y in seen)), float(len(x.unique()))


@check(
    "bipft",
    "first scales (2 mean |x| signed, 4 mean |p|), kept from then on; cost of a block by hand: largest gap",
    below=1e-9,
    control="scales of the second batch",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    x, y = torch.randn(50, dtype=F64), 3 * torch.randn(50, dtype=F64)
    own, other = 0.0, math.inf
    for sign, factor in ((True, 2), (False, 4)):
        one = Binarizer(sign).double()
        one(x)
        one(y)
        own = max(own, abs(float(one.scale - factor * x.abs().mean())))
        other = min(other, abs(float(one.scale - factor * y.abs().mean())))
    block, found = BinaryBlock(8, 2, 12, rank=2), cost(8, 2, 5, 12, 2)
    weights = sum(part.weight.numel() for part in block.modules() if isinstance(part, BinaryLinear))
    rest = sum(p.numel() for p in block.parameters()) - weights
    products = 2 * 5 * weights + 2 * 2 * 5 * 5 * 8
    extra = 2 * 5 * 8 * (4 * 2 + 1) + 3 * 2 * 5 * 5 * 2 + 2 * 2 * 5 * 5
    wrong = (
        abs(found["bits"] - weights - 32 * rest)
        + abs(found["operations"] - products / 64 - extra)
        + abs(found["full_operations"] - products)
    )
    return own + wrong, other


def left(rank: int, seed: int, shared: bool, steps: int = 200) -> float:
    """Error of imitating a random softmax layer. shared: a part of its queries, keys and values is one number a token, the same in all channels."""
    torch.manual_seed(seed)
    noise, common = ((0.3, 0.3, 0.1), (0.04, 0.04, 0.18)) if shared else ((2.0, 2.0, 1.0), (0.0, 0.0, 0.0))
    w = [c * torch.randn(32, 1) + n * 32**-0.5 * torch.randn(32, 32) for n, c in zip(noise, common, strict=True)]

    def teacher(x: Tensor) -> Tensor:
        q, k, v = (split(x @ m, 2) for m in w)
        return joined((q @ k.mT / 4).softmax(-1) @ v)

    generator = torch.Generator().manual_seed(seed)
    layer = BinarySelfAttention(32, 2, rank)
    optimizer = torch.optim.Adam(layer.parameters(), 5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        x = torch.randn(16, 16, 32, generator=generator)
        loss = F.mse_loss(layer(x), teacher(x))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        x = torch.randn(64, 16, 32, generator=generator)
        return float(F.mse_loss(layer(x), teacher(x)))


def language(drawn_apart: bool, steps: int = 150) -> float:
    """Masked-token loss of a small binary BERT on texts that repeat two tokens by turns; drawn_apart: every token for itself."""
    torch.manual_seed(0)
    model, generator = BinaryBert(24, 64, 2, 2, 16, hidden=64), torch.Generator().manual_seed(0)

    def batch(count: int) -> tuple[Tensor, Tensor]:
        pair = torch.randint(1, 20, (count, 16 if drawn_apart else 2), generator=generator)
        return masked(pair if drawn_apart else pair.repeat(1, 8), 23, 20, generator)

    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    for _ in range(steps):
        loss = mlm_loss(model, *batch(32))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return float(mlm_loss(model.eval(), *batch(256)))


@check(
    "bipft",
    "a small binary BERT, 150 steps of masked tokens: loss on fresh texts of two tokens by turns",
    below=1.5,
    control="texts of tokens drawn apart",
)
def _() -> tuple[float, float]:
    return language(False), language(True)


@check(
    "bipft",
    "imitating a softmax layer that shares one number a token among channels (200 steps): error with estimators over that without, three seeds",
    below=0.85,
    control="a random layer, which shares none",
)
def _() -> tuple[float, float]:
    errors = {(rank, shared): statistics.mean(left(rank, seed, shared) for seed in range(3)) for rank in (0, 1) for shared in (True, False)}
    return errors[1, True] / errors[0, True], errors[1, False] / errors[0, False]
