"""Mega: a damped moving average in several dimensions, and single-head gated attention over it (id 229; Ma et al., 2022).

EMA: h_t = (p b) x_t + (1 - p a) h_{t-1}, y_t = sum_n c_n h_tn / sqrt(n);   layer: x + u (silu(W_h m + (r A v) U_h) - x), m = EMA(norm x)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.algebra import Causal, FixedBlock, Input, Mask, Modified, Padding, Rope, RowLocal, Weighted
from regard.algebra.part import bind
from regard.catalog.registry import register
from regard.engine.door import attend
from regard.errors import RegardError
from regard.nn.ema import MultiHeadEMA
from regard.nn.parts import head_norm, takes, whole


def relu_squared(s: Tensor) -> Tensor:
    return torch.relu(s).square()


def laplace(s: Tensor, mu: float, sigma: float) -> Tensor:
    """(1 + erf((s - mu) / (sigma sqrt 2))) / 2, which touches relu(s)^2 at s = sqrt(1/2) in value and slope for mu = sqrt(1/2) and
    sigma = sqrt(1 / (4 pi)), here as rounded in the released code."""
    return (1 + torch.erf((s - mu) / (sigma * math.sqrt(2)))) / 2


MU, SIGMA = 0.707107, 0.282095


def with_offsets(s: Tensor, i: Tensor, j: Tensor, offsets: Tensor) -> Tensor:
    """s + b_{i - j}, offsets (2 reach - 1,) with those beyond the reach sharing the outermost."""
    reach = (offsets.shape[0] + 1) // 2
    return s + offsets[(i - j).clamp(1 - reach, reach - 1) + reach - 1]


def mean_with_offsets(s: Tensor, i: Tensor, j: Tensor, n: Tensor, offsets: Tensor) -> Tensor:
    return with_offsets(s / n, i, j, offsets)


def mega_mechanism(kind: str, mask: Mask | None = None) -> Weighted:
    """kind: "softmax" of q.k scale, or "laplace" and "relu2" of q.k / n (n visible keys), elementwise, all plus b_{i - j}."""
    offsets = (Input("offsets", "f"),)
    full = {} if mask is None else {"mask": mask}
    if kind == "softmax":
        return Weighted(position=Modified(with_offsets, offsets), **full)  # type: ignore[arg-type]
    weight: Any = {"laplace": bind(laplace, mu=MU, sigma=SIGMA), "relu2": relu_squared}[kind]
    return Weighted(position=Modified(mean_with_offsets, offsets), normalizer=RowLocal(weight), **full)  # type: ignore[arg-type]


@dataclass
class MegaState:
    """The averages h (B, dim, ndim), and z and v (B, n, .) of the tokens that attention may still read."""

    ema: Tensor
    z: Tensor
    v: Tensor
    length: int

    @property
    def bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in (self.ema, self.z, self.v))


@register("mega", kind="module")
class MegaLayer(nn.Module):
    """x (B, N, dim) -> the same, its residual and update gate inside.

    zdim: width of the shared z that q and k are read from; hdim: of v. ndim: averages a channel. chunk: attention inside chunks of that
    length alone (linear time), None: over everything. attn: "softmax", "laplace" or "relu2". causal, or both directions. ema=False leaves
    the averages out. positions: b_{i-j}, "simple": a table of offsets below `reach`, those beyond share the outermost; "rotary": alpha turned
    by i times beta turned by j, both learned. norm: "layer" or "rms", before everything. truncation: of `MultiHeadEMA`.
    """

    residual = True

    def __init__(
        self,
        dim: int,
        zdim: int = 64,
        hdim: int | None = None,
        ndim: int = 16,
        chunk: int | None = None,
        attn: str = "softmax",
        causal: bool = True,
        reach: int = 1024,
        ema: bool = True,
        positions: str = "simple",
        norm: str = "layer",
        norm_eps: float = 1e-5,
        truncation: int | None = None,
    ):
        super().__init__()
        if attn not in ("softmax", "laplace", "relu2") or positions not in ("simple", "rotary") or norm not in ("layer", "rms"):
            raise RegardError(
                f"attn={attn!r}, positions={positions!r}, norm={norm!r}; expected softmax, laplace or relu2, simple or rotary, layer or rms"
            )
        hdim = hdim or 2 * dim
        self.dim, self.zdim, self.hdim, self.chunk, self.causal, self.attn = dim, zdim, hdim, chunk, causal, attn
        self.norm = head_norm(norm, dim, norm_eps)
        self.ema = MultiHeadEMA(dim, ndim, not causal, truncation=truncation) if ema else None
        self.v, self.m, self.h = nn.Linear(dim, hdim), nn.Linear(dim, zdim + hdim + 2 * dim), nn.Linear(hdim, dim)
        self.kappa, self.mu = nn.Parameter(1 + 0.02 * torch.randn(2, zdim)), nn.Parameter(torch.zeros(2, zdim))
        rotary = positions == "rotary"
        self.offsets = None if rotary else nn.Parameter(0.02 * torch.randn(2 * reach - 1))
        self.alpha, self.beta = (nn.Parameter(0.02 * torch.randn(zdim)) if rotary else None for _ in range(2))
        self.mechanism = mega_mechanism(attn, None if chunk is None else FixedBlock(chunk))

    def parts(self, normed: Tensor, m: Tensor) -> tuple[Tensor, ...]:
        """u, z, r, hx of the averages, and v."""
        u, zr, hx = self.m(m).split([self.dim, self.zdim + self.hdim, self.dim], -1)
        z, r = F.silu(zr).split([self.zdim, self.hdim], -1)
        return torch.sigmoid(u), z, r, hx, F.silu(self.v(normed))

    def table(self, length: int) -> Tensor:
        """b of offsets 1 - length .. length - 1, or what there is of them."""
        if self.offsets is not None:
            return self.offsets
        assert self.alpha is not None and self.beta is not None
        apart = torch.arange(1 - length, length, device=self.alpha.device)
        return Rope().rotate(self.alpha.expand(len(apart), -1), apart) @ self.beta

    def attended(self, z_q: Tensor, z: Tensor, v: Tensor, keep: Tensor | None = None) -> Tensor:
        q, k = (self.kappa[0] * z_q + self.mu[0]), (self.kappa[1] * z + self.mu[1])
        scale = self.zdim**-0.5 if self.attn == "softmax" else 1.0
        mask: Mask | None = Causal() if self.causal else None
        if keep is not None:
            mask = Padding() if mask is None else mask & Padding()
        given: dict[str, Any] = {"offsets": self.table(z.shape[1])} | ({} if keep is None else {"keep": keep})
        return attend(q[:, None], k[:, None], v[:, None], self.mechanism, mask=mask, scale=scale, **given)[:, 0]

    def close(self, x: Tensor, u: Tensor, r: Tensor, hx: Tensor, out: Tensor) -> Tensor:
        h = F.silu(hx + self.h(r * out))
        return x + u * (h - x)

    @takes(x="batch length dim")
    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """keep (B, N) bool: what is no padding."""
        normed = self.norm(x)
        u, z, r, hx, v = self.parts(normed, normed if self.ema is None else self.ema(normed, keep))
        return self.close(x, u, r, hx, self.attended(z, z, v, keep))

    @whole
    @takes(x="batch length dim")
    def step(self, x: Tensor, state: MegaState | None = None) -> tuple[Tensor, MegaState]:
        """New tokens (B, n, dim) after those in `state`; equal to `forward` over all of them."""
        if not self.causal:
            raise RegardError("step needs causal=True: without it earlier outputs would change with every token")
        read = 0 if state is None else state.length
        room = x.shape[1] if self.chunk is None else self.chunk - read % self.chunk
        if x.shape[1] > room:  # up to the chunk's end, then the rest
            first, state = self.step(x[:, :room], state)
            rest, state = self.step(x[:, room:], state)
            return torch.cat((first, rest), 1), state
        normed = self.norm(x)
        if self.ema is None:
            m, ema = normed, x.new_zeros(len(x), 0, 0)
        else:
            m, ema = self.ema.step(normed, None if state is None else state.ema)
        u, z, r, hx, v = self.parts(normed, m)
        fresh = state is None or (self.chunk is not None and read % self.chunk == 0)
        all_z, all_v = (z, v) if fresh or state is None else (torch.cat((state.z, z), 1), torch.cat((state.v, v), 1))
        out = self.attended(z, all_z, all_v)
        return self.close(x, u, r, hx, out), MegaState(ema, all_z, all_v, read + x.shape[1])
