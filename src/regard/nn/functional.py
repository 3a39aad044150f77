"""PyTorch's functional attention, by any mechanism."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..algebra import Causal, Mask, Mechanism
from ..engine.door import attend
from ..errors import RegardError


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    mechanism: str | Mechanism = "softmax",
    **inputs: Any,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention` with another mechanism: the same arguments, shapes and conventions.

    query (..., Hq, L, E), key (..., H, S, E), value (..., H, S, Ev) -> (..., Hq, L, Ev); or without heads, (N, L, E). Leading dimensions
    broadcast. attn_mask broadcasts to (..., Hq, L, S): bool, True is read; or floating, added to the scores. is_causal: query i reads
    keys 0 .. i, counted from the FIRST key, as PyTorch does (regard's own `Causal()` counts from the last). dropout_p acts whenever it is
    not zero. enable_gqa: Hq may be a multiple of H. inputs: the tensors the mechanism declares.
    """
    heads = [x.dim() for x in (query, key, value) if isinstance(x, Tensor)]
    if len(heads) < 3 or min(heads) < 2 or len(set(heads)) > 1:
        came = [tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__ for x in (query, key, value)]
        raise RegardError(f"query, key, value are {came}; expected tensors (..., length, channels) of as many dimensions")
    if is_causal and attn_mask is not None:
        raise RegardError("is_causal=True with attn_mask: expected one of them; put the causal part into attn_mask")
    shapes = [x.shape[:-2] for x in (query, key, value)]
    grouped = enable_gqa and query.dim() > 3 and shapes[0][-1] != shapes[1][-1]
    if not enable_gqa and query.dim() > 3 and 1 not in (shapes[0][-1], shapes[1][-1]) and shapes[0][-1] != shapes[1][-1]:
        raise RegardError(f"query has {shapes[0][-1]} heads and key {shapes[1][-1]}; expected the same, or enable_gqa=True")
    try:
        lead = torch.broadcast_shapes(*[s[:-1] if grouped else s for s in shapes])
    except RuntimeError:
        raise RegardError(f"leading dimensions {[tuple(s) for s in shapes]} of query, key, value do not broadcast") from None
    q, k, v = (four(x, (*lead, x.shape[-3]) if grouped else lead) for x in (query, key, value))
    q_len, k_len = q.shape[-2], k.shape[-2]
    mask: Mask | Tensor | Any = None if attn_mask is None else spread(attn_mask, (*lead, q.shape[1]) if grouped else lead, q)
    if is_causal and q_len <= k_len:
        mask, k, v = Causal(), k[..., :q_len, :], v[..., :q_len, :]
    elif is_causal:  # queries beyond the last key read them all
        mask = torch.ones(1, 1, q_len, k_len, dtype=torch.bool, device=q.device).tril()
    out = attend(q, k, v, mechanism, mask=mask, dropout_p=dropout_p, scale=scale, **inputs)
    return out.reshape(*((*lead, q.shape[1]) if grouped else lead), q_len, v.shape[-1])


def four(x: Tensor, lead: tuple[int, ...]) -> Tensor:
    """(batch, heads, length, channels): every leading dimension but the last is one batch; without heads, one head."""
    x = x.expand(*lead, *x.shape[-2:])
    return x.reshape(-1, lead[-1], *x.shape[-2:]) if len(lead) > 1 else x.reshape(-1, 1, *x.shape[-2:])


def spread(mask: Tensor, lead: tuple[int, ...], q: Tensor) -> Tensor:
    """A mask over (..., Hq, L, S) as (B or 1, Hq or 1, L, S)."""
    if not isinstance(mask, Tensor) or mask.dim() < 2:
        raise RegardError(
            f"attn_mask is {tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__}; expected a tensor (..., L, S)"
        )
    if mask.dim() == 2:
        return mask[None, None]
    return four(mask, lead) if mask.dim() > 3 or len(lead) == 1 else mask[None]
