"""Shaped attention: centred at the identity, with a temperature that grows with width (id 65; Noci et al., 2023).

A = I + softmax(Y / (tau0 sqrt(width))) - 1/m 11^T,   Y = q.k / sqrt(D)        under a mask 1/m is 1 / n_i on the visible keys

`ShapedBlock` trains; `Layer` is its theory's random layer, without parameters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from regard.algebra import Dot, RowWise, Weighted, bind, row_count, row_softmax
from regard.catalog.registry import register
from regard.engine.door import attend
from regard.errors import RegardError
from regard.nn.attention import Attention


def shaped(s: Tensor, seen: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return (i == j).to(s.dtype) + row_softmax(s, seen) - 1 / row_count(seen, s)


def cooled(n: Tensor, factor: float) -> Tensor:
    return torch.full_like(n, factor)


@register("shaped-transformer")
def shaped_attention(width: int = 128, tau0: float = 1.0) -> Weighted:
    """width: channels of the model, whose square root the logits are divided by once more. The layer's residual branch should be weighted:
    lambda x + gamma A x W with lambda^2 + gamma^2 = 1 (`regard.zoo.softmax.shaped_transformer`)."""
    if width < 1 or tau0 <= 0:
        raise RegardError(f"width={width}, tau0={tau0}: expected positive numbers")
    return Weighted(score=Dot(bind(cooled, factor=1 / (tau0 * width**0.5))), normalizer=RowWise(shaped))


def moments(v: Tensor) -> tuple[Tensor, Tensor]:
    """S1[a, d, b, w] and S2[a, d] of a covariance V (m, m)."""
    mean = v.mean(-1)
    centre = v.mean()
    diagonal = v.diagonal()
    s1 = v[:, None, :, None] * (v[None, :, None, :] - mean[None, :, None, None] - mean[None, None, None, :] + centre)
    s2 = diagonal[:, None] * (diagonal[None] - 2 * mean[None] + 2 * centre - diagonal.mean())
    return s1, s2


def drift(v: Tensor, gamma: float = 0.5, tau0: float = 1.0, relu: tuple[float, float] | None = None) -> Tensor:
    """b(V) (m, m). relu: slopes (c_+, c_-) of a shaped-ReLU network after the attention, whose drift is added."""
    m = len(v)
    s1, s2 = moments(v)
    first = torch.einsum("vk,avbk->ab", v, s1) / m**2
    second = torch.einsum("bv,av->ab", v, s2) / (2 * m)
    b = gamma**2 / tau0**2 * (first + second + second.T)
    if relu is None:
        return b
    size = (v.diagonal()[:, None] * v.diagonal()).sqrt()
    rho = (v / size).clamp(-1, 1)
    return b + (relu[0] - relu[1]) ** 2 / (2 * math.pi) * ((1 - rho * rho).sqrt() - rho * torch.arccos(rho)) * size


def diffusion(v: Tensor, gamma: float = 0.5, tau0: float = 1.0, mlp: bool = False) -> Tensor:
    """Sigma(V)[a, b, d, w]; mlp: with the linear layer's own V_ad V_bw + V_aw V_bd."""
    m = len(v)
    s1, _ = moments(v)
    pairs = torch.einsum("ad,bw->abdw", v, v) + torch.einsum("aw,bd->abdw", v, v)
    mixed = (
        torch.einsum("ak,dv,bkwv->abdw", v, v, s1)
        + torch.einsum("ak,wv,bkdv->abdw", v, v, s1)
        + torch.einsum("bk,dv,akwv->abdw", v, v, s1)
        + torch.einsum("bk,wv,akdv->abdw", v, v, s1)
    )
    sigma = gamma**2 * (2 - gamma**2) * pairs + gamma**4 / tau0**2 * mixed / m**2
    return sigma + pairs if mlp else sigma


def simulate(start: Tensor, time: float, steps: int = 200, gamma: float = 0.5, tau0: float = 1.0, seed: int = 0) -> Tensor:
    """Euler-Maruyama path (steps + 1, m, m) of the covariance from `start`."""
    generator, dt = torch.Generator().manual_seed(seed), time / steps
    m, path = len(start), [start.double()]
    for _ in range(steps):
        v = path[-1]
        sigma = diffusion(v, gamma, tau0).reshape(m * m, m * m)
        values, vectors = torch.linalg.eigh((sigma + sigma.T) / 2)
        noise = vectors @ (values.clamp_min(0).sqrt() * torch.randn(m * m, generator=generator, dtype=torch.float64))
        new = v + drift(v, gamma, tau0) * dt + noise.view(m, m) * math.sqrt(dt)
        path.append((new + new.T) / 2)
    return torch.stack(path)


