"""Checks of fftnet."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.verification import check
from regard.zoo.linear.fftnet import SpectralMixer, modrelu


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
