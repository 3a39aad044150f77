"""Checks of transformer-vq."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.algebra import Causal
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.codes import dense, nearest
from regard.lab.checks.shared.comparing import F64, gradients
from regard.lab.checks.shared.layers import drawn
from regard.lab.checks.shared.weighted import qkv
from regard.lab.verification import check
from regard.nn.codes import code_attention, code_step, normed
from regard.nn.decoder import Decoder
from regard.tasks import python_text
from regard.zoo.linear.transformer_vq import VQAttention, sinusoids


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
    for _ in range(50):
        loss = bits(batch(8)) + 1e-4 * sum(block.mixer.commitment for block in model.blocks)  # type: ignore[union-attr, misc]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.eval()
    with torch.no_grad():
        out = model.generate(test[:1, :70], 4)
        same = torch.equal(model(out[:, :-1])[:, 69:].argmax(-1), out[:, 70:])
        return (alone - float(bits(test))) if same else math.nan, before


@check(
    "transformer-vq",
    "the codebook: averages of the keys' counts and sums, counts of at least 0.01; the commitment; both by loops, in training alone",
    below=1e-10,
    control="averages that keep nothing",
)
def _() -> tuple[float, float]:
    layer, x = VQAttention(16, 2, codes=5, block=8).double(), torch.randn(3, 20, 16, dtype=F64)
    book = layer.codebook
    book.counts[0, 1] = 1e-3
    old = book.codes.clone(), book.sums.clone(), book.counts.clone()
    k = normed(layer.k(x).unflatten(-1, (2, 8)).transpose(1, 2)).detach()
    commitment, fresh = 0.0, [torch.zeros_like(old[1]), torch.zeros_like(old[2])]
    for b in range(3):
        for h in range(2):
            for t in range(20):
                far = (k[b, h, t] - old[0][h]).square().sum(-1)
                commitment += float(far.min()) / 60
                fresh[0][h, int(far.argmin())] += k[b, h, t]
                fresh[1][h, int(far.argmin())] += 1
    layer.eval()(x)
    still = naive.gap(book.codes, old[0])
    layer.train()(x)

    def codes(keep: float) -> Tensor:
        sums, counts = keep * old[1] + (1 - keep) * fresh[0], keep * old[2] + (1 - keep) * fresh[1]
        return sums / counts.clamp_min(0.01)[..., None]

    return max(still, abs(float(layer.commitment.detach()) - commitment), naive.gap(book.codes, codes(0.99))), naive.gap(
        book.codes, codes(0.0)
    )


@check(
    "transformer-vq",
    "memory, reach and a window alone (aggregate=False), blocks and steps == one dense matrix",
    below=1e-9,
    control="older tokens read by codes",
)
def _() -> tuple[float, float]:
    x, other = torch.randn(1, 30, 16, dtype=F64), math.inf
    own: list[float] = []
    for memory, reach, aggregate in ((4, 3, True), (12, None, True), (6, None, False)):
        layer = drawn(VQAttention(16, 2, codes=5, block=8, key_dim=4, value_dim=20, memory=memory, reach=reach, aggregate=aggregate)).eval()
        q, k = (normed(y(x).unflatten(-1, (2, 4)).transpose(1, 2)) for y in (layer.q, layer.k))
        v = F.silu(layer.v(x)).unflatten(-1, (2, 10)).transpose(1, 2)
        hat, gap = nearest(k, layer.codebook.codes), torch.arange(30)[:, None] - torch.arange(30)
        r = layer.r(sinusoids(reach or memory + 1, 16, x.device, x.dtype)).unflatten(-1, (2, 4)).transpose(0, 1) * 4**-0.25
        bias = (q + 4**-0.25 * layer.w) @ r.mT
        s = (q + 4**-0.25 * layer.u) @ hat.mT
        s = s + torch.where((gap >= 0) & (gap < bias.shape[-1]), bias.gather(-1, gap.clamp(0, bias.shape[-1] - 1).expand_as(s)), 0.0)
        for seen, to in (((gap >= 0) & ((gap <= memory) | aggregate), own), (gap >= 0, None)):
            o = s.masked_fill(~seen, -math.inf).softmax(-1) @ v
            y = layer.out(o.transpose(1, 2).flatten(-2) * F.silu(layer.gate(x)))
            if to is not None:
                to += [naive.gap(layer(x), y), naive.gap(layer.step(x)[0], y)]
            elif not aggregate:
                other = naive.gap(layer(x), y)
    places = sinusoids(6, 8, x.device, F64)
    for d in range(6):
        for c in range(4):
            angle = d * 10000 ** (-2 * c / 8)
            own.append(max(abs(float(places[d, c]) - math.sin(angle)), abs(float(places[d, 4 + c]) - math.cos(angle))))
    return max(own), other
