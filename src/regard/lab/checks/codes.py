"""Checks of attention over quantised keys: Transformer-VQ and LongVQ."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ...algebra import Causal
from ...engine import attend
from ...mechanisms.reduced.codes import code_attention, code_step
from ...nn import Decoder, LongVQBlock, VQAttention
from ...nn.codes import normed, sinusoids
from ...tasks import python_text
from .. import naive
from ..verification import check
from .comparing import gradients
from .mega import ema_loop
from .weighted import qkv

F64 = torch.float64


def nearest(k: Tensor, codebook: Tensor) -> Tensor:
    """Each key's nearest code, by loops over heads."""
    return torch.stack([codebook[h][torch.cdist(k[:, h], codebook[h]).argmin(-1)] for h in range(k.shape[1])], 1)


def dense(q: Tensor, hat: Tensor, v: Tensor, bias: Tensor | None, causal: bool = True) -> Tensor:
    """Softmax attention over quantised keys, the matrix written out; bias (H, R) or (B, H, N, R) of near distances."""
    n = q.shape[2]
    gap = torch.arange(n)[:, None] - torch.arange(n)
    s = q @ hat.mT
    if bias is not None:
        b = bias.expand(*s.shape[:-1], -1) if bias.dim() == 4 else bias[None, :, None].expand(*s.shape[:-1], -1)
        s = s + torch.where((gap >= 0) & (gap < b.shape[-1]), b.gather(-1, gap.clamp(0, b.shape[-1] - 1).expand_as(s)), 0.0)
    s = s.masked_fill(gap < 0, -math.inf) if causal else s
    return s.softmax(-1) @ v


@check(
    "transformer-vq",
    "T = 96 and 90, blocks of 16, 7 codes: blocks == dense softmax over quantised keys with a local bias",
    below=1e-10,
    control="codes not weighed by their counts",
)
def _() -> tuple[float, float]:
    own, other = [], math.inf
    for n in (96, 90):
        q, k, v = qkv(n)
        codebook, bias = torch.randn(2, 7, 8, dtype=F64), torch.randn(1, 2, 1, 17, dtype=F64)
        out, which = code_attention(q, k, v, codebook, 16, bias)
        hat = nearest(k, codebook)
        own.append(naive.gap(out, dense(q, hat, v, bias[0, :, 0])))
        kind = F.one_hot(which, 7).to(F64)
        means = kind.mT @ v / kind.sum(-2).clamp_min(1)[..., None]
        flat = (q @ codebook.mT).softmax(-1) @ means
        whole, _ = code_attention(q, k, v, codebook, causal=False)
        own.append(naive.gap(whole, dense(q, hat, v, None, causal=False)))
        other = min(other, naive.gap(flat, whole))
    return max(own), other


@check("transformer-vq", "as many codes as keys: full attention on the keys themselves", below=1e-10, control="half as many")
def _() -> tuple[float, float]:
    q, k, v = qkv(64)
    truth = attend(q, k, v, mask=Causal(), scale=1.0)
    found = [naive.gap(code_attention(q, k, v, k[0, :, :s], 16)[0], truth) for s in (64, 32)]
    return found[0], found[1]


@check("transformer-vq", "token by token == blocks, past several blocks", below=1e-10, control="the last block's codes read twice")
def _() -> tuple[float, float]:
    q, k, v = qkv(75)
    codebook, bias = torch.randn(2, 7, 8, dtype=F64), torch.randn(1, 2, 75, 9, dtype=F64)
    whole, state, outs = code_attention(q, k, v, codebook, 8, bias)[0], None, []
    for t in range(75):
        at = slice(t, t + 1)
        o, state = code_step(q[:, :, at], k[:, :, at], v[:, :, at], codebook, state, 8, bias[:, :, at])
        outs.append(o)
    assert state is not None
    doubled = code_step(q[:, :, at], k[:, :, at], v[:, :, at], codebook, state, 8, bias[:, :, at])[0]
    return naive.gap(torch.cat(outs, 2), whole), naive.gap(doubled, whole[:, :, -1:])


@check(
    "transformer-vq",
    "within two blocks dk == the gradient by the quantised keys (straight through); older keys get none",
    below=1e-10,
    control="their gradient in dense attention",
)
def _() -> tuple[float, float]:
    q, k, v = qkv(48)
    codebook = torch.randn(2, 7, 8, dtype=F64)
    k.requires_grad_()
    hat = nearest(k.detach(), codebook).requires_grad_()
    short = gradients(code_attention(q[:, :, :32], k[:, :, :32], v[:, :, :32], codebook, 16)[0], (k,))[0][:, :, :32]
    truth = gradients(dense(q[:, :, :32], hat[:, :, :32], v[:, :, :32], None), (hat,))[0][:, :, :32]
    last = code_attention(q, k, v, codebook, 16)[0][:, :, 32:]
    old = gradients(last, (k,))[0][:, :, :16]
    full = gradients(dense(q, hat, v, None)[:, :, 32:], (hat,))[0][:, :, :16]
    return max(naive.gap(short, truth), float(old.abs().max())), float(full.abs().max())


