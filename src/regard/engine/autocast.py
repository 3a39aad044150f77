"""Calls under torch.autocast."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def autocasting(x: Any) -> bool:
    return isinstance(x, Tensor) and torch.is_autocast_enabled(x.device.type)


def under_autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as PyTorch's attention takes them under autocast: in its dtype. Executors then run outside it, and widen what they need."""
    if not autocasting(q):
        return q, k, v
    dtype = torch.get_autocast_dtype(q.device.type)
    cast = [x.to(dtype) if isinstance(x, Tensor) and x.dtype in (torch.float32, torch.float16, torch.bfloat16) else x for x in (q, k, v)]
    return cast[0], cast[1], cast[2]
