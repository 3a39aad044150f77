"""HyperAttention: sorted-hash blocks exactly, the rest by sampled keys, joined in one softmax (id 74; Han et al., 2023).

queries and keys sorted by Gray-ordered angular hash; softmax inside aligned blocks (lse1); m sampled keys, lse2 + log(N / m)
o = c o1 + (1 - c) o2, c = 1 / (1 + e^{lse2 - lse1});  causal: first half recursively, second half = itself + all of the first
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.algebra import Causal, Input, Program, bind
from regard.algebra.blocks import heads_of
from regard.algebra.permute import Permutation, taken
from regard.catalog.registry import register
from regard.engine.composed import Call
from regard.engine.door import attend_with_stats
from regard.engine.meter import add, counting
from regard.errors import RegardError

Part = tuple[Tensor, Tensor]  # (out, log-sum-exp)


BUCKETS = ("adjacent", "gray")


@register("hyperattention")
def hyper(
    block_size: int = 256, samples: int = 256, hash_bits: int = 7, min_length: int = 4096, seed: int = 0, buckets: str = "adjacent",
    zero_keys: bool = False,
) -> Program:  # fmt: skip
    """hash_bits: random directions of the hash, drawn from `seed`. min_length: under this many queries attention is exact. buckets: in their
    order neighbours differ in one bit ("adjacent"), or they are numbered by the Gray code itself ("gray", as released). zero_keys: the zeros
    that fill the last block of sorted keys weigh in its softmax, as released. Differentiable in q, k and v with the hashes held fixed.
    Inputs, optional: `directions` (D, hash_bits); `draws` (B, heads of all levels, samples): sampled places in the order of sorted keys, under
    Causal() the innermost level first, where head h, half s is 2 h + s."""
    if buckets not in BUCKETS or min(block_size, hash_bits, min_length) < 1 or samples < 0:
        raise RegardError(
            f"block_size={block_size}, samples={samples}, hash_bits={hash_bits}, min_length={min_length}, buckets={buckets!r}: expected "
            f"positive numbers (samples from 0), and one of {', '.join(BUCKETS)}"
        )
    constants = {"block_size": block_size, "samples": samples, "hash_bits": hash_bits, "min_length": min_length, "seed": seed}
    inputs = (Input("directions", "df", default="pool"), Input("draws", "bff", default="pool", dtype="int"))
    return Program(bind(hyper_program, **constants, buckets=buckets, zero_keys=zero_keys), under="any", inputs=inputs)


def hyper_program(q: Tensor, k: Tensor, v: Tensor, call: Call, directions: Tensor | None, draws: Tensor | None, **constants: Any) -> Tensor:
    causal = isinstance(call.mask, Causal)
    return hyper_attention(q, k, v, causal=causal, scale=call.scale, directions=directions, draws=draws, **constants)[0]


def gray_rank(bits: Tensor) -> Tensor:
    """bits (..., r) bool -> the place of the code in the Gray sequence, in which neighbours differ in one bit."""
    # Prefix parity from the highest bit is the inverse of the Gray code.
    plain = bits.flip(-1).long().cumsum(-1) % 2
    return (plain * 2 ** torch.arange(bits.shape[-1] - 1, -1, -1, device=bits.device)).sum(-1)


def gray_code(bits: Tensor) -> Tensor:
    """bits (..., r) bool -> the code that stands at their number's place in the Gray sequence."""
    number = (bits.long() * 2 ** torch.arange(bits.shape[-1], device=bits.device)).sum(-1)
    return number ^ (number >> 1)


def angular_order(x: Tensor, directions: Tensor, buckets: str = "adjacent") -> Tensor:
    """Stable order of x (B, H, N, D) by hash bucket; directions (D, r)."""
    bits = x @ directions.to(x.dtype) > 0
    return (gray_rank(bits) if buckets == "adjacent" else gray_code(bits)).argsort(dim=-1, stable=True)