@check(
    "transformer-vq",
    "the layer == XL positions at i - j <= block, RMS-normed q and k, gate, in one dense matrix; steps too",
    below=1e-9,
    control="positions everywhere in two blocks",
)
def _() -> tuple[float, float]:
    layer, x = VQAttention(16, 2, codes=5, block=8).double().eval(), torch.randn(1, 40, 16, dtype=F64)
    q, k = (normed(y(x).unflatten(-1, (2, 8)).transpose(1, 2)) for y in (layer.q, layer.k))
    v = F.silu(layer.v(x)).unflatten(-1, (2, -1)).transpose(1, 2)
    hat = nearest(k, layer.codebook.codes)

    def truth(reach: int) -> Tensor:
        r = layer.r(sinusoids(reach, 16, x.device, x.dtype)).unflatten(-1, (2, 8)).transpose(0, 1) * 8**-0.25
        bias = (q + 8**-0.25 * layer.w) @ r.mT
        o = dense(q + 8**-0.25 * layer.u, hat, v, bias)
        return layer.out(o.transpose(1, 2).flatten(-2) * F.silu(layer.gate(x)))  # type: ignore[no-any-return]

    y = layer(x)
    return max(naive.gap(y, truth(9)), naive.gap(layer.step(x)[0], y)), naive.gap(y, truth(16))


@check(
    "transformer-vq",
    "a short run on text: bits below those of single bytes; generation equals full passes",
    above=0.72,
    control="the model before training",
)
def _() -> tuple[float, float]:
    corpus = python_text()
    data = torch.as_tensor(corpus.train[:400_000]).long()
    frequency = torch.bincount(data, minlength=256).double() / len(data)
    alone = float(-torch.special.xlogy(frequency, frequency).sum() / math.log(2))
    model = Decoder([VQAttention(64, 1, codes=64, block=32, key_dim=32) for _ in range(2)], dim=64, layers=2, heads=1)
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3)

    def bits(batch: Tensor) -> Tensor:
        return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten()) / math.log(2)

    def batch(count: int) -> Tensor:
        at = torch.randint(len(data) - 129, (count, 1))
        return data[at + torch.arange(129)]

    test = batch(16)
    model.eval()
    with torch.no_grad():
        before = alone - float(bits(test))
    model.train()
    for _ in range(150):
        loss = bits(batch(8)) + 1e-4 * sum(block.mixer.commitment for block in model.blocks)  # type: ignore[union-attr, misc]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.eval()
    with torch.no_grad():
        out = model.generate(test[:1, :70], 4)
        same = torch.equal(model(out[:, :-1])[:, 69:].argmax(-1), out[:, 70:])
        return (alone - float(bits(test))) if same else math.nan, before


def longvq_truth(layer: LongVQBlock, x: Tensor, exact: bool = False) -> Tensor:
    """The block from its formulas with a dense matrix; exact: over the keys themselves."""
    n = layer.norm(x)
    y = ema_loop(layer.ema, n)
    y = y if layer.causal else y + ema_loop(layer.ema, n.flip(1), 1).flip(1)
    m = F.silu(y + layer.ema.omega * n)
    u, z, r, hx = layer.m(m).split([layer.dim, layer.zdim, layer.hdim, layer.dim], -1)
    q, k = (normed(layer.kappa[at] * F.silu(z) + layer.mu[at])[:, None] for at in (0, 1))
    v = F.silu(layer.v(n))[:, None]
    hat = k if exact else nearest(k, layer.codebook.codes)
    o = dense(q, hat, v, None if layer.offsets is None else layer.offsets[None], layer.causal)
    return x + torch.sigmoid(u) * (F.silu(hx + layer.h(F.silu(r) * o[:, 0])) - x)


@check(
    "longvq",
    "both directions (9 codes, N = 100) and causal with a window of biases, by blocks and by steps == dense formulas",
    below=1e-9,
    control="over unquantised keys",
)
def _() -> tuple[float, float]:
    own, other = [], math.inf
    for causal in (False, True):
        layer = LongVQBlock(12, codes=9, zdim=6, ndim=4, window=8, causal=causal).double().eval()
        if layer.offsets is not None:
            layer.offsets.data.normal_()
        x = torch.randn(1, 100, 12, dtype=F64)
        y = layer(x)
        own.append(naive.gap(y, longvq_truth(layer, x)))
        other = min(other, naive.gap(y, longvq_truth(layer, x, exact=True)))
        if causal:
            first, state = layer.step(x[:, :30])
            own.append(naive.gap(torch.cat((first, layer.step(x[:, 30:], state)[0]), 1), y))
    return max(own), other


@check("longvq", "as many codes as tokens: softmax attention over the keys themselves", below=1e-9, control="9 codes")
def _() -> tuple[float, float]:
    found = []
    for codes in (30, 9):
        layer, x = LongVQBlock(12, codes=codes, zdim=6, ndim=4, window=8).double().eval(), torch.randn(1, 30, 12, dtype=F64)
        n = layer.norm(x)
        k = layer.parts(n, layer.ema(n))[4]
        layer.codebook.codes.copy_(k[0, :, :codes].detach())
        found.append(naive.gap(layer(x), longvq_truth(layer, x, exact=True)))
    return found[0], found[1]


@check("longvq", "update gate closed: the block returns x", below=1e-12, control="half open")
def _() -> tuple[float, float]:
    layer, x = LongVQBlock(12, codes=9, zdim=6, ndim=4, window=8).double().eval(), torch.randn(1, 30, 12, dtype=F64)
    found = []
    for bias in (-1e4, 0.0):
        layer.m.weight.data[: layer.dim] = 0
        layer.m.bias.data[: layer.dim] = bias
        found.append(naive.gap(layer(x), x))
    return found[0], found[1]


@check("longvq", "training moves the codebook to its keys: mean squared distance after over before", below=0.5, control="in eval")
def _() -> tuple[float, float]:
    def ratio(training: bool) -> float:
        torch.manual_seed(0)
        layer, x = LongVQBlock(12, codes=16, zdim=6, ndim=4, window=8), torch.randn(8, 64, 12)
        layer.train(training)
        layer(x)
        before = float(layer.commitment.detach())
        for _ in range(300):
            layer(x)
        return float(layer.commitment.detach()) / before

    return ratio(True), ratio(False)
