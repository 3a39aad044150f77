"""Key and value biases: a learned pair a head that every query may attend to, so that no token need be a sink (Gu et al., 2024; id 42)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..algebra import Mechanism
from .attention import Attention


class KeyValueBias(Attention):
    """`Attention` with one more key k* and value v* a head, without query and position. value=False: v* is 0 ("K-bias").

    With v* = 0 and softmax this is the null logit q.k*: p_ij = e^{s_ij} / (e^{s_i*} + sum_j e^{s_ij}).
    """

    def __init__(self, dim: int, heads: int, mechanism: str | Mechanism = "softmax", *, value: bool = True, **options: Any):
        super().__init__(dim, heads, mechanism, **options)
        self.key_bias = nn.Parameter(torch.randn(self.kv_heads, self.key_dim) * 0.02)
        self.value_bias = nn.Parameter(torch.zeros(self.kv_heads, self.value_dim), requires_grad=value)

    def heads_of(
        self,
        x: Tensor,
        source: Tensor,
        position: int | Tensor,
        conv: tuple[Tensor, ...] | None,
        documents: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
        q, k, v, tails = super().heads_of(x, source, position, conv, documents)
        first = position if isinstance(position, int) else int(position[0])
        if first == 0:  # in a stream the pair is read once, before the first token
            k, v = (
                torch.cat((bias.expand(x.shape[0], *bias.shape)[:, :, None], y), 2)
                for bias, y in ((self.key_bias, k), (self.value_bias, v))
            )
        return q, k, v, tails
