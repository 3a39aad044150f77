"""Checks of fftnet."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.layers import drawn, misshapen
from regard.lab.verification import check
from regard.zoo.linear.fftnet import FNetMixer, SpectralEncoder, SpectralMixer, modrelu


@check(
    "fftnet",
    "N = 32 and 33: filter 1 without activation gives x back, and norms are kept",
    below=1e-12,
    control="the real part of a Fourier transform over tokens (FNet)",
)
def _() -> tuple[float, float]:
    own = []
    for n in (32, 33):
        mixer, x = SpectralMixer(12, 3, n, adaptive=False, activation="none").double(), torch.randn(2, n, 12, dtype=F64)
        own += [naive.gap(mixer.mix(x), x), abs(float(torch.fft.fft(x, dim=1, norm="ortho").norm() - x.norm()))]
    return max(own), naive.gap(torch.fft.fft(x, dim=1, norm="ortho").real, x)


@check("fftnet", "without activation == the circulant matrix of irfft(W)", below=1e-10, control="the Toeplitz matrix")
def _() -> tuple[float, float]:
    own, other = [], math.inf
    for n in (32, 33):
        mixer, x = SpectralMixer(12, 3, n, activation="none").double(), torch.randn(1, n, 12, dtype=F64)
        kernel = torch.fft.irfft(mixer.filters(x)[0][0], n=n)  # (heads, n)
        at = torch.arange(n)
        circulant = kernel[:, (at[:, None] - at) % n]
        heads = x[0].unflatten(-1, (3, 4)).transpose(0, 1)
        out = mixer.mix(x)[0].unflatten(-1, (3, 4)).transpose(0, 1)
        own.append(naive.gap(out, circulant @ heads))
        other = min(other, naive.gap(out, circulant.tril() @ heads))
    return max(own), other


@check("fftnet", "the whole module commutes with circular shifts", below=1e-10, control="shifting by another step")
def _() -> tuple[float, float]:
    own, other = [], math.inf
    for n, kind in ((32, "modrelu"), (33, "modrelu"), (33, "gelu"), (20, "modrelu")):
        mixer, x = SpectralMixer(12, 3, 33 if n == 20 else n, activation=kind).double(), torch.randn(2, n, 12, dtype=F64)
        shifted = mixer(x.roll(5, 1))
        if kind == "modrelu":  # a real bias on the spectrum, as released, is tied to the origin
            own.append(naive.gap(shifted, mixer(x).roll(5, 1)))
            other = min(other, naive.gap(shifted, mixer(x).roll(4, 1)))
    return max(own), other


@check(
    "fftnet",
    "modReLU keeps phases, is zero below -b, and ReLU(x + b) on reals >= 0",
    below=1e-12,
    control="ReLU of real and imaginary parts",
)
def _() -> tuple[float, float]:
    z, b = torch.randn(1000, dtype=torch.complex128), torch.tensor(-0.5, dtype=F64)
    out = modrelu(z, b)
    alive = z.abs() > 0.5
    phases = float((out[alive].angle() - z[alive].angle()).abs().max())
    zero = float(out[~alive].abs().max())
    real = torch.rand(100, dtype=F64)
    split = torch.complex(F.relu(z.real + b), F.relu(z.imag + b))
    return max(phases, zero, naive.gap(modrelu(real + 0j, b).real, F.relu(real + b))), float(
        (split[alive].angle() - z[alive].angle()).abs().max()
    )


@check("fftnet", "filters of two inputs differ by", above=1e-3, control="without adaptation")
def _() -> tuple[float, float]:
    x = torch.randn(2, 32, 12)
    found = []
    for adaptive in (True, False):
        w = SpectralMixer(12, 3, 32, adaptive=adaptive).filters(x)[0]
        found.append(naive.gap(w[0], w[1]))
    return found[0], found[1]


@check(
    "fftnet",
    "the module, each activation and another length == LN, Fourier sums, filter and bias from the mean, activation, residual by hand",
    below=1e-9,
    control="without the residual",
)
def _() -> tuple[float, float]:
    own, other = [], math.inf
    for kind, made_for, n, adaptive in (
        ("modrelu", 16, 16, True),
        ("gelu", 16, 16, True),
        ("modrelu", 13, 9, True),
        ("modrelu", 9, 9, False),
    ):
        layer = drawn(SpectralMixer(12, 3, made_for, adaptive=adaptive, activation=kind))
        x = torch.randn(2, n, 12, dtype=F64)
        y = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt() * layer.norm.weight + layer.norm.bias
        bins, size = made_for // 2 + 1, n // 2 + 1
        scale: torch.Tensor = layer.base
        shift: torch.Tensor = layer.bias
        if adaptive:
            assert layer.context is not None
            first, _, last = layer.context
            h = y.mean(1) @ first.weight.T + first.bias  # type: ignore[operator, union-attr]
            made = (h * (1 + torch.erf(h / math.sqrt(2))) / 2) @ last.weight.T + last.bias  # type: ignore[operator, union-attr]
            scale, shift = layer.base * (1 + made[:, : 3 * bins].view(2, 3, bins)), layer.bias + made[:, 3 * bins :].view(2, 3, bins)
        if size != bins:  # a line through the filter's values, its ends kept
            at = torch.arange(size, dtype=F64) * (bins - 1) / (size - 1)
            low = at.long().clamp_max(bins - 2)
            scale, shift = (z[..., low] + (at - low) * (z[..., low + 1] - z[..., low]) for z in (scale, shift))
        t = torch.arange(n, dtype=F64)
        waves = torch.exp(-2j * math.pi * t[:size, None] * t / n) / math.sqrt(n)
        z = torch.einsum("ft,bthd->bhfd", waves, y.unflatten(-1, (3, 4)).to(waves.dtype)) * scale[..., None]
        size_of = z.abs()
        if kind == "modrelu":
            z = z * (size_of + shift[..., None]).clamp_min(0) / size_of
        else:
            z = z + shift[..., None]
            size_of = z.abs()
            z = z * (1 + torch.erf(size_of / math.sqrt(2))) / 2
        weight = torch.full((size,), 2.0, dtype=F64)
        weight[0] = 1.0
        weight[-1] = 1.0 if n % 2 == 0 else 2.0
        back = torch.einsum("ft,bhfd->bthd", waves.conj() * weight[:, None], z).real.flatten(2)
        own.append(naive.gap(layer(x), x + back))
        other = min(other, naive.gap(layer(x), back))
    start = SpectralMixer(12, 3, 16)
    shapes: dict[str, tuple[int, ...]] = {"norm.weight": (12,), "norm.bias": (12,), "base": (3, 9), "bias": (3, 9)}
    shapes |= {"context.0.weight": (12, 12), "context.0.bias": (12,), "context.2.weight": (54, 12), "context.2.bias": (54,)}
    own.append(misshapen(start, shapes))
    own += [naive.gap(start.base, torch.ones(3, 9)), naive.gap(start.bias, torch.full((3, 9), -0.1))]
    return max(own), other


@check(
    "fftnet",
    "the encoder on tokens == embedding, mixers, x + MLP(LN x), the mean, a linear map by hand",
    below=1e-9,
    control="without the MLPs",
)
def _() -> tuple[float, float]:
    model = drawn(SpectralEncoder(3, 12, 3, 2, 16, vocab=7))
    tokens = torch.randint(7, (2, 16))

    def truth(mlps: bool) -> torch.Tensor:
        x = model.embed.weight[tokens]
        for mixer, mlp in zip(model.mixers, model.mlps, strict=True):
            x = mixer(x)
            norm, up, down = (mlp[at] for at in (0, 1, 3))  # type: ignore[index]
            h = F.layer_norm(x, (12,)) * norm.weight + norm.bias
            h = h @ up.weight.T + up.bias
            x = x + ((h * (1 + torch.erf(h / math.sqrt(2))) / 2) @ down.weight.T + down.bias) * mlps
        return x.mean(1) @ model.head.weight.T + model.head.bias

    return naive.gap(model(tokens), truth(True)), naive.gap(model(tokens), truth(False))


@check(
    "fftnet",
    "FNet, to compare with: x + Re of the transform of LN(x) over tokens and channels, in sums",
    below=1e-9,
    control="over tokens alone",
)
def _() -> tuple[float, float]:
    layer, x = drawn(FNetMixer(6)), torch.randn(2, 5, 6, dtype=F64)
    y = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt() * layer.norm.weight + layer.norm.bias
    t, c = torch.arange(5, dtype=F64), torch.arange(6, dtype=F64)
    over_t, over_c = (torch.exp(-2j * math.pi * a[:, None] * a / len(a)) for a in (t, c))
    along = torch.einsum("ft,btc->bfc", over_t, y.to(over_t.dtype))
    return naive.gap(layer(x), x + (along @ over_c).real), naive.gap(layer(x), x + along.real)
