"""PyTorch's FlexAttention: softmax with changed scores and masks, and, on a GPU, other non-negative weights without a shift.

A weight w(s) >= 0 is softmax of log w(s) times its sum, which FlexAttention returns as a log-sum-exp: sum_j w_j v_j =
exp(lse) * flex(log w). FlexAttention on a CPU has no backward and returns no log-sum-exp, so the planner uses it on CUDA only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..algebra.mask import Full
from ..algebra.normalizer import SOFTMAX, RowLocal
from ..algebra.part import asks, call
from .pairs import indices, looked_at
from .problem import Problem, divisor, reciprocal


def score_mod(problem: Problem) -> Any:
    """FlexAttention's score_mod for this problem, or None when scores stay as they are."""
    position = getattr(problem.mechanism.position, "modify", None)
    normalizer = problem.mechanism.normalizer
    assert isinstance(normalizer, RowLocal)
    plain = normalizer == SOFTMAX
    if position is None and plain:
        return None

    def change(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        at = {"b": b, "h": h, "i": i + problem.offset, "j": j}
        for name, x in {**problem.inputs, "n": problem.counts}.items():
            if x is not None and x.dim() == 4:
                at[name] = x[b % x.shape[0], h % x.shape[1], i % x.shape[2], j % x.shape[3]]
        s = call(position, s, env=at) if position is not None else s
        return s if plain else torch.log(call(normalizer.weight, s, env=at))

    return change


def block_mask(problem: Problem) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask  # loads the compiler: only when used

    if isinstance(problem.mask, Full):
        return None
    env = {**problem.inputs, "offset": problem.offset, "k_len": problem.sizes.k_len}

    def keep(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return problem.mask.visible(b, h, i + problem.offset, j, env)

    sizes = problem.sizes
    b, h = looked_at(problem.mask, indices(sizes, problem.q.device), env)
    return create_block_mask(
        keep,
        sizes.batch if b.numel() > 1 else None,
        sizes.heads if h.numel() > 1 else None,
        sizes.q_len,
        sizes.k_len,
        device=str(problem.q.device),
    )


def refusal(mechanism: Any, device_type: str) -> str:
    """Why FlexAttention cannot run a mechanism, or the empty string."""
    normalizer = mechanism.normalizer
    if device_type != "cuda":
        return "FlexAttention has no backward on a CPU"
    if mechanism.select is not None or not mechanism.score.dot:
        return "FlexAttention forms dot products under a static mask"
    if normalizer == SOFTMAX:
        return ""
    if not isinstance(normalizer, RowLocal) or normalizer.shift != "none" or normalizer.mass is not None or "c" in asks(normalizer.weight):
        return "FlexAttention's weights are softmax, or non-negative, unshifted and undivided"
    return ""


def run(problem: Problem) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    grouped = problem.sizes.heads != problem.sizes.kv_heads
    attention: Any = torch.compile(flex_attention, dynamic=False) if problem.q.is_cuda else flex_attention
    plain = problem.mechanism.normalizer == SOFTMAX
    options: dict[str, Any] = {"score_mod": score_mod(problem), "block_mask": block_mask(problem), "scale": 1.0, "enable_gqa": grouped}
    out: Any = attention(problem.q, problem.k, problem.v, return_lse=not plain, **options)
    if plain:
        return out
    out, lse = out
    out = out * torch.exp(lse)[..., None].to(out.dtype)
    z = divisor(problem, None, torch.zeros_like(lse)[..., None])
    return out if z is None else (out * reciprocal(z)).to(problem.v.dtype)
