"""Relative convolutional multi-head attention: convolved q, k, v and learned relative positions (id 208; Sugiharto et al., 2023).

s_ij = ((q_i + u).k_j + q_i.E_(i-j) + b_(i-j)) / sqrt(D),   q, k, v after a causal convolution over time, one filter a channel
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.algebra import Weighted
from regard.algebra.pairings import Relative
from regard.catalog.registry import register
from regard.nn.attention import Attention
from regard.nn.parts import conv_apart


class HeadConv(nn.Module):
    """Causal convolution of (B, H, L, D) over L, a filter and a bias a channel, shared by heads; it starts as the identity."""

    def __init__(self, width: int, kernel: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(width, kernel)), nn.Parameter(torch.zeros(width))
        self.weight.data[:, 0] = 1

    def forward(self, x: Tensor, past: Tensor | None = None, documents: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """weight[:, r] belongs to the token r steps back; `past`: the inputs before x; documents (B or 1, L): as of `ShortConv`."""
        reach, weight = self.weight.shape[1] - 1, self.weight.flip(1).unsqueeze(1)
        past = x.new_zeros(*x.shape[:2], reach, x.shape[3]) if past is None else past
        x = x if documents is None else torch.where(documents[:, None, :, None] >= 0, x, 0.0)
        wide = torch.cat((past, x), 2)
        tail = wide[:, :, wide.shape[2] - reach :]
        if documents is not None:
            return conv_apart(wide, weight, self.bias, documents[:, None]), tail
        flat = F.conv1d(wide.flatten(0, 1).transpose(1, 2), weight, self.bias, groups=x.shape[3])
        return flat.transpose(1, 2).unflatten(0, x.shape[:2]), tail


@register("rcmha", kind="module")
class RelativeConvMHA(Attention):
    """Causal, x (B, L, dim) -> (B, L, dim). conv=False, relative=False: the paper's ablations (MHA, RMHA, MDHA). max_rel: offsets |i - j|
    below it have a place in the tables.

    The released tables count P + j - i, ours max_rel + i - j: `table.flip(0).roll(1, 0)`; released filters run from the oldest token on, ours from
    the newest: `weight.flip(-1)`."""

    def __init__(
        self, heads: int, dim: int, kernel: int = 3, max_rel: int = 4096, conv: bool = True, relative: bool = True, **options: Any
    ):
        score = {"score": Relative(max_rel)} if relative else {}
        super().__init__(dim, heads, Weighted(**score), **options)  # type: ignore[arg-type]
        widths = (self.key_dim, self.key_dim, self.value_dim) if conv else ()
        self.head_convs = nn.ModuleList([HeadConv(width, kernel) for width in widths])

    @property
    def convolves(self) -> bool:
        return len(self.head_convs) > 0

    def heads_of(
        self,
        x: Tensor,
        source: Tensor,
        position: int | Tensor,
        conv: tuple[Tensor, ...] | None,
        documents: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
        q, k, v, _ = super().heads_of(x, source, position, None)
        if not self.head_convs:
            return q, k, v, ()
        made = [
            layer(y, conv[at] if conv else None, documents) for at, (layer, y) in enumerate(zip(self.head_convs, (q, k, v), strict=True))
        ]
        return made[0][0], made[1][0], made[2][0], tuple(tail for _, tail in made)


class SquaredReLUBlock(nn.Module):
    """x + attention(norm(x)), then x + W_2 relu(W_1 norm(x))^2: the paper's language-model block."""

    def __init__(self, attention: Attention, hidden: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(attention.dim), nn.LayerNorm(attention.dim)
        self.attention, self.up, self.down = attention, nn.Linear(attention.dim, hidden), nn.Linear(hidden, attention.dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(torch.relu(self.up(self.norm2(x))).square())  # type: ignore[no-any-return]
