"""Transformer-VQ: softmax attention over quantised keys in linear time (id 100; Lingle, 2023).

o_i = [sum_recent e^{a_ij} v_j + sum_s c_s e^{q_i.C_s} m_s] / [sum_recent e^{a_ij} + sum_s c_s e^{q_i.C_s}],  c_s, m_s: count and mean value of code s
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.catalog.registry import register
from regard.errors import RegardError
from regard.nn.codes import Codebook, CodeState, code_attention, code_step, normed, pieces
from regard.nn.parts import Momentary, takes, whole


def sinusoids(count: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(count, width): sines and cosines of distances 0 .. count - 1."""
    rates = 10000 ** (-torch.arange(0, width, 2, dtype=torch.float64, device=device) / width)
    angle = torch.arange(count, dtype=torch.float64, device=device)[:, None] * rates
    return torch.cat((angle.sin(), angle.cos()), -1)[:, :width].to(dtype)


@register("transformer-vq", kind="module")
class VQAttention(Momentary):
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
        self.dim = dim
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

    @takes(x="batch length dim")
    def forward(self, x: Tensor) -> Tensor:
        q, k, v, bias = self.heads_of(x)
        o, which = code_attention(q, k, v, self.codebook.codes, self.block, bias, **self.near)  # type: ignore[arg-type]
        self.commitment = self.codebook.commitment(k, which)
        if self.training:
            self.codebook.update(k, which)
        return self.close(o, x)

    @whole
    @takes(x="batch length dim")
    def step(self, x: Tensor, state: CodeState | None = None) -> tuple[Tensor, CodeState]:
        """New tokens (B, n, dim) after those in `state`; equal to `forward` in eval over all of them."""
        q, k, v, bias = self.heads_of(x)
        outs, codes = [], self.codebook.codes
        for at in pieces(x.shape[1], 0 if state is None else state.length, self.block):
            o, state = code_step(q[:, :, at], k[:, :, at], v[:, :, at], codes, state, self.block, bias[:, :, at], **self.near)  # type: ignore[arg-type]
            outs.append(o)
        assert state is not None
        return self.close(torch.cat(outs, 2), x), state
