"""Layers over quantised keys: Transformer-VQ (id 100; Lingle, 2023) and LongVQ (id 165; Liu et al., 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..catalog.registry import register
from ..errors import RegardError
from ..mechanisms.reduced.codes import CodeState, code_attention, code_step, pieces
from .mega import MultiHeadEMA


class Codebook(nn.Module):
    """Codes (heads, codes, width) moved towards the keys they stand for by running averages: C = sum / max(count, 0.01).

    decay: of the averages. `quantisation(k)` is the mean of |k - C_z|^2, whose gradient pulls keys to their codes.
    """

    codes: Tensor
    sums: Tensor
    counts: Tensor

    def __init__(self, heads: int, codes: int, width: int, decay: float = 0.99, floor: float = 0.01):
        super().__init__()
        start = torch.randn(heads, codes, width) * width**-0.25
        self.decay, self.floor = decay, floor
        for name, x in (("codes", start), ("sums", start.clone()), ("counts", torch.ones(heads, codes))):
            self.register_buffer(name, x)

    def commitment(self, k: Tensor, which: Tensor) -> Tensor:
        """|k - C_z|^2 of keys k (B, H, N, D) with codes `which` (B, H, N), summed over heads, mean over batch and tokens."""
        heads = torch.arange(len(self.codes), device=k.device)[:, None]
        return (k - self.codes[heads, which].detach()).square().sum((1, 3)).mean()

    @torch.no_grad()
    def update(self, k: Tensor, which: Tensor) -> None:
        """Move the averages by these keys."""
        kind = F.one_hot(which, self.codes.shape[1]).to(k.dtype)
        count, total = kind.sum((0, 2)), torch.einsum("bhns,bhnd->hsd", kind, k)
        self.counts.mul_(self.decay).add_((1 - self.decay) * count)
        self.sums.mul_(self.decay).add_((1 - self.decay) * total)
        self.codes = self.sums / self.counts.clamp_min(self.floor)[..., None]  # not in place: the pass just made still needs the old ones


def normed(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / rms(x) * D^(-1/4): two such vectors have a product of scale D^(-1/2)."""
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * x.shape[-1] ** -0.25


def sinusoids(count: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(count, width): sines and cosines of distances 0 .. count - 1."""
    rates = 10000 ** (-torch.arange(0, width, 2, dtype=torch.float64, device=device) / width)
    angle = torch.arange(count, dtype=torch.float64, device=device)[:, None] * rates
    return torch.cat((angle.sin(), angle.cos()), -1)[:, :width].to(dtype)


@register("transformer-vq", kind="module")
class VQAttention(nn.Module):
    """x (B, N, dim) -> (B, N, dim): causal softmax attention over quantised keys with Transformer-XL positions near by, gated.

    heads: of width key_dim each (None: dim / heads); values are value_dim wide over all heads (None: 2 dim). codes: S a head. block: L.
    memory: M, tokens before a block that are read one by one, and pass gradients to their keys (None: block). reach: distances with a
    position term (None: M + 1, that is i - j <= M). aggregate False: only tokens with i - j <= M are read. After a pass `commitment` holds the loss to be added times 1e-4; in training the codebook follows its keys.
    """

    commitment: Tensor

    def __init__(
        self,
        dim: int,
        heads: int = 1,
        codes: int = 512,
        block: int = 512,
        key_dim: int | None = None,
        value_dim: int | None = None,
        reach: int | None = None,
        memory: int | None = None,
        aggregate: bool = True,
    ):
        super().__init__()
        key_dim, value_dim = key_dim or dim // heads, value_dim or 2 * dim
        if value_dim % heads:
            raise RegardError(f"value_dim={value_dim} is not a multiple of heads={heads}")
        self.heads, self.block, self.memory = heads, block, block if memory is None else memory
        self.reach = self.memory + 1 if reach is None else reach
        self.near = {"memory": self.memory, "aggregate": aggregate}
        self.q, self.k, self.r = (nn.Linear(dim, heads * key_dim, False) for _ in range(3))
        self.v, self.gate, self.out = nn.Linear(dim, value_dim, False), nn.Linear(dim, value_dim, False), nn.Linear(value_dim, dim, False)
        self.u, self.w = (nn.Parameter(0.02 * torch.randn(heads, 1, key_dim)) for _ in range(2))
        self.codebook = Codebook(heads, codes, key_dim)
        self.key_dim = key_dim

    def heads_of(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q + u, k, v and the bias of near distances."""
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (self.q(x), self.k(x), F.silu(self.v(x))))
        q, k, share = normed(q), normed(k), self.key_dim**-0.25
        places = self.r(sinusoids(self.reach, x.shape[-1], x.device, x.dtype)).unflatten(-1, (self.heads, -1)).transpose(0, 1) * share
        return q + share * self.u, k, v, (q + share * self.w) @ places.mT

    def close(self, o: Tensor, x: Tensor) -> Tensor:
        return self.out(o.transpose(1, 2).flatten(-2) * F.silu(self.gate(x)))  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, bias = self.heads_of(x)
        o, which = code_attention(q, k, v, self.codebook.codes, self.block, bias, **self.near)  # type: ignore[arg-type]
        self.commitment = self.codebook.commitment(k, which)
        if self.training:
            self.codebook.update(k, which)
        return self.close(o, x)

    def step(self, x: Tensor, state: CodeState | None = None) -> tuple[Tensor, CodeState]:
        """New tokens (B, n, dim) after those in `state`; equal to `forward` in eval over all of them."""
        q, k, v, bias = self.heads_of(x)
        outs, codes = [], self.codebook.codes
        for at in pieces(x.shape[1], 0 if state is None else state.length, self.block):
            o, state = code_step(q[:, :, at], k[:, :, at], v[:, :, at], codes, state, self.block, bias[:, :, at], **self.near)  # type: ignore[arg-type]
            outs.append(o)
        assert state is not None
        return self.close(torch.cat(outs, 2), x), state


