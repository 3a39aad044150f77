"""Softmax attention over quantised keys in linear time: one term a code in place of one a token (Lingle, 2023; Liu et al., 2024).

o_i = [sum_recent e^{a_ij} v_j + sum_s c_s e^{q_i.C_s} m_s] / [sum_recent e^{a_ij} + sum_s c_s e^{q_i.C_s}],  c_s, m_s: count and mean value of code s
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import RegardError


class Codebook(nn.Module):
    """Codes (heads, codes, width) moved towards the keys they stand for by running averages: C = sum / max(count, 0.01).

    decay: of the averages. `quantisation(k)` is the mean of |k - C_z|^2, whose gradient pulls keys to their codes.
    """

    codes: Tensor
    sums: Tensor
    counts: Tensor

    def __init__(self, heads: int, codes: int, width: int, decay: float = 0.99, floor: float = 0.01):
        super().__init__()
        start = torch.randn(heads, codes, width) * width**-0.25
        self.decay, self.floor = decay, floor
        for name, x in (("codes", start), ("sums", start.clone()), ("counts", torch.ones(heads, codes))):
            self.register_buffer(name, x)

    def commitment(self, k: Tensor, which: Tensor) -> Tensor:
        """|k - C_z|^2 of keys k (B, H, N, D) with codes `which` (B, H, N), summed over heads, mean over batch and tokens."""
        heads = torch.arange(len(self.codes), device=k.device)[:, None]
        return (k - self.codes[heads, which].detach()).square().sum((1, 3)).mean()

    @torch.no_grad()
    def update(self, k: Tensor, which: Tensor) -> None:
        """Move the averages by these keys."""
        kind = F.one_hot(which, self.codes.shape[1]).to(k.dtype)
        count, total = kind.sum((0, 2)), torch.einsum("bhns,bhnd->hsd", kind, k)
        self.counts.mul_(self.decay).add_((1 - self.decay) * count)
        self.sums.mul_(self.decay).add_((1 - self.decay) * total)
        self.codes = self.sums / self.counts.clamp_min(self.floor)[..., None]  # not in place: the pass just made still needs the old ones


def normed(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / rms(x) * D^(-1/4): two such vectors have a product of scale D^(-1/2)."""
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * x.shape[-1] ** -0.25


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
    """Counts (B, H, S) and sums of values (B, H, S, Dv) of the codes of older tokens; quantised keys, code numbers and values of the others.
    length: tokens read."""

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
    memory: int | None = None,
    aggregate: bool = True,
) -> tuple[Tensor, Tensor]:
    """(o (B, H, N, Dv), code numbers (B, H, N)): softmax attention over quantised keys, exactly, in O(N (S + block + memory)).

    q, k (B, H, N, D), v (B, H, N, Dv), codebook (H, S, D). bias (B|1, H|1, N|1, R), R <= memory + 1: added to the logits of tokens at distances 0 .. R - 1.
    q_codes: the queries that read codes, where they differ (both q and q_codes read keys quantised). causal: tokens of a query's own block and
    the `memory` (None: block) before it are read one by one, older ones by codes, which pass no gradient to k; otherwise all by codes, and no
    bias. aggregate False: tokens more than `memory` before the query are not read at all.
    """
    checked(q, k, codebook, block)
    far_q = (q if q_codes is None else q_codes) * scale
    hat, which = quantise(k, codebook)
    kind = F.one_hot(which, codebook.shape[1]).to(v.dtype)
    if not causal:
        if bias is not None or not aggregate:
            raise RegardError("causal=False: in both directions every token is read by its code; expected bias=None and aggregate=True")
        count, total = kind.sum(-2), kind.mT @ v
        p = torch.softmax(far_q @ codebook.mT + count.log()[..., None, :], -1)
        return p @ (total / count.clamp_min(1)[..., None]), which
    memory = block if memory is None else memory
    if memory < 0 or (bias is not None and bias.shape[-1] > memory + 1):
        reach = 0 if bias is None else bias.shape[-1]
        raise RegardError(f"memory={memory}, bias reaches {reach} distances; expected memory >= 0 and at most memory + 1 distances")
    n = q.shape[2]
    fill = -n % block

    def blocks(x: Tensor, size: int = block) -> Tensor:
        return F.pad(x, (0, 0, 0, fill)).unflatten(2, (-1, size))

    def near_of(x: Tensor) -> Tensor:
        """The `memory` tokens before each block and its own, (B, H, blocks, memory + block, .)."""
        return F.pad(x, (0, 0, memory, fill)).unfold(2, memory + block, block).transpose(-1, -2)

    bq, bf = blocks(q * scale), blocks(far_q)
    near_k, near_v = near_of(hat), near_of(v)
    row, column = torch.arange(block, device=q.device)[:, None], torch.arange(memory + block, device=q.device)
    distance = row + memory - column
    near = bq @ near_k.mT
    if bias is not None:
        wide = blocks(bias) if bias.shape[2] > 1 else bias[:, :, :, None]
        near = near + near_bias(distance, wide.expand(*near.shape[:-1], -1))
    start = torch.arange(near.shape[2], device=q.device)[:, None, None] * block
    seen = (distance >= 0) & (start + column >= memory)
    near = near.masked_fill(~(seen if aggregate else seen & (distance <= memory)), -math.inf)
    if not aggregate:
        return (torch.softmax(near, -1) @ near_v).flatten(2, 3)[:, :, :n], which
    count, total = older(kind, v, block, memory, fill)
    far = bf @ codebook.mT[:, None] + count.log()[..., None, :]
    p = torch.softmax(torch.cat((near, far), -1), -1)
    o = p[..., : memory + block] @ near_v + p[..., memory + block :] @ (total / count.clamp_min(1)[..., None])
    return o.flatten(2, 3)[:, :, :n], which


