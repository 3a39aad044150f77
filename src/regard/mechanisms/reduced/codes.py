"""Softmax attention over quantised keys in linear time: one term a code in place of one a token (ids 100, 165; Lingle, 2023; Liu et al., 2024).

o_i = [sum_recent e^{a_ij} v_j + sum_s c_s e^{q_i.C_s} m_s] / [sum_recent e^{a_ij} + sum_s c_s e^{q_i.C_s}],  c_s, m_s: count and mean value of code s
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import RegardError


def quantise(k: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """k (B, H, N, D), codebook (H, S, D) -> (nearest codes (B, H, N, D), whose gradient goes straight to k; their numbers (B, H, N))."""
    far = codebook.square().sum(-1)[:, None] - 2 * k.detach() @ codebook.mT
    which = far.argmin(-1)
    heads = torch.arange(len(codebook), device=k.device)[:, None]
    return k + (codebook[heads, which] - k).detach(), which


def near_bias(distance: Tensor, bias: Tensor) -> Tensor:
    """bias (B, H, n, rows, R) of distances 0 .. R - 1, spread over distance (rows, columns); zero outside."""
    at = distance.clamp(0, bias.shape[-1] - 1).expand(*bias.shape[:-1], distance.shape[-1])
    return torch.where((distance >= 0) & (distance < bias.shape[-1]), bias.gather(-1, at), 0.0)


@dataclass
class CodeState:
    """Counts (B, H, S) and sums of values (B, H, S, Dv) of the codes of older blocks; quantised keys, code numbers and values of the last one
    or two blocks. length: tokens read."""

    count: Tensor
    total: Tensor
    k: Tensor
    which: Tensor
    v: Tensor
    length: int

    @property
    def bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in (self.count, self.total, self.k, self.which, self.v))


def checked(q: Tensor, k: Tensor, codebook: Tensor, block: int) -> None:
    if codebook.dim() != 3 or codebook.shape[0] != q.shape[1] or codebook.shape[-1] != k.shape[-1]:
        raise RegardError(f"codebook has shape {tuple(codebook.shape)}; expected ({q.shape[1]} heads, codes, {k.shape[-1]})")
    if k.shape[1] != q.shape[1]:
        raise RegardError(f"k has {k.shape[1]} heads and q {q.shape[1]}; expected as many, since codebooks are a head's own")
    if block < 1:
        raise RegardError(f"block={block}; expected at least 1")


def code_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    codebook: Tensor,
    block: int = 512,
    bias: Tensor | None = None,
    q_codes: Tensor | None = None,
    causal: bool = True,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """(o (B, H, N, Dv), code numbers (B, H, N)): softmax attention over quantised keys, exactly, in O(N (S + 2 block)).

    q, k (B, H, N, D), v (B, H, N, Dv), codebook (H, S, D). bias (B|1, H|1, N|1, R), R <= block + 1: added to the logits of tokens at distances 0 .. R - 1.
    q_codes: the queries that read codes, where they differ (both q and q_codes read keys quantised). causal: tokens of a query's own block and
    the one before are read one by one, older ones by codes, which pass no gradient to k; otherwise all by codes, and no bias.
    """
    checked(q, k, codebook, block)
    far_q = (q if q_codes is None else q_codes) * scale
    hat, which = quantise(k, codebook)
    kind = F.one_hot(which, codebook.shape[1]).to(v.dtype)
    if not causal:
        if bias is not None:
            raise RegardError("bias with causal=False: in both directions every token is read by its code; expected None")
        count, total = kind.sum(-2), kind.mT @ v
        p = torch.softmax(far_q @ codebook.mT + count.log()[..., None, :], -1)
        return p @ (total / count.clamp_min(1)[..., None]), which
    if bias is not None and bias.shape[-1] > block + 1:
        raise RegardError(f"bias reaches {bias.shape[-1]} distances; expected at most block + 1 = {block + 1}")
    n = q.shape[2]
    fill = -n % block

    def blocks(x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, fill)).unflatten(2, (-1, block))

    bq, bf, bk, bv, bkind = (blocks(x) for x in (q * scale, far_q, hat, v, kind))
    pairs = [torch.cat((F.pad(x, (0, 0, 0, 0, 1, 0))[:, :, :-1], x), -2) for x in (bk, bv)]
    row, column = torch.arange(block, device=q.device)[:, None], torch.arange(2 * block, device=q.device)
    distance = row + block - column
    near = bq @ pairs[0].mT
    if bias is not None:
        wide = blocks(bias) if bias.shape[2] > 1 else bias[:, :, :, None]
        near = near + near_bias(distance, wide.expand(*near.shape[:-1], -1))
    seen = (distance >= 0).expand(near.shape[2], -1, -1).clone()
    seen[0] &= column >= block  # the first block has none before it
    near = near.masked_fill(~seen, -math.inf)
    # Counts and sums of what lies two blocks back or more.
    count, total = (F.pad(x.cumsum(2), (0, 0) * (x.dim() - 3) + (2, 0))[:, :, : near.shape[2]] for x in (bkind.sum(-2), bkind.mT @ bv))
    far = bf @ codebook.mT[:, None] + count.log()[..., None, :]
    p = torch.softmax(torch.cat((near, far), -1), -1)
    o = p[..., : 2 * block] @ pairs[1] + p[..., 2 * block :] @ (total / count.clamp_min(1)[..., None])
    return o.flatten(2, 3)[:, :, :n], which


def code_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    codebook: Tensor,
    state: CodeState | None,
    block: int = 512,
    bias: Tensor | None = None,
    q_codes: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, CodeState]:
    """One new token (N = 1) after those in `state`; equal to the causal `code_attention` over all of them. bias (B|1, H|1, 1, R)."""
    checked(q, k, codebook, block)
    if k.shape[2] != 1:
        raise RegardError(f"k has {k.shape[2]} tokens; expected one at a time")
    hat, which = quantise(k, codebook)
    if state is None:
        empty = k[:, :, :0]
        count = v.new_zeros(*k.shape[:2], codebook.shape[1])
        state = CodeState(count, v.new_zeros(*count.shape, v.shape[-1]), empty, which[..., :0], v[:, :, :0], 0)
    count, total, old = state.count, state.total, (state.k, state.which, state.v)
    if state.length % block == 0 and state.k.shape[2] == 2 * block:  # a new block begins: the older of two goes into its codes
        kind = F.one_hot(state.which[..., :block], codebook.shape[1]).to(v.dtype)
        count, total = count + kind.sum(-2), total + kind.mT @ state.v[:, :, :block]
        old = (state.k[:, :, block:], state.which[..., block:], state.v[:, :, block:])
    keys, numbers, values = (torch.cat((x, y), 2) for x, y in zip(old, (hat, which, v), strict=True))
    near = scale * q @ keys.mT
    if bias is not None:
        distance = torch.arange(keys.shape[2] - 1, -1, -1, device=q.device)[None]
        near = near + near_bias(distance, bias[:, :, :, None].expand(*near.shape[:2], 1, 1, -1)).squeeze(2)
    far = scale * (q if q_codes is None else q_codes) @ codebook.mT + count.log()[..., None, :]
    p = torch.softmax(torch.cat((near, far), -1), -1)
    o = p[..., : keys.shape[2]] @ values + p[..., keys.shape[2] :] @ (total / count.clamp_min(1)[..., None])
    return o, CodeState(count, total, keys, numbers, values, state.length + 1)
