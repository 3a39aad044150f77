"""Sliding-window attention training: sigmoid weights, rotary positions and balanced slopes in a window (id 36; Fu et al., 2025).

p_ij = sigmoid((R_i q_i).(R_j k_j) / sqrt(D) + sigma_h (i - j)),   0 <= i - j < window        rows are not normalised

Language models learn with texts several times as long as the window, so that layers hand on what they saw: `regard compare swat:window=32 --seq-len 128`.
"""

import torch
from torch import Tensor

from regard.algebra import Alibi, Causal, Input, Learned, Rope, RowLocal, Sizes, Weighted, Window, bind
from regard.catalog.registry import register
from regard.errors import RegardError


def slopes_of(sizes: Sizes, balance: str) -> Tensor:
    """ALiBi's s - slope |i - j|: half of the heads with slopes 2^-k (recent keys), half with -2^-k (old keys), k = 1, 2, ..."""
    if balance == "balanced":
        down = -(-sizes.heads // 2)
        powers = [2.0**-k for k in range(1, down + 1)]
        return torch.tensor(powers + [-x for x in powers[: sizes.heads - down]])
    sign = 1.0 if balance == "negative" else -1.0
    return torch.tensor([sign * 2.0**-k for k in range(1, sizes.heads + 1)])


@register("swat")
def swat(window: int = 1024, balance: str = "balanced", base: float = 10000.0) -> Weighted:
    """balance: "balanced", "negative" (all heads favour recent keys) or "positive". The input `slopes` (H,) replaces them."""
    if balance not in ("balanced", "negative", "positive"):
        raise RegardError(f"balance={balance!r}; expected balanced, negative or positive")
    start = bind(slopes_of, balance=balance)
    alibi = Alibi((Input("slopes", "h", default=start, layer=Learned(start, trainable=False)),))
    return Weighted(position=(Rope(base), alibi), normalizer=RowLocal(torch.sigmoid), mask=Causal() & Window(window))