def older(kind: Tensor, v: Tensor, block: int, memory: int, fill: int) -> tuple[Tensor, Tensor]:
    """Of each block the counts (B, H, blocks, S) and sums of values (B, H, blocks, S, Dv) of what lies more than `memory` before it."""
    size = math.gcd(block, memory) if memory else block
    of, values = (F.pad(x, (0, 0, 0, fill)).unflatten(2, (-1, size)) for x in (kind, v))
    blocks, step, back = of.shape[2] * size // block, block // size, memory // size
    found = []
    for x in (of.sum(-2), of.mT @ values):
        sums = F.pad(x.cumsum(2), (0, 0) * (x.dim() - 3) + (1, 0))  # entry i: of the first i pieces
        at = (torch.arange(blocks, device=v.device) * step - back).clamp_min(0)
        found.append(sums[:, :, at])
    return found[0], found[1]


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
    memory: int | None = None,
    aggregate: bool = True,
) -> tuple[Tensor, CodeState]:
    """New tokens (N up to the end of a block) after those in `state`; equal to the causal `code_attention` over all of them. bias
    (B|1, H|1, N|1, R)."""
    checked(q, k, codebook, block)
    new, memory = k.shape[2], block if memory is None else memory
    read = 0 if state is None else state.length
    if not 1 <= new <= block - read % block:
        raise RegardError(f"k has {new} tokens; expected 1 .. {block - read % block}, those up to the end of the block")
    hat, which = quantise(k, codebook)
    if state is None:
        count = v.new_zeros(*k.shape[:2], codebook.shape[1])
        state = CodeState(count, v.new_zeros(*count.shape, v.shape[-1]), k[:, :, :0], which[..., :0], v[:, :, :0], 0)
    count, total, old = state.count, state.total, (state.k, state.which, state.v)
    stale = state.k.shape[2] - memory
    if read % block == 0 and stale > 0:  # a new block begins: what lies beyond its memory goes into the codes
        kind = F.one_hot(state.which[..., :stale], codebook.shape[1]).to(v.dtype)
        count, total = count + kind.sum(-2), total + kind.mT @ state.v[:, :, :stale]
        old = (state.k[:, :, stale:], state.which[..., stale:], state.v[:, :, stale:])
    keys, numbers, values = (torch.cat((x, y), 2) for x, y in zip(old, (hat, which, v), strict=True))
    held = keys.shape[2]
    distance = torch.arange(held - new, held, device=q.device)[:, None] - torch.arange(held, device=q.device)
    near = scale * q @ keys.mT
    if bias is not None:
        wide = bias[:, :, None].expand(*near.shape[:2], 1, new, -1)
        near = near + near_bias(distance, wide).squeeze(2)
    seen = (distance >= 0) if aggregate else (distance >= 0) & (distance <= memory)
    near = near.masked_fill(~seen, -math.inf)
    after = CodeState(count, total, keys, numbers, values, read + new)
    if not aggregate:
        return torch.softmax(near, -1) @ values, after
    far = scale * (q if q_codes is None else q_codes) @ codebook.mT + count.log()[..., None, :]
    p = torch.softmax(torch.cat((near, far), -1), -1)
    return p[..., :held] @ values + p[..., held:] @ (total / count.clamp_min(1)[..., None]), after


def pieces(length: int, read: int, block: int) -> list[slice]:
    """Where new tokens after `read` earlier ones are cut for `code_step`: at the ends of blocks."""
    found, start = [], 0
    while start < length:
        stop = min(length, start + block - (read + start) % block)
        found.append(slice(start, stop))
        start = stop
    return found
