"""Convolutions in Fourier space against sums over frequencies, at several resolutions; norms with slopes."""

import cmath
import math

import pytest
import torch

from regard import RegardError
from regard.nn.spectral import SpectralConv, SpectralRegressor
from regard.tasks.operators import h1_error
from regard.zoo.linear.galerkin import OperatorModel


def test_one_direction_by_hand():
    layer, x = SpectralConv(2, 3, 3).double(), torch.randn(1, 9, 2, dtype=torch.float64)
    n, weight = 9, torch.view_as_complex(layer.weight.detach())
    want = torch.zeros(n, 3, dtype=torch.float64)
    for f in range(3):
        wave = torch.tensor([cmath.exp(-2j * math.pi * f * t / n) for t in range(n)])
        mixed = (wave[:, None] * x[0]).sum(0) @ weight[f] / n
        for t in range(n):
            term = (mixed * cmath.exp(2j * math.pi * f * t / n)).real
            want[t] += term if f == 0 else 2 * term
    torch.testing.assert_close(layer(x)[0].detach(), want)


def test_two_directions_by_hand():
    layer, x = SpectralConv(1, 2, 2, 2).double(), torch.randn(1, 5, 6, 1, dtype=torch.float64)
    weight, spectrum = torch.view_as_complex(layer.weight.detach()), torch.fft.fft2(x[0, ..., 0])
    out = torch.zeros(5, 6, 2, dtype=torch.complex128)
    for row, f in enumerate((0, 1, -1)):
        for g in (0, 1):
            out[f, g] = spectrum[f, g] * weight[row, g, 0]
    for f in range(-2, 3):  # a real answer: what is not negative in the last direction says the rest
        for g in (1,):
            out[-f, -g] = out[f, g].conj()
    column = out[:, 0].clone()
    for f in range(5):
        out[f, 0] = (column[f] + column[-f].conj()) / 2
    want = torch.fft.ifft2(out, dim=(0, 1)).real
    torch.testing.assert_close(layer(x)[0].detach(), want)


def test_any_resolution_gives_the_same_function():
    layer = SpectralConv(1, 1, 3).double()

    def at(n):
        t = torch.arange(n, dtype=torch.float64) / n
        x = (1 + torch.sin(2 * math.pi * t) - 0.5 * torch.cos(4 * math.pi * t))[None, :, None]
        return layer(x)[0, :, 0]

    torch.testing.assert_close(at(32)[::4], at(8))
    assert float(layer.weight.detach().abs().max()) <= 1
    with pytest.raises(RegardError, match="n >= 6"):
        layer(torch.zeros(1, 5, 1, dtype=torch.float64))


def test_slopes_count():
    t = torch.arange(64, dtype=torch.float64) / 64
    u, wave = torch.sin(2 * math.pi * t)[None], torch.sin(2 * math.pi * 8 * t)[None]
    found = float(h1_error(u + 0.1 * wave, u, periodic=True))
    slope = [math.sin(2 * math.pi * f / 64) * 64 for f in (1, 8)]  # of a sine by central differences
    assert found == pytest.approx(0.1 * math.sqrt((0.5 + 0.5 * slope[1] ** 2) / (0.5 + 0.5 * slope[0] ** 2)))
    line = torch.linspace(0, 1, 11, dtype=torch.float64)
    plane = (2 * line[:, None] + 3 * line)[None]
    assert float(h1_error(2 * plane, plane, 2)) == pytest.approx(1.0)
    assert float(h1_error(plane + 1, plane, 2)) == pytest.approx(1 / math.sqrt(float(plane.square().mean()) + 4 + 9))


@pytest.mark.parametrize("directions", [1, 2])
def test_in_an_operator_model(directions):
    torch.manual_seed(0)
    model = OperatorModel(dim=8, pos_dim=directions, regressor="spectral", modes=2)
    u, place = torch.randn(2, 16, 1), torch.rand(2, 16, directions)
    out = model(u, place)
    out.sum().backward()
    assert out.shape == (2, 16, 1) and isinstance(model.end, SpectralRegressor)
    assert all(p.grad is not None for p in model.end.parameters())
    with pytest.raises(RegardError, match="regressor='other'"):
        OperatorModel(regressor="other")
    if directions == 2:
        with pytest.raises(RegardError, match="square number"):
            model(u[:, :15], place[:, :15])
