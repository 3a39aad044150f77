"""Lightning Attention-2: causal linear attention with a fixed decay per head, in chunks (id 155; Qin et al., 2024).

S_t = e^{-s_h} S_{t-1} + k_t v_t^T,   o_t = S_t^T q_t        (no 1/sqrt(D); layers normalise the output)
The first version, and its layer in TNL, differ in the slopes and in what stands around the recurrence.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from regard.algebra import Causal, Input, Learned, Recipe, Recurrent, Sizes, bind
from regard.algebra.position import alibi_slopes
from regard.catalog.registry import register
from regard.engine import recurrent as scans
from regard.engine.door import attend
from regard.errors import RegardError


def minus_slopes(sizes: Sizes, layer_share: float = 0.0) -> Tensor:
    """-2^(-8 h / H) (1 - layer / layers): heads forget at geometric rates."""
    return -alibi_slopes(sizes) * (1 - layer_share)


@register("lightning-attention-2")
def lightning(layer_share: float = 0.0) -> Recurrent:
    """layer_share: layer / layers (below 1), which slows decay in deeper layers. The input `log_decay` (H,), <= 0, replaces the slopes; 0 is no decay."""
    slopes = bind(minus_slopes, layer_share=layer_share)
    spec = Input("log_decay", "h", default=slopes, layer=Learned(slopes, trainable=False))
    return Recurrent(
        decay="head", scaled=False, inputs=(spec,), recipe=Recipe(activation="silu", out_norm="rms", out_gate="silu", rope=False)
    )


def lightning_blocks(q: Tensor, k: Tensor, v: Tensor, slope: Tensor, block: int = 64, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(o (B, H, N, E), the state (B, H, D, E) after the last token), q, k (B, H, N, D), v (B, H, N, E), slope (H,) >= 0; in blocks of
    `block`, from `state` (None: zeros). No scale, no divisor."""
    if slope.shape != (q.shape[1],):
        raise RegardError(f"slope has shape {tuple(slope.shape)}; expected ({q.shape[1]},), one number a head")
    scan = scans.pose(lightning(), Causal(), q, k, v, None, {"log_decay": -slope})
    out, new = scans.run(scan, "chunk", state, block)
    assert new is not None
    return out.to(v.dtype), new


def lightning_in_parts(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, parts: int) -> Tensor:
    """The same sum with the sequence cut into `parts` that run side by side, their states joined by a scan of log2(parts) steps.

    q, k (B, H, L, D), v (B, H, L, Dv), log_decay (H,), <= 0 -> (B, H, L, Dv).
    """
    length = q.shape[2]
    if not 1 <= parts <= length:
        raise RegardError(f"parts={parts}; expected 1 .. {length}, the length")
    size = -(-length // parts)
    q, k, v = (pad(x, (0, 0, 0, parts * size - length)).unflatten(2, (parts, size)) for x in (q, k, v))
    a, b, c = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    local = attend(a, b, c, "lightning-attention-2", log_decay=log_decay)
    rate, at = log_decay[:, None, None, None], torch.arange(size, device=q.device, dtype=q.dtype)[:, None]
    state = (k * torch.exp(rate * (size - 1 - at))).transpose(-1, -2) @ v  # what each part alone would leave behind
    step = 1
    while step < parts:
        state = state + torch.exp(rate * size * step) * pad(state, (0, 0, 0, 0, step, 0))[:, :, :parts]
        step *= 2
    before = pad(state, (0, 0, 0, 0, 1, 0))[:, :, :parts]
    out = local.unflatten(0, (-1, parts)).transpose(1, 2) + (q * torch.exp(rate * (at + 1))) @ before
    return out.flatten(2, 3)[:, :, :length]
