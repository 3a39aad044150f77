"""The weights themselves: what each query gives to each key, where a mechanism has such rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..algebra.mask import as_mask
from ..algebra.mechanism import Mechanism, Recurrent, Weighted
from . import recurrent as scans
from . import reference
from .door import given_mask
from .names import resolved
from .problem import pose
from .settle import settle


def weights(
    q: Tensor, k: Tensor, mechanism: str | Mechanism, *, mask: Any = None, scale: float | None = None, **inputs: Any
) -> Tensor | None:
    """(B, Hq, Lq, Lk) such that out = weights @ v, materialised in at least float32; None where there is no such matrix of pairs.

    For recurrences these are the implied weights (signed, and normalised only where the readout divides).
    """
    if isinstance(mask, Tensor):
        mechanism, mask, inputs = given_mask(mechanism, mask, inputs)
    description = settle(resolved(mechanism))
    v = torch.zeros_like(k[..., :1])
    if isinstance(description, Weighted):
        problem = pose(description, as_mask(mask), q, k, v, scale, inputs)
        return reference.weights(reference.in_precision(problem, torch.promote_types(q.dtype, torch.float32)))
    if isinstance(description, Recurrent):
        v = torch.eye(k.shape[-2], dtype=k.dtype, device=k.device).expand(*k.shape[:2], -1, -1)
        scan = scans.pose(description, as_mask(mask), q, k, v, scale, inputs)
        return scans.run(scan, "parallel")[0][..., -q.shape[-2] :, :]
    return None
