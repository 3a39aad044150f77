"""Ring self-attention: keys, then values, pass from host to host under exact softmax (id 194; Li et al., 2021).

pass 1: S^n[:, block i] = Q^n (K^i)^T / sqrt(d) for every K^i that comes by;  P^n = softmax(S^n);   pass 2: O^n = sum_i P^n[:, block i] V^i
backward: dP = dO V^T and dS = P (dP - rowsum(dP P)) as the blocks pass again; dK, dV travel with their block and end at its owner
Linformer: K~ = sum over hosts of E[:, block] K^block, and V~, by one sum over hosts; a host holds k projected keys whatever the length
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from regard.catalog.registry import register
from regard.errors import RegardError
from regard.parallel.hosts import Hosts, VirtualHosts, alike

Parts = Sequence[Tensor]


def round_trip(hosts: Hosts, parts: list[Tensor], see: Any) -> list[Tensor]:
    """Let every part pass every host: see(m, owner, part) on the hosts of this process. Returns the parts as the last hosts have them."""
    for hop in range(hosts.count):
        for m, at in enumerate(hosts.mine):
            see(m, (at - hop) % hosts.count, parts[m])
        if hop < hosts.count - 1:
            parts = hosts.shift(parts)
    return parts


class Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hosts: Hosts, causal: bool, scale: float, *flat: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        q, k, v = flat[0::3], list(flat[1::3]), list(flat[2::3])
        c = q[0].shape[2]
        s = [a.new_empty(*a.shape[:3], hosts.count * c) for a in q]

        def keys(m: int, owner: int, part: Tensor) -> None:
            s[m][..., owner * c : (owner + 1) * c] = q[m] @ part.transpose(-1, -2) * scale

        round_trip(hosts, k, keys)
        p = []
        for m, at in enumerate(hosts.mine):
            if causal:
                mine = at * c + torch.arange(c, device=s[m].device)
                s[m].masked_fill_(torch.arange(hosts.count * c, device=s[m].device) > mine[:, None], -torch.inf)
            wide = torch.promote_types(s[m].dtype, torch.float32)
            p.append(s[m].to(wide).softmax(-1).to(s[m].dtype))
        o = [torch.zeros_like(b) for b in v]

        def values(m: int, owner: int, part: Tensor) -> None:
            o[m] += p[m][..., owner * c : (owner + 1) * c] @ part

        round_trip(hosts, v, values)
        ctx.hosts, ctx.scale = hosts, scale
        ctx.save_for_backward(*flat, *p)
        return tuple(o)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        hosts: Hosts = ctx.hosts
        count = len(slopes)
        flat, p = ctx.saved_tensors[: 3 * count], ctx.saved_tensors[3 * count :]
        q, k, v = flat[0::3], flat[1::3], flat[2::3]
        c = q[0].shape[2]
        dp = [torch.empty_like(x) for x in p]

        def values(m: int, owner: int, both: Tensor) -> None:
            part = both[..., : v[m].shape[-1]]
            block = slice(owner * c, (owner + 1) * c)
            dp[m][..., block] = slopes[m] @ part.transpose(-1, -2)
            both[..., v[m].shape[-1] :] += p[m][..., block].transpose(-1, -2) @ slopes[m]

        dv = home(hosts, round_trip(hosts, [torch.cat((x, torch.zeros_like(x)), -1) for x in v], values), v)
        ds = [x * (y - (x * y).sum(-1, keepdim=True)) * ctx.scale for x, y in zip(p, dp, strict=True)]
        dq = [torch.zeros_like(x) for x in q]

        def keys(m: int, owner: int, both: Tensor) -> None:
            d = ds[m][..., owner * c : (owner + 1) * c]
            dq[m].add_(d @ both[..., : k[m].shape[-1]])
            both[..., k[m].shape[-1] :] += d.transpose(-1, -2) @ q[m]

        dk = home(hosts, round_trip(hosts, [torch.cat((x, torch.zeros_like(x)), -1) for x in k], keys), k)
        return None, None, None, *[x for three in zip(dq, dk, dv, strict=True) for x in three]


def home(hosts: Hosts, parts: list[Tensor], like: Parts) -> list[Tensor]:
    """The sums that travelled with their blocks, one hop further, at the blocks' owners."""
    return [x[..., y.shape[-1] :].contiguous() for x, y in zip(hosts.shift(parts), like, strict=True)]


