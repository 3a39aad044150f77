"""Arithmetic intensity of latent attention and mixtures of experts: FLOPs for every byte read (id 249; Yun et al., 2025).

decode, a token and layer, context L: heads 4 H d L FLOPs over 4 Hkv d L bytes (at 2 bytes): H / Hkv;   latent, absorbed:
q~ = W_UK^T q;  s_j = q~ . c_j + q_r . k_r,j;  o = W_UV (sum_j p_j c_j):  H (2 (dc + dr) + 2 dc) over 2 (dc + dr) a cached token
feed-forward, batch B: B;   experts: B k / E each, so that B must grow by E / k to match
`sweep` gives rows over batches and contexts, and `plot` draws them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regard.algebra import Rope
from regard.catalog.registry import register
from regard.errors import RegardError
from regard.plots import Plot, figure

# Peak FLOP/s of dense bf16 products and bytes/s of memory, from the vendors' data sheets.
DEVICES = {"a100": (312e12, 2.039e12), "h100": (989.4e12, 3.35e12), "h200": (989.4e12, 4.8e12)}
WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2, "float8": 1}


@dataclass(frozen=True)
class Heads:
    """Attention over a cache of keys and values: multi-head (kv_heads = heads), grouped, or multi-query (kv_heads = 1)."""

    heads: int
    kv_heads: int
    head_dim: int

    def decode(self, length: int, width: int) -> tuple[int, int]:
        """FLOPs, and bytes of the cache, of one token of one sequence."""
        return 4 * self.heads * self.head_dim * length, 2 * self.kv_heads * self.head_dim * length * width

    def prefill(self, length: int, width: int) -> tuple[int, int]:
        """Of a whole prompt under a causal mask (every pair counted once); queries, keys, values and outputs pass memory once."""
        pairs = length * (length + 1) // 2
        return 4 * self.heads * self.head_dim * pairs, 2 * (self.heads + self.kv_heads) * self.head_dim * length * width


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention: a cache of `latent` + `rope` numbers a token. absorbed: whether keys and values stay latent in decoding."""

    heads: int
    latent: int = 512
    rope: int = 64
    head_dim: int = 128
    absorbed: bool = True

    def decode(self, length: int, width: int) -> tuple[int, int]:
        if self.absorbed:
            flops = self.heads * length * (2 * (self.latent + self.rope) + 2 * self.latent)
        else:  # keys and values of every cached token are made anew
            flops = self.heads * length * (4 * self.head_dim * self.latent + 2 * (self.head_dim + self.rope) + 2 * self.head_dim)
        return flops, (self.latent + self.rope) * length * width

    def absorption(self) -> int:
        """FLOPs that absorbing adds a token, whatever the length: weights, read once for a batch."""
        return 4 * self.heads * self.head_dim * self.latent

    def prefill(self, length: int, width: int) -> tuple[int, int]:
        """Expanded: ordinary attention of heads of head_dim + rope and values of head_dim."""
        pairs = length * (length + 1) // 2
        wide = self.head_dim + self.rope
        return 2 * self.heads * pairs * (wide + self.head_dim), self.heads * length * 2 * (wide + self.head_dim) * width


@dataclass(frozen=True)
class FeedForward:
    """Dense layer of `weights` numbers, or `experts` of so many each, of which a token takes top_k; devices share the experts."""

    weights: int
    experts: int = 1
    top_k: int = 1
    devices: int = 1

    def decode(self, batch: int, width: int) -> tuple[float, float]:
        """FLOPs and bytes of weights of a step on one device: batch tokens in all, weights of touched experts read once."""
        if self.experts == 1:
            return 2.0 * batch * self.weights, float(self.weights * width)
        here = self.experts / self.devices
        touched = here * (1 - (1 - self.top_k / self.experts) ** batch)  # each token takes top_k different ones
        return 2.0 * batch * self.top_k / self.devices * self.weights, touched * self.weights * width


@dataclass(frozen=True)
class Intensity:
    flops: float
    bytes: float

    @property
    def ratio(self) -> float:
        """FLOPs for every byte."""
        return self.flops / self.bytes

    def bound(self, device: str | tuple[float, float]) -> str:
        """ "compute" or "memory" on a device, by name or as (FLOP/s, bytes/s)."""
        return "compute" if self.ratio >= ridge(device) else "memory"

    def seconds(self, device: str | tuple[float, float]) -> float:
        """The roofline's time."""
        speed, stream = of_device(device)
        return max(self.flops / speed, self.bytes / stream)


def of_device(device: str | tuple[float, float]) -> tuple[float, float]:
    found = DEVICES.get(device) if isinstance(device, str) else device
    if found is None or min(found) <= 0:
        raise RegardError(f"device {device!r}: expected one of {', '.join(DEVICES)}, or (FLOP/s, bytes/s)")
    return found


def ridge(device: str | tuple[float, float]) -> float:
    """FLOPs for every byte at which a device computes as long as it reads."""
    speed, stream = of_device(device)
    return speed / stream


