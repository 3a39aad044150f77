"""Optimised, Efficient and Super attention: fewer projections than the standard layer (id 28; Hosseini & Hosseini, 2024).

    S_h = softmax(Q_h K_h^T / sqrt(D)),  o = concat_h(S_h V_h) W_O
    standard: Q, K, V projected;  optimised: V_h = X_h;  efficient: K_h = V_h = X_h;  super: K_h = X_h, V_h = W_A X_h
X_h are the head's columns of x, W_A mixes positions and is shared by heads.

A classifier of sequences: `regard.nn.SequenceClassifier([FrugalAttention(...), ...], classes=...)`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from regard.algebra import Causal, Mask, Padding
from regard.catalog.registry import register
from regard.engine import step
from regard.engine.door import attend
from regard.engine.stream import State
from regard.errors import RegardError
from regard.nn.parts import takes, whole


@register("super-attention", kind="module")
class FrugalAttention(nn.Module):
    """x (B, L, dim) -> (B, L, dim). kind: "standard", "optimised", "efficient" or "super".

    length: the fixed L of "super"; shorter inputs use the leading corner of W_A. causal: with a lower-triangular W_A.
    start: of W_A, "eye" or "xavier". bias: of the projections; mix_bias: a number a position, added to what W_A mixes. Parameters without bias: 4, 3, 2 dim^2, and 2 dim^2 + L^2.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        kind: str = "super",
        *,
        length: int | None = None,
        causal: bool = False,
        start: str = "xavier",
        bias: bool = False,
        mix_bias: bool = False,
    ):
        super().__init__()
        self.dim = dim
        kinds = ("standard", "optimised", "efficient", "super")
        if kind not in kinds or start not in ("eye", "xavier"):
            raise RegardError(f"kind={kind!r}, start={start!r}; expected kind from {', '.join(kinds)} and start eye or xavier")
        if dim % heads:
            raise RegardError(f"dim={dim} is not a multiple of heads={heads}")
        if kind == "super" and length is None:
            raise RegardError("kind='super' mixes positions by a matrix of a fixed size; pass length=...")
        self.kind, self.heads, self.causal, self.length = kind, heads, causal, length
        self.q, self.out = nn.Linear(dim, dim, bias), nn.Linear(dim, dim, bias)
        self.k = nn.Linear(dim, dim, bias) if kind in ("standard", "optimised") else None
        self.v = nn.Linear(dim, dim, bias) if kind == "standard" else None
        self.mix = self.mix_bias = None
        if mix_bias and kind != "super":
            raise RegardError(f"mix_bias=True: kind={kind!r} mixes no positions; expected kind='super'")
        if kind == "super" and length is not None:
            self.mix = nn.Parameter(torch.eye(length) if start == "eye" else nn.init.xavier_uniform_(torch.empty(length, length)))
            self.mix_bias = nn.Parameter(torch.zeros(length)) if mix_bias else None

    @property
    def parameter_count(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def operations(self, length: int) -> int:
        """Multiplications and additions of a sequence of `length` tokens, two a product, softmax left out: 2 L dim^2 a projection, 2 L^2 dim for
        scores, for values and (super) for mixing positions, of which causal layers need half of the pairs, (L + 1) / 2L."""
        projections = sum(part is not None for part in (self.q, self.out, self.k, self.v))
        pairs = length * (length + 1) // 2 if self.causal else length * length
        return 2 * length * self.dim**2 * projections + 2 * pairs * self.dim * (2 + (self.mix is not None))

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def mixed(self, v: Tensor, rows: slice) -> Tensor:
        """Rows of W_A v + b, v (B, Lk, dim)."""
        out = self.mixing(rows, v.shape[1]) @ v
        return out if self.mix_bias is None else out + self.mix_bias[rows, None]

    def mixing(self, queries: slice, keys: int) -> Tensor:
        assert self.mix is not None and self.length is not None
        if keys > self.length:
            raise RegardError(f"{keys} tokens, but this layer mixes length={self.length} positions")
        corner = self.mix.tril() if self.causal else self.mix
        return corner[queries, :keys]

    @takes(x="batch tokens dim")
    def forward(self, x: Tensor, context: Tensor | None = None, keep: Tensor | None = None, value: Tensor | None = None) -> Tensor:
        """context (B, Lk, dim): what keys are read from, and values unless `value` (B, Lk, dim) is given. keep: (B, Lk) bool, False at
        padding."""
        source = x if context is None else context
        value = source if value is None else value
        if value.shape != source.shape:
            raise RegardError(f"value has shape {tuple(value.shape)}; expected that of the keys' source, {tuple(source.shape)}")
        q, k = self.split(self.q(x)), self.split(source if self.k is None else self.k(source))
        v = value if self.v is None else self.v(value)
        if self.mix is not None:
            v = self.mixed(v if keep is None else torch.where(keep[..., None], v, 0.0), slice(0, v.shape[1]))
        mask: Mask | None = Causal() if self.causal else None
        if keep is not None:
            mask = Padding() if mask is None else mask & Padding()
        given: dict[str, Any] = {} if keep is None else {"keep": keep}
        return self.out(attend(q, k, self.split(v), mask=mask, **given).transpose(1, 2).flatten(-2))  # type: ignore[no-any-return]

    @whole
    @takes(x="batch tokens dim")
    def step(self, x: Tensor, state: tuple[State | None, Tensor] | None = None) -> tuple[Tensor, tuple[State | None, Tensor]]:
        """New tokens (B, n, dim) after those in `state`: the cache holds raw inputs where keys or values are raw."""
        if not self.causal:
            raise RegardError("step needs causal=True")
        inner, past = (None, x[:, :0]) if state is None else state
        q, k = self.split(self.q(x)), self.split(x if self.k is None else self.k(x))
        v = x if self.v is None else self.v(x)
        if self.mix is not None:
            past = torch.cat((past, x), 1)
            v = self.mixed(past, slice(past.shape[1] - x.shape[1], past.shape[1]))
        o, inner = step(q, k, self.split(v), "softmax", inner)
        return self.out(o.transpose(1, 2).flatten(-2)), (inner, past)
