"""A network of pairs, written out for one pair."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.lab.checks.shared.comparing import F64


def network(width: int, d: int) -> dict[str, Tensor]:
    """Random tensors of a pair network."""
    shapes = {
        **{"q_down": (width, d), "k_down": (width, d), "w1": (width, 2 * width), "w2": (width // 2, width), "w3": (width // 2,)},
        **{"q_bias": (width,), "k_bias": (width,), "b1": (width,), "b2": (width // 2,), "b3": ()},
    }
    return {name: torch.randn(shape, dtype=F64) / 2 for name, shape in shapes.items()}


def network_score(q: Tensor, k: Tensor, w: dict[str, Tensor]) -> Tensor:
    pair = torch.cat((w["q_down"] @ q + w["q_bias"], w["k_down"] @ k + w["k_bias"]))
    hidden = (w["w2"] @ (w["w1"] @ pair + w["b1"]).clamp_min(0) + w["b2"]).clamp_min(0)
    return w["w3"] @ hidden + w["b3"]
