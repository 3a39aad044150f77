"""Pairs of functions that a differential equation ties together: smoothing with transport, Burgers in one dimension, Darcy in two."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import RegardError


def random_waves(count: int, points: int, modes: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """(coefficients of cosines, of sines (count, modes), their values (count, points)) of smooth periodic functions on [0, 1)."""
    scale = 1 / torch.arange(1, modes + 1)
    a, b = (torch.randn(count, modes, generator=generator) * scale for _ in range(2))
    return a, b, waves(a, b, points)


def waves(a: Tensor, b: Tensor, points: int) -> Tensor:
    angle = 2 * math.pi * torch.arange(1, a.shape[-1] + 1)[:, None] * torch.arange(points) / points
    return a @ angle.cos() + b @ angle.sin()


def transport(count: int, points: int, seed: int = 0, modes: int = 6, speed: float = 0.1, viscosity: float = 2e-3) -> tuple[Tensor, Tensor]:
    """(u0, u1) (count, points): the solution of u_t + speed u_x = viscosity u_xx at t = 1, exactly. One seed gives the same functions at
    every resolution."""
    a, b, u = random_waves(count, points, modes, torch.Generator().manual_seed(seed))
    m = 2 * math.pi * torch.arange(1, modes + 1)
    fade, turn = torch.exp(-viscosity * m**2), m * speed
    return u, waves(fade * (a * turn.cos() - b * turn.sin()), fade * (a * turn.sin() + b * turn.cos()), points)


def burgers(count: int, points: int, seed: int = 0, viscosity: float = 0.02, time: float = 0.5) -> tuple[Tensor, Tensor]:
    """(u0, u1) (count, points): u_t + u u_x = viscosity u_xx on a periodic interval, by finite differences in float64 with steps small
    enough to be stable (conservative upwind flux, explicit diffusion)."""
    u = random_waves(count, points, 4, torch.Generator().manual_seed(seed))[2].double() * 0.5
    start, dx = u, 1 / points
    step = 0.4 * min(dx / max(float(u.abs().max()), 1e-3), dx * dx / (2 * viscosity))
    for _ in range(max(1, math.ceil(time / step))):
        step = time / max(1, math.ceil(time / step))
        right = u.roll(-1, -1)
        speed = (u + right) / 2
        flux = torch.where(speed > 0, u * u, right * right) / 2
        u = u - step / dx * (flux - flux.roll(1, -1)) + step * viscosity / dx**2 * (right - 2 * u + u.roll(1, -1))
    return start.float(), u.float()


def darcy(count: int, side: int, seed: int = 0, low: float = 3.0, high: float = 12.0) -> tuple[Tensor, Tensor]:
    """(a, u) (count, side, side): -div(a grad u) = 1 with u = 0 outside, a of two values with smooth interfaces, by finite volumes."""
    if side < 3:
        raise RegardError(f"side={side}; expected at least 3")
    generator = torch.Generator().manual_seed(seed)
    angle = math.pi * torch.arange(4)[:, None] * (torch.arange(side) + 0.5) / side
    basis = angle.cos()
    weights = torch.randn(count, 4, 4, generator=generator) / (1 + torch.arange(4)[:, None] + torch.arange(4))
    a = torch.where(torch.einsum("nij,ix,jy->nxy", weights, basis, basis) > 0, high, low).double()
    at = torch.arange(side * side).view(side, side)
    system = torch.zeros(count, side * side, side * side, dtype=torch.float64)
    for here, there, face_a, face_b in (
        (at[:-1].flatten(), at[1:].flatten(), a[:, :-1], a[:, 1:]),
        (at[:, :-1].flatten(), at[:, 1:].flatten(), a[:, :, :-1], a[:, :, 1:]),
    ):
        flow = (2 * face_a * face_b / (face_a + face_b)).flatten(1)  # harmonic means at the faces
        system[:, here, here] += flow
        system[:, there, there] += flow
        system[:, here, there] -= flow
        system[:, there, here] -= flow
    edges = torch.zeros(side, side, dtype=torch.float64)
    edges[0] += 2
    edges[-1] += 2
    edges[:, 0] += 2
    edges[:, -1] += 2
    system = system + torch.diag_embed((a * edges).flatten(1))
    right = torch.full((count, side * side, 1), 1 / side**2, dtype=torch.float64)
    return a.float(), torch.linalg.solve(system, right).view(count, side, side).float()


def relative_error(found: Tensor, truth: Tensor) -> Tensor:
    """Mean over samples of |found - truth| / |truth|, Euclidean norms over all but the first dimension."""
    return ((found - truth).flatten(1).norm(dim=-1) / truth.flatten(1).norm(dim=-1)).mean()


def h1_error(found: Tensor, truth: Tensor, directions: int = 1, periodic: bool = False) -> Tensor:
    """Mean over samples of |found - truth| / |truth| in the H1 norm, sqrt(|u|^2 + sum |du/dx|^2), of functions (B, n1[, n2]) on [0, 1]: slopes by central
    differences, one-sided at the ends unless the interval is periodic."""

    def square(u: Tensor) -> Tensor:
        total = u.square().flatten(1).mean(1)
        for dim in range(1, 1 + directions):
            n = u.shape[dim]
            if periodic:
                slope = (u.roll(-1, dim) - u.roll(1, dim)) * n / 2
            else:
                slope = torch.gradient(u, spacing=1 / (n - 1), dim=dim)[0]
            total = total + slope.square().flatten(1).mean(1)
        return total

    return (square(found - truth) / square(truth)).sqrt().mean()
