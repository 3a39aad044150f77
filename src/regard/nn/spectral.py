"""Convolution over a whole grid in Fourier space: a matrix of channels for each of the lowest frequencies (Li et al., 2020)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..catalog.making import placeable
from ..errors import RegardError


@placeable
class SpectralConv(nn.Module):
    """y = F^-1 (R_f F x) on x (B, n1[, n2], inputs) -> (B, n1[, n2], outputs), R_f (inputs, outputs) complex for |f| < `modes` in each direction, 0 for
    the others; at any resolution of at least 2 modes. Start: uniform in +-1 / (inputs outputs). RegardError: too coarse a grid."""

    def __init__(self, inputs: int, outputs: int, modes: int, directions: int = 1):
        super().__init__()
        if modes < 1 or directions not in (1, 2):
            raise RegardError(f"modes={modes}, directions={directions}; expected at least 1 mode, and 1 or 2 directions")
        self.modes, self.directions = modes, directions
        size = (
            (modes,) if directions == 1 else (2 * modes - 1, modes)
        )  # of a real signal, frequencies of the last direction are not negative
        self.weight = nn.Parameter((2 * torch.rand(*size, inputs, outputs, 2) - 1) / (inputs * outputs))

    def forward(self, x: Tensor) -> Tensor:
        dims = tuple(range(1, 1 + self.directions))
        sizes = [x.shape[dim] for dim in dims]
        if x.dim() != 2 + self.directions or min(sizes) < 2 * self.modes:
            raise RegardError(
                f"x has shape {tuple(x.shape)}; expected (B, {', '.join(['n'] * self.directions)}, inputs) with n >= {2 * self.modes}"
            )
        spectrum = torch.fft.rfftn(x, dim=dims, norm="ortho")
        weight = torch.view_as_complex(self.weight.contiguous()).to(spectrum.dtype)
        low = spectrum[:, : self.modes] if self.directions == 1 else self.lowest(spectrum)
        mixed = torch.einsum("b...i,...io->b...o", low, weight)
        out = spectrum.new_zeros(*spectrum.shape[:-1], weight.shape[-1])
        if self.directions == 1:
            out[:, : self.modes] = mixed
        else:
            out[:, : self.modes, : self.modes] = mixed[:, : self.modes]
            if self.modes > 1:
                out[:, 1 - self.modes :, : self.modes] = mixed[:, self.modes :]
        return torch.fft.irfftn(out, s=sizes, dim=dims, norm="ortho")

    def lowest(self, spectrum: Tensor) -> Tensor:
        """Frequencies 0 .. modes - 1, then -(modes - 1) .. -1 of the first direction."""
        part = spectrum[:, :, : self.modes]
        return torch.cat((part[:, : self.modes], part[:, part.shape[1] - self.modes + 1 :]), 1)


@placeable
class SpectralRegressor(nn.Module):
    """Layers of act(spectral(x) + linear(x)) on a grid, then an MLP: x (B, n, dim) with n = n1 [* n2] points -> (B, n, outputs)."""

    def __init__(self, dim: int, outputs: int, modes: int = 8, layers: int = 2, directions: int = 1):
        super().__init__()
        self.directions = directions
        self.spectral = nn.ModuleList([SpectralConv(dim, dim, modes, directions) for _ in range(layers)])
        self.linear = nn.ModuleList([nn.Linear(dim, dim) for _ in range(layers)])
        self.end = nn.Sequential(nn.Linear(dim, 2 * dim), nn.SiLU(), nn.Linear(2 * dim, outputs))

    def forward(self, x: Tensor) -> Tensor:
        b, n, dim = x.shape
        side = round(n**0.5)
        if self.directions == 2 and side * side != n:
            raise RegardError(f"x has {n} points; expected a square number of them, row by row")
        grid = x if self.directions == 1 else x.view(b, side, side, dim)
        for spectral, linear in zip(self.spectral, self.linear, strict=True):
            grid = nn.functional.silu(spectral(grid) + linear(grid))
        return self.end(grid.reshape(b, n, dim))  # type: ignore[no-any-return]