class Draws:
    """Where far keys are sampled: from a generator, or as given (B, heads of all levels, samples), level after level."""

    def __init__(self, seed: int, given: Tensor | None):
        self.generator, self.given, self.at = torch.Generator().manual_seed(seed), given, 0

    def take(self, n: int, heads: tuple[int, int], samples: int, device: torch.device) -> Tensor:
        if self.given is None:
            return torch.randint(n, (*heads, samples), generator=self.generator).to(device)
        found = self.given[:, self.at : self.at + heads[1]].expand(heads[0], -1, -1)
        self.at += heads[1]
        if found.shape[1:] != (heads[1], samples) or bool(((found < 0) | (found >= n)).any()):
            raise RegardError(
                f"input 'draws' has shape {tuple(self.given.shape)}; expected samples={samples} places below {n} for heads "
                f"{self.at - heads[1]} .. {self.at - 1} of the levels"
            )
        return found.to(device)

    def finish(self) -> None:
        if self.given is not None and self.at != self.given.shape[1]:
            raise RegardError(f"input 'draws' has {self.given.shape[1]} heads of levels; this call samples for {self.at}")


def exact(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None, extra: float = 0.0) -> Part:
    """Softmax attention of prepared tensors (..., n, D) with its log-sum-exp; extra is added to every log-sum-exp."""
    s = q @ k.transpose(-1, -2)
    add(s.numel() if seen is None else int(seen.expand(s.shape).sum()) if counting() else 0)
    s = s if seen is None else s.masked_fill(~seen, float("-inf"))
    lse = s.logsumexp(-1, keepdim=True)
    p = torch.exp(s - torch.where(lse.isfinite(), lse, 0.0))
    return p @ v, lse + extra


