"""LASP-2: linear attention over hosts that exchange their states once forward and once backward (id 172; Sun et al., 2025).

M_t = K_t^T V_t;  all-gather M;  P_t = sum_{i<t} M_i;  O_t = tril(Q_t K_t^T) V_t + Q_t P_t          (bidirectional: O_t = Q_t sum_i M_i)
N_t = Q_t^T dO_t;  all-gather N;  R_t = sum_{i>t} N_i;  dQ_t = tril(dO_t V_t^T) K_t + dO_t P_t^T;  dK_t = tril(.)^T Q_t + V_t R_t^T;  dV_t likewise
with a decay e^-slope a token: P_t = D_{t-1} P_{t-1} + M_{t-1}, D = e^{-slope C}, and fades inside a chunk.   2H: softmax over gathered K and V
Not built: the older LASP-1 ring; Ring Attention's two passes are the row ring-self-attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from regard.algebra import Causal, Weighted
from regard.catalog.registry import register
from regard.engine.door import attend
from regard.errors import RegardError
from regard.parallel.hosts import Hosts, VirtualHosts, alike

Parts = Sequence[Tensor]


def fades(slope: Tensor | None, length: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of queries and keys (H, C, 1), of pairs (H, C, C) with zeros above the diagonal, and of a whole chunk (H, 1, 1)."""
    at = torch.arange(length, device=like.device, dtype=like.dtype)
    rate = like.new_zeros(like.shape[1], 1) if slope is None else slope.to(like)[:, None]
    pairs = torch.exp(-rate[..., None] * (at[:, None] - at).clamp_min(0)).tril()
    return (
        torch.exp(-rate * (at + 1))[..., None],
        torch.exp(-rate * (length - 1 - at))[..., None],
        pairs,
        torch.exp(-rate * length)[..., None],
    )


def scanned(states: list[Tensor], fade: Tensor, back: bool) -> list[Tensor]:
    """For every host the states of those before it (behind it, where back), each faded by the chunks between."""
    found, total = [], torch.zeros_like(states[0])
    for state in reversed(states) if back else states:
        found.append(total)
        total = total * fade + state
    return found[::-1] if back else found


class Lasp2(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hosts: Hosts, causal: bool, slope: Tensor | None, *flat: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        q, k, v = flat[0::3], flat[1::3], flat[2::3]
        fade_q, fade_k, pairs, whole = fades(slope, q[0].shape[2], q[0])
        if not causal:
            fade_q, fade_k, whole = (torch.ones_like(x) for x in (fade_q, fade_k, whole))
        states = hosts.gather([(b * fade_k).transpose(-1, -2) @ c for b, c in zip(k, v, strict=True)])
        before = scanned(states, whole, False) if causal else [torch.stack(states).sum(0)] * hosts.count
        mine = [before[at] for at in hosts.mine]
        ctx.hosts, ctx.causal, ctx.fades = hosts, causal, (fade_q, fade_k, pairs, whole)
        ctx.save_for_backward(*flat, *mine)
        outs = []
        for a, b, c, p in zip(q, k, v, mine, strict=True):
            o = (a * fade_q) @ p
            outs.append(o + (a @ b.transpose(-1, -2) * pairs) @ c if causal else o)
        return tuple(outs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        count = len(slopes)
        flat, mine = ctx.saved_tensors[: 3 * count], ctx.saved_tensors[3 * count :]
        fade_q, fade_k, pairs, whole = ctx.fades
        q, k, v = flat[0::3], flat[1::3], flat[2::3]
        states = ctx.hosts.gather([(a * fade_q).transpose(-1, -2) @ d for a, d in zip(q, slopes, strict=True)])
        behind = scanned(states, whole, True) if ctx.causal else [torch.stack(states).sum(0)] * ctx.hosts.count
        found: list[Tensor | None] = []
        for a, b, c, d, p, at in zip(q, k, v, slopes, mine, ctx.hosts.mine, strict=True):
            r = behind[at]
            dq, dk, dv = d @ p.transpose(-1, -2) * fade_q, c @ r.transpose(-1, -2) * fade_k, (b * fade_k) @ r
            if ctx.causal:
                own = d @ c.transpose(-1, -2) * pairs
                dq, dk = dq + own @ b, dk + own.transpose(-1, -2) @ a
                dv = dv + (a @ b.transpose(-1, -2) * pairs).transpose(-1, -2) @ d
            found += [dq, dk, dv]
        return None, None, None, *found


def checked(q: Parts, k: Parts, v: Parts, hosts: Hosts | None) -> Hosts:
    held = VirtualHosts(len(q)) if hosts is None else hosts
    for name, parts in (("q", q), ("k", k), ("v", v)):
        alike(name, parts)
    if not len(q) == len(k) == len(v) == len(held.mine) or q[0].dim() != 4 or q[0].shape[:3] != v[0].shape[:3]:
        raise RegardError(
            f"{len(q)}, {len(k)}, {len(v)} parts for {len(held.mine)} hosts: expected q, k, v (B, H, C, D) of one length, one a host"
        )
    return held


@register("lasp-2", kind="function")
def lasp2(q: Parts, k: Parts, v: Parts, hosts: Hosts | None = None, causal: bool = True, slope: Tensor | None = None) -> list[Tensor]:
    """Unnormalised linear attention of a sequence cut over hosts: each host's q, k (B, H, C, D) and v (B, H, C, Dv) -> its outputs.

    q, k come behind their feature maps. hosts: None for as many virtual ones as parts, or `ProcessHosts()` with this process's parts alone. slope (H,):
    a decay exp(-slope) a token (no gradient). What travels is one state (B, H, D, Dv) a host, forward and backward, whatever the length.
    """
    held = checked(q, k, v, hosts)
    if q[0].shape != k[0].shape or (slope is not None and (slope.shape != q[0].shape[1:2] or not causal)):
        raise RegardError(
            f"q {tuple(q[0].shape)}, k {tuple(k[0].shape)}, slope={slope}: expected q as k, and slopes (H,) for causal attention alone"
        )
    out = Lasp2.apply(held, causal, slope, *[x for three in zip(q, k, v, strict=True) for x in three])
    return list(out)


class Gathered(torch.autograd.Function):
    """All hosts' parts side by side for every host of this process; gradients go back to their owners."""

    @staticmethod
    def forward(ctx: Any, hosts: Hosts, *parts: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        ctx.hosts = hosts
        whole = torch.cat(hosts.gather([part.detach() for part in parts]), 2)
        return tuple(whole.clone() for _ in parts)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.hosts.collect([list(slope.chunk(ctx.hosts.count, 2)) for slope in slopes])


def lasp2h_attention(
    q: Parts, k: Parts, v: Parts, hosts: Hosts | None = None, causal: bool = True, scale: float | None = None
) -> list[Tensor]:
    """Softmax attention for the hybrid's other layers: keys and values are gathered, each host keeps its queries."""
    held = checked(q, k, v, hosts)
    outs = []
    for a, b, c, at in zip(q, Gathered.apply(held, *k), Gathered.apply(held, *v), held.mine, strict=True):
        end = (at + 1) * a.shape[2] if causal else b.shape[2]
        outs.append(attend(a, b[:, :, :end], c[:, :, :end], Weighted(mask=Causal()) if causal else Weighted(), scale=scale))
    return outs
