"""Checks of galerkin."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.layers import drawn, joined, silu, split
from regard.lab.verification import check
from regard.tasks.operators import burgers, darcy, relative_error, transport
from regard.zoo.linear.galerkin import OperatorAttention, OperatorModel


@check("galerkin", "Q (LN(K)^T LN(V)) / n with coordinates == (Q LN(K)^T) LN(V) / n written out", below=1e-12, control="the Fourier type")
def _() -> tuple[float, float]:
    layer, fourier = (OperatorAttention(16, 2, kind, 2, gain=1.0).double() for kind in ("galerkin", "fourier"))
    fourier.load_state_dict({**fourier.state_dict(), **{name: x for name, x in layer.state_dict().items() if not name.startswith("norms")}})
    x, place = torch.randn(2, 30, 16, dtype=F64), torch.rand(2, 30, 2, dtype=F64)

    def heads(y: Tensor, norm: bool) -> Tensor:
        y = y.unflatten(-1, (2, 8)).transpose(1, 2)
        y = F.layer_norm(y, (8,)) if norm else y
        return torch.cat((place[:, None].expand(-1, 2, -1, -1), y), -1)

    def truth(normed: str, scale: float) -> Tensor:
        q, k, v = (heads(getattr(layer, name)(x), name in normed) for name in "qkv")
        return layer.out((scale * (q @ k.mT) @ v / 30).transpose(1, 2).flatten(-2))  # type: ignore[no-any-return]

    y = layer(x, place)
    gaps = (naive.gap(y, truth("kv", 1.0)), naive.gap(fourier(x, place), truth("qk", 10**-0.5)))
    return max(gaps), naive.gap(y, truth("qk", 10**-0.5))


@check("galerkin", "one function on 64 and 576 points: relative difference at the shared points", below=5e-3, control="without 1/n")
def _() -> tuple[float, float]:
    layer = OperatorAttention(16, 2, "galerkin", 1, gain=1.0).double()
    mix = torch.randn(4, 16, dtype=F64)

    def sampled(n: int, summed: bool) -> Tensor:
        at = (torch.arange(n, dtype=F64)[None, :, None] + 0.5) / n
        x = torch.sin(2 * math.pi * at * torch.arange(1, 5)) @ mix
        y = (layer(x, at) - layer.out.bias).detach()
        return (y * n if summed else y)[:, n // 128 :: n // 64]

    def apart(summed: bool) -> float:
        a, b = sampled(64, summed), sampled(576, summed)
        return float((a - b).norm() / a.norm())

    return apart(False), apart(True)


def circle(points: int, count: int) -> Tensor:
    """Coordinates of a periodic interval: (count, points, 2)."""
    angle = 2 * math.pi * torch.arange(points) / points
    return torch.stack((angle.cos(), angle.sin()), -1).expand(count, -1, -1)


def operator_errors(kind: str, steps: int = 450, lr: float = 4e-3) -> tuple[float, float]:
    """Relative errors at 128 and at 256 points after a short run at 128."""
    torch.manual_seed(0)
    model = OperatorModel(dim=32, heads=4, layers=2, kind=kind, pos_dim=2)
    optimiser = torch.optim.Adam(model.parameters(), lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, steps)
    u, w = transport(512, 128, seed=0, modes=3)
    for _ in range(steps):
        pick = torch.randint(512, (16,))
        loss = relative_error(model(u[pick, :, None], circle(128, 16))[..., 0], w[pick])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    errors = []
    for n in (128, 256):
        u, w = transport(64, n, seed=1, modes=3)
        with torch.no_grad():
            errors.append(float(relative_error(model(u[..., None], circle(n, 64))[..., 0], w)))
    return errors[0], errors[1]


@check(
    "galerkin",
    "a short run on transport with smoothing, 128 points: relative error at 256",
    below=0.25,
    control="the input itself, untransported",
)
def _() -> tuple[float, float]:
    here, there = operator_errors("galerkin")
    u, w = transport(64, 256, seed=1, modes=3)
    return there if there < 1.3 * here else math.inf, float(relative_error(u, w))


@check("galerkin", "Burgers and Darcy generators: refining the grid changes the solution by", below=0.05, control="another sample")
def _() -> tuple[float, float]:
    coarse, fine = burgers(4, 128, time=0.2)[1], burgers(4, 256, time=0.2)[1][:, ::2]
    small, large = darcy(3, 15)[1], darcy(3, 45)[1][:, 1::3, 1::3]
    own = max(float(relative_error(coarse, fine)), float(relative_error(small, large)))
    return own, min(float(relative_error(coarse.flip(0), fine)), float(relative_error(small.roll(1, 0), large)))


@check(
    "galerkin",
    "softmax and linear kinds, keys and values of their own sources, norms left out == by hand; projections start near delta I",
    below=1e-10,
    control="keys of x",
)
def _() -> tuple[float, float]:
    x, key, value = torch.randn(3, 2, 20, 16, dtype=F64)
    place, own, other = torch.rand(2, 20, 2, dtype=F64), [], math.inf
    for kind, norm in (("softmax", True), ("linear", True), ("galerkin", False), ("galerkin", True), ("fourier", False)):
        layer = drawn(OperatorAttention(16, 2, kind, 2, norm=norm, norm_eps=0.1))
        where = place[:, None].expand(-1, 2, -1, -1)

        def truth(source: Tensor, layer: OperatorAttention = layer, kind: str = kind, norm: bool = norm, where: Tensor = where) -> Tensor:
            q, k, v = (split(p(y), 2) for p, y in ((layer.q, x), (layer.k, source), (layer.v, value)))
            if kind == "galerkin" and norm:
                sides = ((k, layer.norms["k"]), (v, layer.norms["v"]))
                k, v = (F.layer_norm(y, (8,), eps=0.1) * n.weight + n.bias for y, n in sides)  # type: ignore[operator]
            q, k, v = (torch.cat((where, y), -1) for y in (q, k, v))
            if kind == "softmax":
                o = (q @ k.mT / math.sqrt(10)).softmax(-1) @ v
            elif kind == "linear":
                o = q.softmax(-1) @ (k.softmax(-2).mT @ v) / 20
            else:
                o = (q @ k.mT) @ v / 20 / (math.sqrt(10) if kind == "fourier" else 1)
            return layer.out(joined(o))  # type: ignore[no-any-return]

        own.append(naive.gap(layer(x, place, key, value), truth(key)))
        other = min(other, naive.gap(layer(x, place, key, value), truth(x)))
    start = OperatorAttention(64, 1, gain=0.5, delta=3.0)
    weight = start.q.weight.detach()
    edge = 0.5 * math.sqrt(6 / 128)  # Xavier's uniform range
    off = weight - 3 * torch.eye(64)
    bad = float(off.abs().max() > edge) + float(off.abs().max() < 0.9 * edge) + float(start.q.bias.detach().abs().max())
    return max(bad, *own), other


@check(
    "galerkin",
    "the model == start on values and places, x + attention, x + MLP, end, by hand",
    below=1e-10,
    control="places left out of the start",
)
def _() -> tuple[float, float]:
    model = drawn(OperatorModel(3, 2, dim=16, heads=2, layers=2, pos_dim=1))
    u, place = torch.randn(2, 9, 3, dtype=F64), torch.rand(2, 9, 1, dtype=F64)

    def net(x: Tensor, layers: torch.nn.Module) -> Tensor:
        up, _, down = layers  # type: ignore[misc]
        return silu(x @ up.weight.T + up.bias) @ down.weight.T + down.bias  # type: ignore[has-type, no-any-return]

    def truth(at: Tensor) -> Tensor:
        x = torch.cat((u, at), -1) @ model.start.weight.T + model.start.bias
        for mixer, mlp in zip(model.mixers, model.mlps, strict=True):
            x = x + mixer(x, place)
            x = x + net(x, mlp)
        return net(x, model.end)

    return naive.gap(model(u, place), truth(place)), naive.gap(model(u, place), truth(0 * place))