@dataclass(frozen=True)
class Layer:
    """One random layer of width n: X' = lambda X + gamma A X W_V / sqrt(n), all weights N(0, 1), on x (draws, m, n). kind: "shaped" or "softmax"."""

    gamma: float = 0.5
    tau0: float = 1.0
    kind: str = "shaped"
    key_dim: int = 32

    def mechanism(self, width: int) -> Weighted:
        return shaped_attention(width, self.tau0) if self.kind == "shaped" else Weighted()

    def queries_and_keys(self, x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(draws, 1, m, key_dim) each: random projections of tokens (draws, m, n)."""
        draws, _, n = x.shape
        weight = torch.randn(2, draws, n, self.key_dim, generator=generator, dtype=x.dtype)
        q, k = x @ weight / math.sqrt(n)
        return q[:, None], k[:, None]

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        draws, _, n = x.shape
        q, k = self.queries_and_keys(x, generator)
        value = x @ torch.randn(draws, n, n, generator=generator, dtype=x.dtype) / math.sqrt(n)
        branch = attend(q, k, value[:, None], self.mechanism(n))[:, 0]
        return math.sqrt(1 - self.gamma**2) * x + self.gamma * branch


def covariance(x: Tensor) -> Tensor:
    """<x_a, x_b> / n of tokens (..., m, n)."""
    return x @ x.transpose(-1, -2) / x.shape[-1]


def measured_drift(x: Tensor, layer: Layer, draws: int = 8000, seed: int = 0) -> Tensor:
    """n (E[V'] - V) of one layer at tokens x (m, n): E over W_V is exact, lambda^2 V + gamma^2 A V A^T, and W_Q, W_K are drawn in antithetic
    pairs (+-W_Q), which cancel what is of first order in the logits."""
    generator, batch, v = torch.Generator().manual_seed(seed), 500, covariance(x)
    total, eye = torch.zeros_like(v), torch.eye(len(x), dtype=x.dtype).expand(batch, 1, -1, -1)
    rounds = max(1, draws // (2 * batch))
    for _ in range(rounds):
        q, k = layer.queries_and_keys(x.expand(batch, -1, -1), generator)
        for side in (q, -q):
            a = attend(side, k, eye, layer.mechanism(x.shape[1]))[:, 0]
            total += (a @ v @ a.transpose(-1, -2)).sum(0)
    return x.shape[1] * layer.gamma**2 * (total / (2 * batch * rounds) - v)


def token_cosine(kind: str, depth: int = 64, width: int = 128, tokens: int = 8, seeds: int = 6, gamma: float = 0.5) -> float:
    """Mean |cos| between tokens after `depth` random layers: near 1 means that rank has collapsed."""
    generator = torch.Generator().manual_seed(0)
    x, layer = torch.randn(seeds, tokens, width, generator=generator, dtype=torch.float64), Layer(gamma, kind=kind)
    for _ in range(depth):
        x = layer(x, generator)
        x = x / x.square().mean((-1, -2), keepdim=True).sqrt()
    unit = torch.nn.functional.normalize(x, dim=-1)
    cosines = (unit @ unit.transpose(-1, -2)).abs()
    return float((cosines.sum((-1, -2)) - tokens).mean() / (tokens * (tokens - 1)))


class ShapedBlock(nn.Module):
    """x (B, m, dim) -> lam x + gamma attention(x), then lam x + gamma W_2 act(W_1 x), lam^2 + gamma^2 = 1: no norms, and none are needed.

    Weights start from N(0, 1 / fan in), W_2's over E act(g)^2 of a normal g, so that deep stacks keep tokens apart and their size. act: a shaped ReLU with slopes
    1 + c_+ / sqrt(dim) above 0 and 1 + c_- / sqrt(dim) below. hidden: width between W_1 and W_2 (None: dim).
    """

    def __init__(
        self, dim: int, heads: int = 1, *, gamma: float = 0.5, tau0: float = 1.0, slopes: tuple[float, float] = (0.0, -1.0),
        hidden: int | None = None, causal: bool = False,
    ):  # fmt: skip
        super().__init__()
        if not 0 < gamma < 1:
            raise RegardError(f"gamma={gamma}: expected a number between 0 and 1")
        hidden = hidden or dim
        self.gamma, self.keep, self.slopes = gamma, math.sqrt(1 - gamma**2), tuple(1 + c / math.sqrt(dim) for c in slopes)
        self.attention = Attention(dim, heads, shaped_attention(dim, tau0), causal=causal)
        self.attention.out = nn.Identity()  # type: ignore[assignment]  # values are projected once: A x W_V
        self.up, self.down = nn.Linear(dim, hidden, bias=False), nn.Linear(hidden, dim, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all weights anew."""
        lost = sum(slope**2 for slope in self.slopes) / 2  # E shaped(g)^2 of a normal g, which the last matrix gives back
        for part in (self.attention.q, self.attention.k, self.attention.v, self.up, self.down):
            nn.init.normal_(part.weight, std=(part.in_features * (lost if part is self.down else 1)) ** -0.5)

    def shaped(self, x: Tensor) -> Tensor:
        above, below = self.slopes
        return torch.where(x > 0, above * x, below * x)

    def forward(self, x: Tensor) -> Tensor:
        x = self.keep * x + self.gamma * self.attention(x)
        return self.keep * x + self.gamma * self.down(self.shaped(self.up(x)))  # type: ignore[no-any-return]
