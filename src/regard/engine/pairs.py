"""Which pairs of query and key a mask lets meet, and how many keys each query sees."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..algebra.mask import Mask
from ..algebra.part import Sizes
from ..algebra.position_mask import Causal, Window
from ..algebra.snapshot import remembered
from ..errors import RegardError


def indices(sizes: Sizes, device: torch.device) -> dict[str, Tensor]:
    """b, h, i, j broadcasting to (B, H, Lq, Lk)."""
    return {
        "b": torch.arange(sizes.batch, device=device)[:, None, None, None],
        "h": torch.arange(sizes.heads, device=device)[:, None, None],
        "i": torch.arange(sizes.k_len - sizes.q_len, sizes.k_len, device=device)[:, None],
        "j": torch.arange(sizes.k_len, device=device),
    }


def visible_counts(mask: Mask, sizes: Sizes, inputs: Mapping[str, Tensor], device: torch.device) -> Tensor:
    """How many keys each query sees: (B or 1, H or 1, Lq, 1), float32; closed form where there is one, else a row block at a time."""
    i = torch.arange(sizes.k_len - sizes.q_len, sizes.k_len, device=device, dtype=torch.float32)
    parts = {type(part) for part in mask.parts()}
    known = mask.counts(inputs, i, sizes.k_len)
    if known is not None:
        return known[..., None].float()
    if parts == {Causal, Window, type(mask)} and type(mask).__name__ == "Both":
        size = min(part.size for part in mask.parts() if isinstance(part, Window))
        return (i + 1).clamp(min=0, max=size)[:, None][None, None]
    if not inputs and device.type == "cpu":
        return streamed_counts_cached(mask, sizes)
    return streamed_counts(mask, sizes, inputs, device)


@remembered(maxsize=64)
def streamed_counts_cached(mask: Mask, sizes: Sizes) -> Tensor:
    return streamed_counts(mask, sizes, {}, torch.device("cpu"))


def streamed_counts(mask: Mask, sizes: Sizes, inputs: Mapping[str, Tensor], device: torch.device) -> Tensor:
    at = indices(sizes, device)
    env = {**inputs, "offset": sizes.k_len - sizes.q_len, "k_len": sizes.k_len}
    b, h = looked_at(mask, at, env)
    rows = max(1, 2**20 // max(1, sizes.k_len * b.numel() * h.numel()))
    counts = [
        visible(mask, b, h, part, at["j"], env).expand(b.numel(), h.numel(), part.numel(), sizes.k_len).sum(-1, keepdim=True)
        for part in at["i"].split(rows)
    ]
    return torch.cat(counts, -2).float() if counts else torch.zeros(b.numel(), h.numel(), 0, 1, device=device)


def looked_at(mask: Mask, at: Mapping[str, Tensor], env: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Indices of batches and heads, cut to one where the shape of the mask's answer says that it does not look at them."""
    seen = visible(mask, at["b"], at["h"], at["i"][:1], at["j"][:1], env)
    shape = (*[1] * (4 - seen.dim()), *seen.shape)
    return tuple(at[name] if shape[dim] > 1 else at[name][:1] for dim, name in enumerate("bh"))  # type: ignore[return-value]


def visible(mask: Mask, b: Tensor, h: Tensor, i: Tensor, j: Tensor, env: Mapping[str, Any]) -> Tensor:
    """The mask's predicate, checked to be boolean."""
    seen = mask.visible(b, h, i, j, env)
    if not isinstance(seen, Tensor) or seen.dtype != torch.bool:
        raise RegardError(f"mask {mask!r} returned {getattr(seen, 'dtype', type(seen).__name__)}; expected a bool tensor")
    return seen
