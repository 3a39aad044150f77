"""The weights themselves: what each query gives to each key, where a mechanism has such rows."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..algebra.mask import Mask, as_mask
from ..algebra.mechanism import Mechanism, Recurrent, Weighted
from ..errors import RegardError
from . import alone, reference
from . import recurrent as scans
from .given import given_mask
from .names import resolved
from .problem import pose, sizes_of
from .reference import repeat_heads
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
    if isinstance(description, (Weighted, Recurrent)) and 0 in (q.shape[0], q.shape[-2], k.shape[-2]):
        return torch.zeros(*q.shape[:-1], k.shape[-2], dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    if isinstance(description, Weighted):
        return of_sequences(q, k, description, as_mask(mask), scale, inputs)
    if isinstance(description, Recurrent):

        def read(values: Tensor) -> Tensor:
            scan = scans.pose(description, as_mask(mask), q, k, values.expand(*k.shape[:2], -1, -1), scale, inputs)
            return scans.run(scan, "parallel")[0][..., -q.shape[-2] :, :]

        p = read(torch.eye(k.shape[-2], dtype=k.dtype, device=k.device))
        if callable(description.readout):  # a norm of the output, say, is no sum over values
            some = torch.linspace(-1, 1, k.shape[-2], dtype=k.dtype, device=k.device)[:, None] * torch.tensor([1.0, 3.0]).to(p)
            if not torch.allclose(p @ some, read(some), rtol=1e-2, atol=1e-2 * float(p.detach().abs().sum(-1).max())):
                return None
        return p
    return None


def of_sequences(q: Tensor, k: Tensor, mechanism: Weighted, mask: Mask, scale: float | None, inputs: dict[str, Any]) -> Tensor:
    """Weights of a weighted mechanism; where it counts places, each padded row and packed document by itself, as `attend` runs them."""
    q, k = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k))

    def matrix(q: Tensor, k: Tensor, mechanism: Weighted, mask: Mask, inputs: dict[str, Any]) -> Tensor:
        problem = pose(mechanism, mask, q, k, torch.zeros_like(k[..., :1]), scale, inputs)
        return reference.weights(reference.in_precision(problem, q.dtype))

    def one(q: Tensor, k: Tensor, places: Tensor, mechanism: Weighted, *, mask: Mask, **inputs: Any) -> tuple[Tensor, None]:
        return matrix(q, k, mechanism, mask, inputs) @ repeat_heads(places, q.shape[1]), None

    if alone.counts_places(mechanism) and alone.may_divide(mask):
        places = torch.eye(k.shape[-2], dtype=k.dtype, device=k.device).expand(*k.shape[:2], -1, -1)  # as values: where a weight goes
        divided = alone.run(mechanism, {item.name: item for item in mechanism.declared}, mask, q, k, places, inputs, one)
        if divided is not None:
            return divided[0]
    return matrix(q, k, mechanism, mask, inputs)


def dropped(
    q: Tensor, k: Tensor, v: Tensor, mechanism: str | Mechanism, rate: float, *, mask: Any = None, scale: float | None = None, **inputs: Any
) -> tuple[Tensor, Tensor]:
    """Attention with a share `rate` of its weights dropped and the others divided by 1 - rate, and those weights."""
    if not 0 <= rate < 1:
        raise RegardError(f"dropout_p is {rate}; expected at least 0 and less than 1")
    if isinstance(q, Tensor) and q.dim() == 3:
        q, k, v = (x.unsqueeze(1) for x in (q, k, v))
        mask = mask.unsqueeze(-3) if isinstance(mask, Tensor) and mask.dim() == 3 else mask
        out, kept = dropped(q, k, v, mechanism, rate, mask=mask, scale=scale, **inputs)
        return out.squeeze(1), kept.squeeze(1)
    sizes_of(q, k, v)
    p = weights(q, k, mechanism, mask=mask, scale=scale, **inputs)
    description = resolved(mechanism)
    if p is None or getattr(description, "values", None) is not None:
        name = mechanism if isinstance(mechanism, str) else type(description).__name__
        raise RegardError(f"dropout_p={rate}: {name} has no matrix of weights to drop from; expected dropout_p=0, or another mechanism")
    return drop(p, v, rate)


def drop(p: Tensor, v: Tensor, rate: float) -> tuple[Tensor, Tensor]:
    """p @ v with a share of the weights p (B, Hq, Lq, Lk) dropped and the others divided by 1 - rate, and those weights."""
    v = repeat_heads(v, p.shape[1])
    v = torch.where((p != 0).any(-2).unsqueeze(-1), v, 0.0)  # what stands where no query looks may be no number
    p = F.dropout(p, rate)
    return (p @ v.to(p.dtype)).to(v.dtype), p