@dataclass
class LongVQState:
    """The averages h (B, dim, ndim), the codes' counts and sums, and the last two blocks."""

    ema: Tensor
    codes: CodeState

    @property
    def bytes(self) -> int:
        return self.ema.numel() * self.ema.element_size() + self.codes.bytes

    @property
    def length(self) -> int:
        return self.codes.length


@register("longvq", kind="module")
class LongVQBlock(nn.Module):
    """x (B, N, dim) -> (B, N, dim): y = x + u (silu(x' W_h + (r o) U_h) - x), x' = EMA(norm x), o softmax attention over quantised keys.

    zdim: width of the shared z that q and k are read from; hdim: of v. codes: S. window: distances with a learned bias (causal only), block:
    tokens read one by one in blocks, at least window - 1. After a pass `commitment` holds the loss to be added times 1e-4.
    """

    residual = True

    commitment: Tensor

    def __init__(
        self,
        dim: int,
        codes: int = 512,
        zdim: int = 64,
        hdim: int | None = None,
        ndim: int = 16,
        window: int = 64,
        block: int | None = None,
        causal: bool = True,
    ):
        super().__init__()
        hdim, block = hdim or 2 * dim, block or window
        if window > block + 1:
            raise RegardError(f"window={window}: expected at most block + 1 = {block + 1}")
        self.dim, self.zdim, self.hdim, self.block, self.causal = dim, zdim, hdim, block, causal
        self.norm = nn.RMSNorm(dim, eps=1e-6)
        self.ema = MultiHeadEMA(dim, ndim, bidirectional=not causal)
        self.v, self.m, self.h = nn.Linear(dim, hdim), nn.Linear(dim, zdim + hdim + 2 * dim), nn.Linear(hdim, dim, False)
        self.kappa, self.mu = nn.Parameter(1 + 0.02 * torch.randn(2, zdim)), nn.Parameter(torch.zeros(2, zdim))
        self.offsets = nn.Parameter(torch.zeros(window)) if causal else None
        self.codebook = Codebook(1, codes, zdim)

    def parts(self, x: Tensor, m: Tensor) -> tuple[Tensor, ...]:
        """u, r, hx, and q, k, v of one head."""
        u, zr, hx = self.m(m).split([self.dim, self.zdim + self.hdim, self.dim], -1)
        z, r = F.silu(zr).split([self.zdim, self.hdim], -1)
        q, k = (normed(self.kappa[at] * z + self.mu[at])[:, None] for at in (0, 1))
        return torch.sigmoid(u), r, hx, q, k, F.silu(self.v(x))[:, None]

    def close(self, x: Tensor, u: Tensor, r: Tensor, hx: Tensor, o: Tensor) -> Tensor:
        h = F.silu(hx + self.h(r * o[:, 0]))
        return x + u * (h - x)

    def bias(self) -> Tensor | None:
        return None if self.offsets is None else self.offsets[None, None, None]

    def forward(self, x: Tensor) -> Tensor:
        normal = self.norm(x)
        u, r, hx, q, k, v = self.parts(normal, self.ema(normal))
        o, which = code_attention(q, k, v, self.codebook.codes, self.block, self.bias(), causal=self.causal)
        self.commitment = self.codebook.commitment(k, which)
        if self.training:
            self.codebook.update(k, which)
        return self.close(x, u, r, hx, o)

    def step(self, x: Tensor, state: LongVQState | None = None) -> tuple[Tensor, LongVQState]:
        """New tokens (B, n, dim) after those in `state`; equal to `forward` in eval over all of them."""
        if not self.causal:
            raise RegardError("step needs causal=True: without it earlier outputs would change with every token")
        normal = self.norm(x)
        m, ema = self.ema.step(normal, None if state is None else state.ema)
        u, r, hx, q, k, v = self.parts(normal, m)
        codes: Any = None if state is None else state.codes
        outs = []
        for at in pieces(x.shape[1], 0 if codes is None else codes.length, self.block):
            o, codes = code_step(q[:, :, at], k[:, :, at], v[:, :, at], self.codebook.codes, codes, self.block, self.bias())
            outs.append(o)
        return self.close(x, u, r, hx, torch.cat(outs, 2)), LongVQState(ema, codes)