def checked(q: Parts, k: Parts, v: Parts, hosts: Hosts | None) -> Hosts:
    held = VirtualHosts(len(q)) if hosts is None else hosts
    for name, parts in (("q", q), ("k", k), ("v", v)):
        alike(name, parts)
    if not len(q) == len(k) == len(v) == len(held.mine) or q[0].shape != k[0].shape or q[0].shape[:3] != v[0].shape[:3]:
        raise RegardError(
            f"{len(q)}, {len(k)}, {len(v)} parts for {len(held.mine)} hosts: expected q, k (B, H, C, D) and v (B, H, C, Dv), one a host"
        )
    return held


@register("ring-self-attention", kind="function")
def ring_self_attention(
    q: Parts, k: Parts, v: Parts, hosts: Hosts | None = None, causal: bool = False, scale: float | None = None
) -> list[Tensor]:
    """Exact softmax attention of a sequence cut over hosts: each host's q, k, v (B, H, C, D) -> its outputs.

    hosts: None for as many virtual ones as parts, or `ProcessHosts()` with this process's parts. A host holds scores (B, H, C, L) and one block of keys
    or values at a time; it sends (hosts - 1) blocks of keys and as many of values forward. scale: None is D^-1/2.
    """
    held = checked(q, k, v, hosts)
    out = Ring.apply(
        held, causal, q[0].shape[-1] ** -0.5 if scale is None else scale, *[x for three in zip(q, k, v, strict=True) for x in three]
    )
    return list(out)


class Summed(torch.autograd.Function):
    """The sum of all hosts' parts, for every host; its gradient is the sum of all hosts' gradients."""

    @staticmethod
    def forward(ctx: Any, hosts: Hosts, *parts: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        ctx.hosts = hosts
        total = torch.stack(hosts.gather([part.detach() for part in parts])).sum(0)
        return tuple(total.clone() for _ in parts)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        total = torch.stack(ctx.hosts.gather(list(slopes))).sum(0)
        return None, *[total for _ in slopes]


def linformer_ring_attention(
    q: Parts, k: Parts, v: Parts, e: Parts, f: Parts, hosts: Hosts | None = None, scale: float | None = None
) -> list[Tensor]:
    """Attention to projected keys E K and values F V; e, f: each host's columns (k, C) of E and F (k, L)."""
    held = checked(q, k, v, hosts)
    if any(x.shape[1] != a.shape[2] for x, a in zip([*e, *f], [*q, *q], strict=True)):
        raise RegardError("e, f: expected one (k, C) a host, C its tokens")
    keys, values = ([w @ x for w, x in zip(ws, xs, strict=True)] for ws, xs in ((e, k), (f, v)))
    both = Summed.apply(held, *[torch.cat((a, b), -1) for a, b in zip(keys, values, strict=True)])
    outs, width = [], k[0].shape[-1]
    for a, x in zip(q, both, strict=True):
        s = a @ x[..., :width].transpose(-1, -2) * (width**-0.5 if scale is None else scale)
        outs.append(s.softmax(-1) @ x[..., width:])
    return outs


class SequenceParallelBlock(nn.Module):
    """x + attention(LN(x)), then x + MLP(LN(x)), of a sequence cut over hosts: parts (B, C, dim) -> parts. All but attention is local."""

    def __init__(self, dim: int, heads: int, hidden: int | None = None, causal: bool = False):
        super().__init__()
        if dim % heads:
            raise RegardError(f"dim={dim}, heads={heads}: expected a multiple")
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden or 4 * dim), nn.GELU(), nn.Linear(hidden or 4 * dim, dim))

    def forward(self, parts: list[Tensor], hosts: Hosts | None = None) -> list[Tensor]:
        three = [self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4) for x in parts]
        found = ring_self_attention([x[0] for x in three], [x[1] for x in three], [x[2] for x in three], hosts, self.causal)
        parts = [x + self.out(o.transpose(1, 2).flatten(2)) for x, o in zip(parts, found, strict=True)]
        return [x + self.mlp(self.norm2(x)) for x in parts]
