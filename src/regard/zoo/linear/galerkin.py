"""Galerkin and Fourier attention: no softmax, sums over points as integrals (id 69; Cao, 2021).

galerkin: o = q (k^T v) / n;   fourier: o = (q k^T / sqrt(D)) v / n;   linear: softmax_d(q) (softmax_n(k)^T v) / n
Losses: `regard.tasks.operators.relative_error` (L2) and `h1_error`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from regard.algebra import FeatureMap, Recipe, Recurrent, RowLocal, Weighted, identity
from regard.algebra.feature_map import over_channels
from regard.algebra.readouts import over_count
from regard.catalog import get
from regard.catalog.registry import register
from regard.engine.door import attend
from regard.errors import RegardError
from regard.nn.spectral import SpectralRegressor


def integral(s: Tensor, n: Tensor) -> Tensor:
    return s / n


@register("galerkin")
def galerkin(kind: str = "galerkin") -> Recurrent | Weighted:
    """kind: "galerkin", "fourier" or "linear". The norms of K and V (or Q and K), the coordinates and the start of the projections belong to
    `regard.nn.OperatorAttention`."""
    if kind not in ("galerkin", "fourier", "linear"):
        raise RegardError(f"kind={kind!r}; expected galerkin, fourier or linear")
    recipe = Recipe(rope=False)
    if kind == "fourier":
        return Weighted(normalizer=RowLocal(integral), recipe=recipe)
    if kind == "linear":
        return Recurrent(FeatureMap(over_channels, identity), keys="softmax", readout=over_count, scaled=False, recipe=recipe)
    return Recurrent(readout=over_count, scaled=False, recipe=recipe)


def diagonal_start(layer: nn.Linear, gain: float, delta: float) -> nn.Linear:
    """W = gain xavier + delta I, zero bias: small, and not far from leaving its input alone."""
    nn.init.xavier_uniform_(layer.weight, gain)
    with torch.no_grad():
        layer.weight.add_(delta * torch.eye(*layer.weight.shape))
    nn.init.zeros_(layer.bias)
    return layer


class HeadNorms(nn.Module):
    """LayerNorm with its own affine for every head: (B, H, n, D) -> the same."""

    def __init__(self, heads: int, width: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight, self.bias = nn.Parameter(torch.ones(heads, 1, width)), nn.Parameter(torch.zeros(heads, 1, width))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, x.shape[-1:], eps=self.eps) * self.weight + self.bias


class OperatorAttention(nn.Module):
    """Samples of a function x (B, n, dim) and where they stand, place (B, n, pos_dim) -> (B, n, dim). No softmax; sums are means over the
    points, so results do not depend on the resolution.

    kind: "galerkin" (linear), "fourier" (quadratic), "linear" (softmax over channels of Q and over points of K) or "softmax". gain,
    delta: the start of the projections. norm: the LayerNorms a head, of K and V (galerkin) or Q and K (fourier), norm_eps theirs.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        kind: str = "galerkin",
        pos_dim: int = 1,
        gain: float = 1e-2,
        delta: float = 1e-2,
        norm: bool = True,
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        if dim % heads:
            raise RegardError(f"dim={dim} is not a multiple of heads={heads}")
        self.heads, self.kind, self.pos_dim = heads, kind, pos_dim
        self.mechanism = get("softmax") if kind == "softmax" else get("galerkin", kind=kind)
        self.q, self.k, self.v = (diagonal_start(nn.Linear(dim, dim), gain, delta) for _ in range(3))
        normed = {"galerkin": "kv", "fourier": "qk"}.get(kind, "") if norm else ""
        self.norms = nn.ModuleDict({name: HeadNorms(heads, dim // heads, norm_eps) for name in normed})
        self.out = nn.Linear(dim + heads * pos_dim, dim)

    def forward(self, x: Tensor, place: Tensor, key: Tensor | None = None, value: Tensor | None = None) -> Tensor:
        """key, value (B, n, dim): what K and V are made of (None: x)."""
        if place.shape != (*x.shape[:2], self.pos_dim):
            raise RegardError(f"place has shape {tuple(place.shape)}; expected {(*x.shape[:2], self.pos_dim)}: one point a sample")
        sources = {"q": x, "k": x if key is None else key, "v": x if value is None else value}
        made = {name: getattr(self, name)(sources[name]).unflatten(-1, (self.heads, -1)).transpose(1, 2) for name in "qkv"}
        made = {name: self.norms[name](y) if name in self.norms else y for name, y in made.items()}
        where = place[:, None].expand(-1, self.heads, -1, -1)
        q, k, v = (torch.cat((where, made[name]), -1) for name in "qkv")
        out = attend(q, k, v, self.mechanism)
        return self.out(out.transpose(1, 2).flatten(-2))  # type: ignore[no-any-return]


class OperatorModel(nn.Module):
    """A function's samples u (B, n, inputs) at place (B, n, pos_dim) -> another's (B, n, outputs), at any resolution.

    Layers of x + attention(x), x + mlp(x), without norms before them: the ones inside must be able to rescale. regressor: behind them, "pointwise" (an
    MLP) or "spectral" (convolutions of `modes` frequencies over a grid of pos_dim directions, which the points must be, a square one in two).
    """

    def __init__(
        self, inputs: int = 1, outputs: int = 1, dim: int = 32, heads: int = 2, layers: int = 2, kind: str = "galerkin", pos_dim: int = 1,
        regressor: str = "pointwise", modes: int = 8,
    ):  # fmt: skip
        super().__init__()
        if regressor not in ("pointwise", "spectral"):
            raise RegardError(f"regressor={regressor!r}; expected pointwise or spectral")
        self.start = nn.Linear(inputs + pos_dim, dim)
        self.mixers = nn.ModuleList([OperatorAttention(dim, heads, kind, pos_dim) for _ in range(layers)])
        self.mlps = nn.ModuleList([nn.Sequential(nn.Linear(dim, 2 * dim), nn.SiLU(), nn.Linear(2 * dim, dim)) for _ in range(layers)])
        self.end: nn.Module = nn.Sequential(nn.Linear(dim, 2 * dim), nn.SiLU(), nn.Linear(2 * dim, outputs))
        if regressor == "spectral":
            self.end = SpectralRegressor(dim, outputs, modes, directions=pos_dim)

    def forward(self, u: Tensor, place: Tensor) -> Tensor:
        x = self.start(torch.cat((u, place), -1))
        for mixer, mlp in zip(self.mixers, self.mlps, strict=True):
            x = x + mixer(x, place)
            x = x + mlp(x)
        return self.end(x)  # type: ignore[no-any-return]
