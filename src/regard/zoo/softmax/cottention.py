"""Cottention: cosine similarity in place of softmax, hence a finite state (id 48; Mongaras et al., 2024).

o_i = q^_i sum_j k^_j^T v_j / c_j,   c = n^p_h,   p_h = sigmoid(m_h)        n: tokens up to j when causal, else all tokens
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.algebra import FeatureMap, Input, Learned, Recurrent
from regard.catalog.registry import register
from regard.errors import RegardError


def unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1)


def unit_over_length(x: Tensor, n: Tensor, power: Tensor) -> Tensor:
    return F.normalize(x, dim=-1) * n.to(x.dtype) ** -power.to(x.dtype)[:, None, None]


@register("cottention")
def cottention(divide: str = "value", init: float = 0.5) -> Recurrent:
    """divide: where a causal pass puts the divisor: "value", at the value's own position as the released code, or "output", at the
    query's. Input `power` (H,), in (0, 1), is learned as sigmoid(m) from m = init."""
    if divide not in ("value", "output"):
        raise RegardError(f"divide={divide!r}; expected value or output")
    spec = Input("power", "h", default=1 / (1 + math.exp(-init)), layer=Learned(init, torch.sigmoid))
    query, key = (unit, unit_over_length) if divide == "value" else (unit_over_length, unit)
    return Recurrent(FeatureMap(query, key, (spec,)), scaled=False)
