"""Checks of mla-moe-intensity."""

from __future__ import annotations

from typing import Any

import torch

from regard.lab import naive
from regard.lab.checks.shared.comparing import F64, flops
from regard.lab.verification import check
from regard.zoo.systems.mla_moe_intensity import FeedForward, Heads, Latent, LatentAttention, balanced_batch, intensity, ridge, sweep


def counted(arch: Heads | Latent, batch: int, length: int) -> tuple[int, int]:
    """Products of a decoding step as they run, and bytes of the cache they read (bf16)."""
    if isinstance(arch, Heads):
        q = torch.randn(batch, arch.kv_heads, arch.heads // arch.kv_heads, arch.head_dim)
        k, v = (torch.randn(batch, arch.kv_heads, length, arch.head_dim) for _ in range(2))
        return flops(lambda: (q @ k.transpose(-1, -2)).softmax(-1) @ v), 2 * (k.numel() + v.numel())
    c = torch.randn(batch, 1, length, arch.latent + arch.rope)
    up_k, up_v = (torch.randn(arch.heads, arch.head_dim, arch.latent) for _ in range(2))
    q, r = torch.randn(batch, arch.heads, 1, arch.head_dim), torch.randn(batch, arch.heads, 1, arch.rope)

    def absorbed() -> torch.Tensor:
        wide = torch.randn(batch, arch.heads, arch.latent + arch.rope)  # q W_UK beside the turned part
        p = (wide @ c[:, 0].transpose(-1, -2)).softmax(-1)
        return p @ c[:, 0, :, : arch.latent]

    def expanded() -> torch.Tensor:
        k, v = (c[..., : arch.latent] @ up.transpose(-1, -2) for up in (up_k, up_v))
        both = torch.cat((k, c[..., arch.latent :].expand(-1, arch.heads, -1, -1)), -1)
        return (torch.cat((q, r), -1) @ both.transpose(-1, -2)).softmax(-1) @ v

    return flops(absorbed if arch.absorbed else expanded), 2 * c.numel()


SHAPES = (Heads(8, 8, 16), Heads(8, 2, 32), Heads(12, 1, 8), Latent(6, 32, 8, 16), Latent(6, 32, 8, 16, absorbed=False))


@check(
    "mla-moe-intensity",
    "FLOPs and bytes of decoding, five shapes: gap to products that run and tensors that are read",
    below=0.0,
    control="one key head counted as all",
)
def _() -> tuple[float, float]:
    own, other = 0.0, 0.0
    for batch, length in ((1, 37), (3, 20)):
        for arch in SHAPES:
            found, truth = intensity(arch, "decode", batch, length), counted(arch, batch, length)
            own = max(own, abs(found.flops - truth[0]), abs(found.bytes - truth[1]))
            if isinstance(arch, Heads) and arch.kv_heads < arch.heads:
                other = max(other, abs(intensity(Heads(arch.heads, arch.heads, arch.head_dim), "decode", batch, length).bytes - truth[1]))
    return own, other


@check(
    "mla-moe-intensity",
    "DeepSeek's shape over multi-head attention, in bf16 (the claim: over two orders of magnitude)",
    above=100.0,
    control="8 query heads a key head",
)
def _() -> tuple[float, float]:
    latent, full, grouped = (intensity(one, "decode", 7, 4096).ratio for one in (Latent(128), Heads(128, 128, 128), Heads(64, 8, 128)))
    assert (full, grouped) == (1.0, 8.0) and abs(latent - 128 * 2176 / 1152) < 1e-9
    assert (
        intensity(Latent(128), "decode", 4, 9).bound("h100") == "memory"
        and intensity(Latent(128), "decode", 4, 9).bound("a100") == "compute"
    )
    assert abs(ridge("h100") - 295) < 1 and abs(ridge("h200") - 206) < 1 and abs(ridge("a100") - 153) < 1
    return latent / full, grouped / full


@check(
    "mla-moe-intensity", "multi-head intensity over lengths, batches and widths, times the width: spread", below=1e-12, control="prefill"
)
def _() -> tuple[float, float]:
    found = [row["ratio"] for row in sweep({"mha": Heads(8, 8, 64)}, (1, 7, 64), (10, 999))]
    found += [2 * intensity(Heads(8, 8, 64), "decode", 2, 50, "float32").ratio]
    long = [intensity(Heads(8, 8, 64), "prefill", 1, n).ratio for n in (10, 999)]
    return max(found) - min(found), max(long) - min(long)


@check(
    "mla-moe-intensity",
    "latent attention absorbed and expanded, a prompt of 9 and three steps: gap, and to heads in loops",
    below=1e-9,
    control="the cache's positions not turned",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    layer, x = LatentAttention(24, 3, 10, 4, 6).double(), torch.randn(2, 12, 24, dtype=F64)
    outs = []
    cache: Any = None
    for start, stop in ((0, 9), (9, 10), (10, 11), (11, 12)):
        y, cache = layer(x[:, start:stop], cache)
        outs.append(y)
    whole, sizes = torch.cat(outs, 1), cache.shape
    assert sizes == (2, 12, 14)

    def by_hand(turn: bool) -> torch.Tensor:
        down, q = layer.down(x), layer.q(x).view(2, 12, 3, 10).transpose(1, 2)
        at = torch.arange(12)
        k_r = layer.rope.rotate(down[..., 10:], at) if turn else down[..., 10:]
        k = torch.stack([torch.cat((down[..., :10] @ layer.up_k[h].T, k_r), -1) for h in range(3)], 1)
        v = torch.stack([down[..., :10] @ layer.up_v[h].T for h in range(3)], 1)
        q = torch.cat((q[..., :6], layer.rope.rotate(q[..., 6:], at)), -1)
        return layer.out(naive.attention(q, k, v, naive.softmax, naive.causal).transpose(1, 2).flatten(2))

    own = max(naive.gap(whole, by_hand(True)), naive.gap(layer(x, absorbed=False)[0], by_hand(True)))
    return own, naive.gap(whole, by_hand(False))


@check(
    "mla-moe-intensity",
    "experts drawn at random: mean tokens an expert over B k / E, and touched experts over the formula's, off 1 by",
    below=0.02,
    control="tokens that take one expert each",
)
def _() -> tuple[float, float]:
    moe, batch = FeedForward(1000, 64, 6, devices=4), 200
    tokens, touched = [], []
    for _ in range(30):
        choice = torch.rand(batch, 64).topk(6).indices
        load = torch.bincount(choice.flatten(), minlength=64)[:16]  # one device's
        tokens.append(float(load.double().mean()))
        touched.append(float((load > 0).double().sum()))
    found = intensity(moe, "decode", batch)
    mean, seen = sum(tokens) / 30, sum(touched) / 30
    size = balanced_batch(moe, 37)
    dense = intensity(FeedForward(1000), "decode", 37).ratio
    assert abs(intensity(moe, "decode", size).ratio / dense - 1) < 0.05 and abs(size - 37 * 64 / 6) < 1 and dense == 37.0
    own = max(abs(mean / (batch * 6 / 64) - 1), abs(found.flops / (2 * mean * 16 * 1000) - 1), abs(found.bytes / (seen * 2 * 1000) - 1))
    return own, abs(intensity(FeedForward(1000, 64, 1, devices=4), "decode", batch).flops / (2 * mean * 16 * 1000) - 1)
