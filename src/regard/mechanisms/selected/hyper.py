"""HyperAttention: sorted-hash blocks exactly, the rest by sampled keys, joined in one softmax (id 74; Han et al., 2023).

queries and keys sorted by Gray-ordered angular hash; softmax inside aligned blocks (lse1); m sampled keys, lse2 + log(N / m)
o = c o1 + (1 - c) o2, c = 1 / (1 + e^{lse2 - lse1});  causal: first half recursively, second half = itself + all of the first
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ...algebra import Causal, Program, bind
from ...algebra.blocks import heads_of
from ...catalog.registry import register
from ...engine.composed import Call
from ...engine.meter import add, counting

Part = tuple[Tensor, Tensor]  # (out, log-sum-exp)


@register("hyperattention")
def hyper(block_size: int = 256, samples: int = 256, hash_bits: int = 7, min_length: int = 4096, seed: int = 0) -> Program:
    """hash_bits: random directions of the hash, drawn from `seed`. min_length: under this many queries attention is exact.
    Differentiable in q, k and v with the hashes held fixed."""
    constants = {"block_size": block_size, "samples": samples, "hash_bits": hash_bits, "min_length": min_length, "seed": seed}
    return Program(bind(hyper_program, **constants), under="any")


def hyper_program(q: Tensor, k: Tensor, v: Tensor, call: Call, **constants: int) -> Tensor:
    return hyper_attention(q, k, v, causal=isinstance(call.mask, Causal), scale=call.scale, **constants)[0]


def gray_rank(bits: Tensor) -> Tensor:
    """bits (..., r) bool -> the place of the code in the Gray sequence, in which neighbours differ in one bit."""
    # Prefix parity from the highest bit is the inverse of the Gray code.
    plain = bits.flip(-1).long().cumsum(-1) % 2
    return (plain * 2 ** torch.arange(bits.shape[-1] - 1, -1, -1, device=bits.device)).sum(-1)


def angular_order(x: Tensor, directions: Tensor) -> Tensor:
    """Stable order of x (B, H, N, D) by hash bucket; directions (D, r)."""
    return gray_rank(x @ directions > 0).argsort(dim=-1, stable=True)


def exact(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None, extra: float = 0.0) -> Part:
    """Softmax attention of prepared tensors (..., n, D) with its log-sum-exp; extra is added to every log-sum-exp."""
    s = q @ k.transpose(-1, -2)
    add(s.numel() if seen is None else int(seen.expand(s.shape).sum()) if counting() else 0)
    s = s if seen is None else s.masked_fill(~seen, float("-inf"))
    lse = s.logsumexp(-1, keepdim=True)
    p = torch.exp(s - torch.where(lse.isfinite(), lse, 0.0))
    return p @ v, lse + extra


def merged(a: Part, b: Part) -> Part:
    """One softmax over two disjoint sets of keys; either may be empty (lse -inf)."""
    lse = torch.logaddexp(a[1], b[1])
    safe = torch.where(lse.isfinite(), lse, 0.0)
    return a[0] * torch.exp(a[1] - safe) + b[0] * torch.exp(b[1] - safe), lse


def by_rows(attention: Callable[..., Part], q: Tensor, *rest: Tensor, rows: int = 1024) -> Part:
    """Rows of queries a piece at a time: no matrix wider than `rows` x keys."""
    found = [attention(part, *rest) for part in q.split(rows, -2)]
    return torch.cat([o for o, _ in found], -2), torch.cat([lse for _, lse in found], -2)


def core(
    q: Tensor, k: Tensor, v: Tensor, block_size: int, samples: int, directions: Tensor, min_length: int, generator: torch.Generator
) -> Part:
    """All keys for all queries: sorted blocks and sampled keys. q comes scaled."""
    n, m = k.shape[-2], q.shape[-2]
    if n <= block_size or m < min_length:
        return by_rows(exact, q, k, v)
    order_q, order_k = angular_order(q.detach(), directions), angular_order(k.detach(), directions)
    qs, ks, vs = (x.gather(-2, o[..., None].expand_as(x)) for x, o in ((q, order_q), (k, order_k), (v, order_k)))
    count = -(-n // block_size)
    q_block = -(-m // count)
    q_own, k_own, v_own = (
        torch.nn.functional.pad(x, (0, 0, 0, count * size - x.shape[-2])).unflatten(-2, (count, size))
        for x, size in ((qs, q_block), (ks, block_size), (vs, block_size))
    )
    real = (torch.arange(count * block_size, device=q.device) < n).unflatten(-1, (count, 1, block_size))
    near = tuple(x.flatten(-3, -2)[..., :m, :] for x in exact(q_own, k_own, v_own, real))
    if not samples:
        result = near
    else:
        drawn = torch.randint(n, (*q.shape[:2], samples), generator=generator).to(q.device)
        keys, values = (x.gather(-2, drawn[..., None].expand(*drawn.shape, x.shape[-1])) for x in (ks, vs))
        outside = (torch.arange(m, device=q.device)[:, None] // q_block) != drawn[..., None, :] // block_size
        far = [
            exact(part, keys, values, seen, math.log(n / samples))
            for part, seen in zip(qs.split(1024, -2), outside.split(1024, -2), strict=True)
        ]
        result = merged(near, (torch.cat([o for o, _ in far], -2), torch.cat([lse for _, lse in far], -2)))  # type: ignore[arg-type]
    back = order_q.argsort(-1)[..., None]
    return tuple(x.gather(-2, back.expand(*back.shape[:-1], x.shape[-1])) for x in result)  # type: ignore[return-value]


def hyper_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    block_size: int = 256,
    samples: int = 256,
    hash_bits: int = 7,
    min_length: int = 4096,
    seed: int = 0,
    scale: float | None = None,
) -> Part:
    """(out (B, H, N, Dv), log-sum-exp (B, H, N, 1)); causal needs as many queries as keys."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(q.shape[-1], hash_bits, generator=generator, dtype=torch.float64).to(q)
    k, v = heads_of(k, q.shape[1]), heads_of(v, q.shape[1])
    q = q * (q.shape[-1] ** -0.5 if scale is None else scale)

    def cross(q: Tensor, k: Tensor, v: Tensor) -> Part:
        return core(q, k, v, block_size, samples, directions, min_length // 2 if causal else min_length, generator)

    def triangle(q: Tensor, k: Tensor, v: Tensor) -> Part:
        n, behind = q.shape[-2], k.shape[-2] - q.shape[-2]
        if n <= min_length or behind:
            at, rows = torch.arange(k.shape[-2], device=q.device), torch.arange(behind, behind + n, device=q.device)
            found = [exact(part, k, v, at <= now[:, None]) for part, now in zip(q.split(1024, -2), rows.split(1024), strict=True)]
            return torch.cat([o for o, _ in found], -2), torch.cat([lse for _, lse in found], -2)
        half = n // 2
        first = triangle(q[..., :half, :], k[..., :half, :], v[..., :half, :])
        own = triangle(q[..., half:, :], k[..., half:, :], v[..., half:, :])
        second = merged(own, cross(q[..., half:, :], k[..., :half, :], v[..., :half, :]))
        return torch.cat((first[0], second[0]), -2), torch.cat((first[1], second[1]), -2)

    return triangle(q, k, v) if causal else cross(q, k, v)


def spectral_parameters(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """(alpha, kappa) a head: N times the largest squared column norm of softmax(q k^T), and the ratio of largest to smallest row sum of exp."""
    s = q @ heads_of(k, q.shape[1]).transpose(-1, -2) * q.shape[-1] ** -0.5
    sums = torch.exp(s - s.amax((-1, -2), keepdim=True)).sum(-1)
    return k.shape[-2] * s.softmax(-1).square().sum(-2).amax(-1), sums.amax(-1) / sums.amin(-1)
