"""Self-attention does not need O(n^2) memory (id 262; Rabe & Staats, 2021).

o = sum_c e^{m_c - m} O_c / sum_c e^{m_c - m} s_c        over chunks c of keys, scores recomputed in the backward pass
"""

from __future__ import annotations

import torch
from torch import Tensor

from regard.algebra import Mask, Modified, Weighted
from regard.algebra.mask import as_mask
from regard.algebra.part import Function, Input
from regard.catalog.registry import register
from regard.engine.problem import pose
from regard.engine.tiled import run
from regard.engine.tiled.tiles import Tiling
from regard.errors import RegardError


def add_bias(s: Tensor, bias: Tensor) -> Tensor:
    return s + bias


@register("memory-efficient-attention", kind="function")
def memory_efficient_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | Function | None = None,
    bias: Tensor | None = None,
    *,
    q_chunk: int = 1024,
    k_chunk: int = 4096,
    scale: float | None = None,
) -> Tensor:
    """Exact softmax attention that never holds more than q_chunk x k_chunk scores, forward and backward, on any device.

    Shapes as `attend`; bias broadcasts to (B, H, Lq, Lk) and is differentiable. Heads are worked on one at a time.
    """
    if q_chunk < 1 or k_chunk < 1:
        raise RegardError(f"q_chunk={q_chunk}, k_chunk={k_chunk}: expected positive integers")
    inputs = {} if bias is None else {"bias": bias[(None,) * (4 - bias.dim())]}
    position = None if bias is None else Modified(add_bias, (Input("bias", "bhqk"),))
    problem = pose(Weighted(position=position), as_mask(mask), q, k, v, scale, inputs)
    problem.tiling = Tiling(q_chunk, k_chunk, q_chunk * k_chunk)
    return run(problem)[0]


class LazySoftmax:
    """Softmax attention of one query (..., D) over keys that arrive one by one: constant memory."""

    def __init__(self, q: Tensor, scale: float | None = None):
        self.q = q * (q.shape[-1] ** -0.5 if scale is None else scale)
        self.top = torch.full(q.shape[:-1], float("-inf"), dtype=q.dtype, device=q.device)
        self.sum = torch.zeros_like(self.top)
        self.out: Tensor | None = None

    def update(self, k: Tensor, v: Tensor) -> None:
        """Take in one key (..., D) and its value (..., Dv)."""
        score = (self.q * k).sum(-1)
        top = torch.maximum(self.top, score)
        fade, weight = torch.exp(self.top - top), torch.exp(score - top)
        self.out = weight[..., None] * v if self.out is None else self.out * fade[..., None] + weight[..., None] * v
        self.sum, self.top = self.sum * fade + weight, top

    def value(self) -> Tensor:
        """The attention output so far."""
        if self.out is None:
            raise RegardError("no key has been given yet; call update(k, v) first")
        return self.out / self.sum[..., None]
