"""Checks of mega."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.layers import drawn
from regard.lab.checks.shared.mega import ema_loop
from regard.lab.verification import check
from regard.nn.decoder import Decoder
from regard.nn.ema import MultiHeadEMA
from regard.zoo.linear.mega import MU, SIGMA, MegaLayer, laplace, relu_squared


@check("mega", "EMA by FFT, by steps, and in both directions == the recurrence", below=1e-10, control="a circular convolution")
def _() -> tuple[float, float]:
    x = torch.randn(2, 21, 6, dtype=F64)
    one, two = MultiHeadEMA(6, 4).double(), MultiHeadEMA(6, 4, bidirectional=True).double()

    def close(layer: MultiHeadEMA, y: Tensor) -> Tensor:
        return F.silu(y + layer.omega * x)

    first, state = one.step(x[:, :8])
    second, _ = one.step(x[:, 8:], state)
    truth = close(one, ema_loop(one, x))
    both = close(two, ema_loop(two, x) + ema_loop(two, x.flip(1), 1).flip(1))
    circular = torch.fft.irfft(torch.fft.rfft(one.kernel(21)[0]) * torch.fft.rfft(x.mT), n=21).mT
    gaps = [naive.gap(one(x), truth), naive.gap(torch.cat((first, second), 1), truth), naive.gap(two(x), both)]
    return max(gaps), naive.gap(close(one, circular), truth)


@check("mega", "Laplace at sqrt(1/2): distance of value and slope from relu^2's", below=1e-4, control="mu = 0.5")
def _() -> tuple[float, float]:
    def miss(mu: float) -> float:
        x = torch.tensor(math.sqrt(0.5), dtype=F64, requires_grad=True)
        values = [laplace(x, mu, SIGMA), relu_squared(x)]
        slopes = [torch.autograd.grad(v, x)[0] for v in values]
        return max(float((values[0] - values[1]).detach().abs()), float((slopes[0] - slopes[1]).abs()))

    return miss(MU), miss(0.5)


def mega_truth(layer: MegaLayer, x: Tensor, ema: bool = True) -> Tensor:
    """A causal layer from its formulas, one sequence."""
    normed = layer.norm(x)
    assert layer.ema is not None
    m = layer.ema.close(ema_loop(layer.ema, normed), normed) if ema else normed
    u, z, r, hx = layer.m(m).split([layer.dim, layer.zdim, layer.hdim, layer.dim], -1)
    z, v = F.silu(z), F.silu(layer.v(normed))
    q, k = layer.kappa[0] * z + layer.mu[0], layer.kappa[1] * z + layer.mu[1]
    n = x.shape[1]
    i = torch.arange(n)
    assert layer.offsets is not None
    reach = (len(layer.offsets) + 1) // 2
    bias = layer.offsets[(i[:, None] - i).clamp(1 - reach, reach - 1) + reach - 1]
    seen = i[:, None] >= i
    if layer.chunk is not None:
        seen = seen & (i[:, None] // layer.chunk == i // layer.chunk)
    if layer.attn == "softmax":
        w = (q @ k.mT / layer.zdim**0.5 + bias).masked_fill(~seen, -math.inf).softmax(-1)
    else:
        s = q @ k.mT / seen.sum(-1, keepdim=True) + bias
        w = ((1 + torch.erf((s - 0.707107) / (0.282095 * 2**0.5))) / 2 if layer.attn == "laplace" else F.relu(s) ** 2) * seen
    h = F.silu(hx + (F.silu(r) * (w @ v)) @ layer.h.weight.T + layer.h.bias)
    return x + torch.sigmoid(u) * (h - x)


@check(
    "mega",
    "softmax, Laplace and relu^2, whole and in chunks of 8: the layer and its steps == the formulas",
    below=1e-5,
    control="without the averages",
)
def _() -> tuple[float, float]:
    own, other = [], math.inf
    for attn in ("softmax", "laplace", "relu2"):
        for chunk in (None, 8):
            layer, x = MegaLayer(12, 6, ndim=4, attn=attn, chunk=chunk).double(), torch.randn(2, 21, 12, dtype=F64)
            truth, state, outs = mega_truth(layer, x), None, []
            for t in range(21):
                y, state = layer.step(x[:, t : t + 1], state)
                outs.append(y)
            own += [naive.gap(layer(x), truth), naive.gap(torch.cat(outs, 1), truth)]
            other = min(other, naive.gap(layer(x), mega_truth(layer, x, ema=False)))
    return max(own), other


@check(
    "mega",
    "chunks of 8: what a token of the first chunk changes in the second: zero without averages; future tokens: zero with them",
    below=0,
    control="with averages, past tokens",
)
def _() -> tuple[float, float]:
    x = torch.randn(1, 16, 12, dtype=F64)

    def moved(layer: MegaLayer, token: int, rows: slice) -> float:
        other = x.clone()
        other[:, token] = torch.linspace(-1, 2, 12, dtype=F64).square()  # a shift of all channels alike would be lost in the norm
        return naive.gap(layer(other)[:, rows], layer(x)[:, rows])

    bare, full = MegaLayer(12, 6, ndim=4, chunk=8, ema=False).double(), MegaLayer(12, 6, ndim=4, chunk=8).double()
    ahead = moved(MegaLayer(12, 6, ndim=4).double(), 9, slice(0, 9))
    # The transform's rounding spreads over all outputs, hence a threshold of zero needs the sum of both to be rounded.
    return max(moved(bare, 3, slice(8, 16)), round(ahead, 12)), moved(full, 3, slice(8, 16))


@check(
    "mega",
    "a decoder of Mega layers with chunks generates what full passes would; state bytes stay within a chunk",
    below=0,
    control="without chunks",
)
def _() -> tuple[float, float]:
    def grown(chunk: int | None) -> float:
        model = Decoder([MegaLayer(16, 8, ndim=4, chunk=chunk) for _ in range(2)], vocab=20, dim=16, layers=2, heads=2)
        out = model.generate(torch.randint(20, (1, 17)), 3)
        if not torch.equal(model(out[:, :-1])[:, 16:].argmax(-1), out[:, 17:]):
            return math.nan
        sizes = [sum(s.bytes for s in model.step(torch.randint(20, (1, n)))[1]) for n in (24, 48)]
        return float(sizes[1] - sizes[0])

    return grown(8), grown(None)


def both_ways(layer: MegaLayer, x: Tensor, keep: Tensor, norm: str, causal: bool = False) -> Tensor:
    """A layer in both directions from its formulas, zero at padding; causal: with a mask that it must not have."""
    n = x.shape[1]
    i = torch.arange(n)
    y = x if norm == "rms" else x - x.mean(-1, keepdim=True)
    y = y / (y.square().mean(-1, keepdim=True) + 1e-3).sqrt() * layer.norm.weight  # type: ignore[operator]
    y = y if norm == "rms" else y + layer.norm.bias  # type: ignore[operator]
    assert layer.ema is not None
    counted = y * keep[..., None]
    ema = ema_loop(layer.ema, counted) + ema_loop(layer.ema, counted.flip(1), 1).flip(1)
    m = layer.m(F.silu(ema + layer.ema.omega * y))
    u, z, r, hx = m.split([layer.dim, layer.zdim, layer.hdim, layer.dim], -1)
    z, v = F.silu(z), F.silu(layer.v(y))
    q, k = layer.kappa[0] * z + layer.mu[0], layer.kappa[1] * z + layer.mu[1]
    if layer.offsets is not None:
        bias = layer.offsets[(i[:, None] - i).clamp(-4, 4) + 4]
    else:
        assert layer.alpha is not None and layer.beta is not None
        angle = (i[:, None, None] - i[:, None]) * 10000 ** (-torch.arange(3, dtype=F64) / 3)
        a, b = layer.alpha.chunk(2)
        bias = torch.cat((a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()), -1) @ layer.beta
    seen = keep[:, None] & ((i[:, None] >= i) | (not causal))
    if layer.attn == "softmax":
        w = (q @ k.mT / layer.zdim**0.5 + bias).masked_fill(~seen, -math.inf).softmax(-1)
    else:
        s = q @ k.mT / seen.sum(-1, keepdim=True) + bias
        w = (F.relu(s) ** 2 if layer.attn == "relu2" else (1 + torch.erf((s - 0.707107) / (0.282095 * 2**0.5))) / 2) * seen
    h = F.silu(hx + (F.silu(r) * (w @ v)) @ layer.h.weight.T + layer.h.bias)
    return (x + torch.sigmoid(u) * (h - x)) * keep[..., None]


@check(
    "mega",
    "every parameter moved, both directions, rotary offsets, an RMS norm, other widths, padding == the formulas",
    below=1e-9,
    control="causal",
)
def _() -> tuple[float, float]:
    own, other = [], math.inf
    keep = torch.arange(13) < torch.tensor([[13], [9]])
    for positions, norm, attn in (("simple", "rms", "softmax"), ("rotary", "layer", "laplace"), ("rotary", "rms", "relu2")):
        layer = MegaLayer(8, 6, 10, 4, attn=attn, causal=False, reach=5, positions=positions, norm=norm, norm_eps=1e-3)
        layer, x = drawn(layer, 0.8), torch.randn(2, 13, 8, dtype=F64)
        out = layer(x, keep) * keep[..., None]
        own.append(naive.gap(out, both_ways(layer, x, keep, norm)))
        other = min(other, naive.gap(out, both_ways(layer, x, keep, norm, causal=True)))
    return max(own), other