def whole(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Part:
    """`exact` of all keys, or of those up to the query's own place: q (B, H, n, D), its queries at the end of the keys."""
    if not (counting() or any(x.requires_grad for x in (q, k, v))):  # statistics of rows have no gradient
        out, stats = attend_with_stats(q, k, v, mask=Causal() if causal else None, scale=1.0)
        return out, stats.shift + stats.total.log()
    rows = torch.arange(k.shape[-2] - q.shape[-2], k.shape[-2], device=q.device)
    at = torch.arange(k.shape[-2], device=q.device)
    found = [
        exact(part, k, v, at <= now[:, None] if causal else None) for part, now in zip(q.split(1024, -2), rows.split(1024), strict=True)
    ]
    return torch.cat([o for o, _ in found], -2), torch.cat([lse for _, lse in found], -2)


def merged(a: Part, b: Part) -> Part:
    """One softmax over two disjoint sets of keys; either may be empty (lse -inf)."""
    lse = torch.logaddexp(a[1], b[1])
    safe = torch.where(lse.isfinite(), lse, 0.0)
    return a[0] * torch.exp(a[1] - safe) + b[0] * torch.exp(b[1] - safe), lse


@dataclass(frozen=True, eq=False)
class Sizes:
    """How one call cuts and samples."""

    block: int
    samples: int
    min_length: int
    directions: Tensor
    buckets: str
    zero_keys: bool
    draws: Draws


def filled(x: Tensor, size: int) -> Tensor:
    """x (B, H, N, D) filled up with zeros to a multiple of `size`."""
    return F.pad(x, (0, 0, 0, -x.shape[-2] % size))


def cross(q: Tensor, k: Tensor, v: Tensor, sizes: Sizes) -> Part:
    """All keys for all queries: sorted blocks and sampled keys. q comes scaled."""
    n, m, size = k.shape[-2], q.shape[-2], sizes.block
    if m < sizes.min_length or (n <= size and not sizes.zero_keys):
        return whole(q, k, v, causal=False)
    order_q, order_k = (Permutation(angular_order(x.detach(), sizes.directions, sizes.buckets)) for x in (q, k))
    qs, ks, vs = order_q.apply(q), order_k.apply(k), order_k.apply(v)
    count = -(-n // size)
    per = -(-filled(qs, size).shape[-2] // count)  # queries are filled up before they are cut, as released
    q_own = F.pad(qs, (0, 0, 0, count * per - m)) if count * per > m else qs
    q_own, k_own, v_own = q_own.unflatten(-2, (count, per)), *(filled(x, size).unflatten(-2, (count, size)) for x in (ks, vs))
    real = None
    if n % size and not sizes.zero_keys:
        real = (torch.arange(count * size, device=q.device) < n).unflatten(-1, (count, 1, size))
    near = tuple(x.flatten(-3, -2)[..., :m, :] for x in exact(q_own, k_own, v_own, real))
    result: Part = near  # type: ignore[assignment]
    if sizes.samples and m > per and n > size:
        drawn = sizes.draws.take(n, (q.shape[0], q.shape[1]), sizes.samples, q.device)
        keys, values = taken(ks, drawn), taken(vs, drawn)
        outside = (torch.arange(m, device=q.device)[:, None] // per) != drawn[..., None, :] // size
        far = [
            exact(part, keys, values, seen, math.log(n / sizes.samples))
            for part, seen in zip(qs.split(1024, -2), outside.split(1024, -2), strict=True)
        ]
        result = merged(near, (torch.cat([o for o, _ in far], -2), torch.cat([lse for _, lse in far], -2)))  # type: ignore[arg-type]
    return order_q.invert(result[0]), order_q.invert(result[1])


def triangle(q: Tensor, k: Tensor, v: Tensor, sizes: Sizes) -> Part:
    """Causal: both halves by themselves, side by side as heads, and the second half over all of the first."""
    n, behind = q.shape[-2], k.shape[-2] - q.shape[-2]
    if k.shape[-2] <= sizes.min_length or behind:
        return whole(q, k, v, causal=True)
    q, k, v = (filled(x, 2) for x in (q, k, v))  # a last, zero row sees all and is seen by none
    half = q.shape[-2] // 2
    halves = [x.unflatten(2, (2, half)).flatten(1, 2) for x in (q, k, v)]
    out, lse = (x.unflatten(1, (-1, 2)) for x in triangle(halves[0], halves[1], halves[2], sizes))
    late = merged((out[:, :, 1], lse[:, :, 1]), cross(q[:, :, half:], k[:, :, :half], v[:, :, :half], sizes))
    return torch.cat((out[:, :, 0], late[0]), 2)[:, :, :n], torch.cat((lse[:, :, 0], late[1]), 2)[:, :, :n]


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
    buckets: str = "adjacent",
    zero_keys: bool = False,
    directions: Tensor | None = None,
    draws: Tensor | None = None,
) -> Part:
    """(out (B, H, N, Dv), log-sum-exp (B, H, N, 1)); with causal, fewer queries than keys run exactly. Options as `hyper` has them."""
    given = Draws(seed, draws)
    if directions is None:
        directions = torch.randn(q.shape[-1], hash_bits, generator=given.generator, dtype=torch.float64).to(q)
    k, v = heads_of(k, q.shape[1]), heads_of(v, q.shape[1])
    q = q * (q.shape[-1] ** -0.5 if scale is None else scale)
    sizes = Sizes(block_size, samples, min_length, directions, buckets, zero_keys, given)
    result = triangle(q, k, v, sizes) if causal else cross(q, k, v, sizes)
    given.finish()
    return result


def spectral_parameters(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """(alpha, kappa) a head: N times the largest squared column norm of softmax(q k^T), and the ratio of largest to smallest row sum of exp."""
    s = q @ heads_of(k, q.shape[1]).transpose(-1, -2) * q.shape[-1] ** -0.5
    sums = torch.exp(s - s.amax((-1, -2), keepdim=True)).sum(-1)
    return k.shape[-2] * s.softmax(-1).square().sum(-2).amax(-1), sums.amax(-1) / sums.amin(-1)
