"""LASP+: lightning attention on a sequence cut over ranks, with one gathering of states (MiniMax-01, id 87).

M_r = sum_s lambda^{len_r - s} k_s v_s^T on each rank; after an all-gather P_r = sum_{u < r} lambda^{tokens between} M_u, o = local + Lambda Q P_r
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import RegardError
from ..mechanisms.recurrent.lightning import lightning_blocks


def local_state(k: Tensor, v: Tensor, slope: Tensor) -> Tensor:
    """What a rank's tokens alone leave behind, (B, H, D, Dv)."""
    at = torch.arange(k.shape[2], device=k.device, dtype=k.dtype)
    fade = torch.exp(-slope[:, None].to(k.dtype) * (k.shape[2] - 1 - at))[..., None]
    return (k * fade).transpose(-1, -2) @ v


def prefix_state(states: Sequence[Tensor], lengths: Sequence[int], rank: int, slope: Tensor) -> Tensor:
    """The state that rank meets, from the gathered states and lengths of all ranks."""
    total = torch.zeros_like(states[0])
    between = 0
    for u in range(rank - 1, -1, -1):
        total = total + torch.exp(-slope.to(total.dtype) * between)[:, None, None] * states[u]
        between += lengths[u]
    return total


def lasp_plus(shards: Sequence[tuple[Tensor, Tensor, Tensor]], slope: Tensor) -> tuple[list[Tensor], int]:
    """Each virtual rank's (q, k, v) (B, H, L_r, D) and slope (H,) >= 0 -> (each rank's output, bytes that the one all-gather moves to each).

    All ranks make their state and their own output at the same time; only the states travel, whatever the length.
    """
    if not shards:
        raise RegardError("no shards were given; expected one (q, k, v) a rank")
    states = [local_state(k, v, slope) for _, k, v in shards]
    lengths = [k.shape[2] for _, k, _ in shards]
    outs = []
    for rank, (q, k, v) in enumerate(shards):
        local = lightning_blocks(q, k, v, slope)[0]
        at = torch.arange(1, q.shape[2] + 1, device=q.device, dtype=q.dtype)
        fade = torch.exp(-slope[:, None].to(q.dtype) * at)[..., None]
        outs.append(local + (q * fade) @ prefix_state(states, lengths, rank, slope))
    return outs, (len(states) - 1) * states[0].numel() * states[0].element_size()


def lightning_packed(q: Tensor, k: Tensor, v: Tensor, slope: Tensor, edges: Tensor) -> Tensor:
    """Documents packed into one sequence, q, k (1, H, N, D), v (1, H, N, Dv): edges (documents + 1,) = 0, ..., N. No document reads another.

    Documents of one length run as a batch.
    """
    if edges.dim() != 1 or int(edges[0]) != 0 or int(edges[-1]) != q.shape[2] or bool((edges.diff() <= 0).any()) or len(q) != 1:
        raise RegardError(f"edges={edges.tolist()}: expected a batch of 1 and rising positions from 0 to the length {q.shape[2]}")
    out = torch.empty_like(v)
    lengths = edges.diff()
    for length in lengths.unique().tolist():
        at = edges[:-1][lengths == length][:, None] + torch.arange(length, device=edges.device)  # (documents, length)
        a, b, c = (x[0][:, at].transpose(0, 1) for x in (q, k, v))
        out[0, :, at.flatten()] = lightning_blocks(a, b, c, slope)[0].transpose(0, 1).flatten(1, 2)
    return out
