"""FAST: factorisable attention, a truncated exponential of normalised dot products in linear time (id 57; Gerami et al., 2024).

o_i = sum_j f(x_ij) v_j / sum_j f(x_ij),   f(x) = sum_{l <= p} x^l / l!,   x_ij = q^_i.k^_j / c,   q^ = (q - mean q) / std q
Not built: dropout on the factors (released: of q q^T and k k^T where p = 2, of q and k where p = 1).
"""

import math

import torch
from torch import Tensor

from regard.algebra import FeatureMap, Recipe, Recurrent, bind
from regard.algebra.readouts import ratio
from regard.catalog.registry import register
from regard.errors import RegardError


def standardised(x: Tensor, eps: float) -> Tensor:
    """Mean 0 and deviation 1 over the channels of each token."""
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + eps).sqrt()


def bounded(x: Tensor, eps: float) -> Tensor:
    """Divided by the largest norm of the sequence, so that |q.k| <= 1."""
    return x / x.norm(dim=-1, keepdim=True).amax(-2, keepdim=True).clamp_min(eps)


def moments(x: Tensor, order: int, temperature: float | None) -> Tensor:
    """[1, x / sqrt(c), upper triangle of x x^T / c with its off-diagonal entries doubled under the product]; products sum x^l / l!."""
    d = x.shape[-1]
    x = x / (math.sqrt(d) if temperature is None else temperature) ** 0.5
    parts = [torch.ones_like(x[..., :1]), x]
    if order == 2:
        rows, columns = torch.triu_indices(d, d, device=x.device)
        parts.append(x[..., rows] * x[..., columns] * torch.where(rows == columns, 0.5, 1.0).to(x.dtype).sqrt())
    return torch.cat(parts, -1)


def truncated(s: Tensor, d: int, order: int, temperature: float | None) -> Tensor:
    x = s / (math.sqrt(d) if temperature is None else temperature)
    return 1 + x + x * x / 2 if order == 2 else 1 + x


@register("fast-attention")
def fastmax(p: int = 2, normalize: str = "token", temperature: float | None = None, eps: float = 1e-6) -> Recurrent:
    """p: 1 or 2; weights are at least 1/2 before division for p = 2, and may be negative for p = 1. normalize: "token": each token over its
    channels (the paper's); "sequence": by the sequence's largest norm (the released script's; both directions only); "none". temperature:
    c, None: sqrt(D). The state has (1 + D + D (D + 1) / 2) (Dv + 1) numbers; nothing of length x D^2 is kept, backward included."""
    if p not in (1, 2):
        raise RegardError(f"p={p}; expected 1 or 2")
    norms = {"token": bind(standardised, eps=eps), "sequence": bind(bounded, eps=eps), "none": None}
    if normalize not in norms:
        raise RegardError(f"normalize={normalize!r}; expected one of {', '.join(norms)}")
    first, known = norms[normalize], {"order": p, "temperature": temperature}
    feature = FeatureMap(
        bind(moments, **known),
        kernel=bind(truncated, **known),
        before=None if first is None else (first, first),
        causal=normalize != "sequence",
    )
    return Recurrent(feature, readout=ratio, scaled=False, recipe=Recipe(rope=False))