@register("mla-moe-intensity", kind="experiment")
def intensity(
    arch: Heads | Latent | FeedForward, phase: str = "decode", batch: int = 1, length: int = 1, dtype: str = "bfloat16"
) -> Intensity:
    """FLOPs and bytes of one layer's step. Attention: each sequence of the batch reads a cache of its own. phase: "decode" or "prefill"."""
    if phase not in ("decode", "prefill") or batch < 1 or length < 1 or dtype not in WIDTHS:
        raise RegardError(
            f"phase={phase!r}, batch={batch}, length={length}, dtype={dtype!r}: expected 'decode' or 'prefill', positive numbers, {', '.join(WIDTHS)}"
        )
    width = WIDTHS[dtype]
    if isinstance(arch, FeedForward):
        return Intensity(*arch.decode(batch * (length if phase == "prefill" else 1), width))
    flops, moved = arch.decode(length, width) if phase == "decode" else arch.prefill(length, width)
    return Intensity(batch * flops, batch * moved)


def balanced_batch(moe: FeedForward, dense_batch: int) -> int:
    """The batch over the whole pool at which an expert's intensity is a dense layer's at `dense_batch`: dense_batch E / k."""
    return math.ceil(dense_batch * moe.experts / moe.top_k)


def sweep(archs: dict[str, Any], batches: Sequence[int], lengths: Sequence[int], dtype: str = "bfloat16") -> list[dict[str, Any]]:
    """A row for every architecture, batch and length of decoding: name, batch, length, flops, bytes, ratio."""
    rows = []
    for name, arch in archs.items():
        for batch in batches:
            for length in lengths:
                found = intensity(arch, "decode", batch, length, dtype)
                rows.append(
                    {"name": name, "batch": batch, "length": length, "flops": found.flops, "bytes": found.bytes, "ratio": found.ratio}
                )
    return rows


def plot(rows: Sequence[dict[str, Any]], over: str = "batch", device: str | tuple[float, float] | None = None) -> Plot:
    """Intensity over "batch" or "length" of `sweep`'s rows, a line for each name (and each value of the other, where there are several), and the
    ridge of a device, where it is given."""
    if over not in ("batch", "length") or not rows:
        raise RegardError(f"over={over!r}, {len(rows)} rows; expected batch or length, and rows of a sweep")
    other = "length" if over == "batch" else "batch"
    several = len({row[other] for row in rows}) > 1
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        lines.setdefault(f"{row['name']}, {other} {row[other]}" if several else row["name"], []).append((row[over], row["ratio"]))
    if device is not None:
        at = [float(row[over]) for row in rows]
        lines["ridge"] = [(x, ridge(device)) for x in (min(at), max(at))]
    return figure("Arithmetic intensity of decoding", over, "FLOP a byte", lines, log_x=True, log_y=True)


class LatentAttention(nn.Module):
    """Multi-head latent attention with its cache: x (B, n, dim), cache (B, L, latent + rope) or None -> (B, n, dim), new cache.

    absorbed: products with W_UK and W_UV on the queries' side, or keys and values made of the cache. Rotary positions turn the `rope` channels alone;
    scores are scaled by (head_dim + rope)^-1/2.
    """

    def __init__(self, dim: int, heads: int, latent: int = 512, rope: int = 64, head_dim: int = 128):
        super().__init__()
        self.heads, self.latent, self.head_dim, self.rope = heads, latent, head_dim, Rope()
        self.q = nn.Linear(dim, heads * (head_dim + rope), False)
        self.down = nn.Linear(dim, latent + rope, False)
        self.up_k, self.up_v = (nn.Parameter(torch.randn(heads, head_dim, latent) * latent**-0.5) for _ in range(2))
        self.out = nn.Linear(heads * head_dim, dim, False)

    def forward(self, x: Tensor, cache: Tensor | None = None, absorbed: bool = True) -> tuple[Tensor, Tensor]:
        start = 0 if cache is None else cache.shape[1]
        places = torch.arange(start, start + x.shape[1], device=x.device)
        new = self.down(x)
        new = torch.cat((new[..., : self.latent], self.rope.rotate(new[..., self.latent :], places)), -1)
        cache = new if cache is None else torch.cat((cache, new), 1)
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        q, turned = q[..., : self.head_dim], self.rope.rotate(q[..., self.head_dim :], places)
        c, k_r = cache[:, None, :, : self.latent], cache[:, None, :, self.latent :]
        if absorbed:
            s = torch.cat((q @ self.up_k, turned), -1) @ cache[:, None].transpose(-1, -2)
        else:
            k = c @ self.up_k.transpose(-1, -2)
            s = torch.cat((q, turned), -1) @ torch.cat((k, k_r.expand(-1, self.heads, -1, -1)), -1).transpose(-1, -2)
        s = s * (self.head_dim + k_r.shape[-1]) ** -0.5
        p = s.masked_fill(torch.arange(cache.shape[1], device=x.device) > places[:, None], -torch.inf).softmax(-1)
        o = (p @ c) @ self.up_v.transpose(-1, -2) if absorbed else p @ (c @ self.up_v.transpose(-1, -2))
        return self.out(o.transpose(1, 2).flatten(2)), cache
