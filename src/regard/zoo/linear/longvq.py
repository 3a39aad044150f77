"""LongVQ: Mega's gated unit with attention over quantised keys (id 165; Liu et al., 2024).

y = x + u (silu(x' W_h + (r o) U_h) - x),   x' = EMA(norm x),   o: softmax attention over quantised keys
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.catalog.registry import register
from regard.errors import RegardError
from regard.nn.codes import Codebook, CodeState, code_attention, code_step, normed, pieces
from regard.nn.ema import MultiHeadEMA
from regard.nn.parts import Momentary, takes, whole


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
class LongVQBlock(Momentary):
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

    @takes(x="batch length dim")
    def forward(self, x: Tensor) -> Tensor:
        normal = self.norm(x)
        u, r, hx, q, k, v = self.parts(normal, self.ema(normal))
        o, which = code_attention(q, k, v, self.codebook.codes, self.block, self.bias(), causal=self.causal)
        self.commitment = self.codebook.commitment(k, which)
        if self.training:
            self.codebook.update(k, which)
        return self.close(x, u, r, hx, o)

    @whole
    @takes(x="batch length dim")
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
