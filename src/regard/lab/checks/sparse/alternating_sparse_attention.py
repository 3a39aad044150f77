"""Checks of alternating-sparse-attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from regard.algebra.compressed import kernel_probabilities, kernels, largest_touching, shared_units
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.verification import check
from regard.nn.compressed_sparse import NSAAttention
from regard.nn.decoder import Decoder
from regard.zoo.sparse.alternating_sparse_attention import GlobalLatentAttention, LocalLatentAttention, asa_layers, cache_floats


def dense(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    seen = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
    return (q @ k.transpose(-1, -2) * scale).masked_fill(~seen, -math.inf).softmax(-1) @ v


@check(
    "alternating-sparse-attention",
    "global layer with all blocks and gates (0, 1), local layer with a window of all: dense attention over opened keys",
    below=1e-10,
    control="2 blocks, a window of 8",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    x, gaps = torch.randn(2, 48, 32, dtype=F64), []
    for top, window in ((6, 48), (2, 8)):
        torch.manual_seed(1)
        far = GlobalLatentAttention(32, 4, groups=2, size=4, stride=2, block_size=8, top_k=top, fix_gates=(0.0, 1.0)).double()
        near = LocalLatentAttention(32, 4, rank=12, rope_dim=4, window=window).double()
        k, v = far.opened(far.latents(x))
        truth = far.close(dense(far.queries(x), k, v, 8**-0.5))
        q_turned, k_turned = near.rotary(x, 0)
        k, v = near.opened(near.latents(x))
        q, k = torch.cat((near.queries(x), q_turned), -1), torch.cat((k, k_turned[:, None].expand(-1, 4, -1, -1)), -1)
        own = near.close(dense(q, k, v, 12**-0.5))
        gaps.append((naive.gap(far(x), truth), naive.gap(near(x), own)))
    return max(gaps[0]), min(gaps[1])


@check(
    "alternating-sparse-attention",
    "decoding with absorbed weights equals the layers' forward pass, both kinds",
    below=1e-10,
    control="value weights of the next head",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    x = torch.randn(2, 48, 32, dtype=F64)
    far = GlobalLatentAttention(32, 4, groups=2, size=4, stride=2, block_size=8, top_k=3).double()
    near = LocalLatentAttention(32, 4, rank=12, rope_dim=4, window=10).double()
    own, other = 0.0, math.inf
    for layer in (far, near):
        whole, cache, outs = layer(x), None, []
        for t in range(48):
            out, cache = layer.step(x[:, t : t + 1], cache)
            outs.append(out)
        assert cache is not None
        own = max(own, naive.gap(torch.cat(outs, 1), whole), abs(cache.floats - layer.cache_floats(48)))
        layer.up_v.copy_(layer.up_v.roll(1, 0))
        other = min(other, naive.gap(layer.step(x, None)[0], whole))
    return own, other


def touched_loop(p: Tensor, size: int, stride: int, block: int, count: int) -> tuple[Tensor, Tensor]:
    """Of one row p (m,): shared units and largest touching mass of each block."""
    units, largest = torch.zeros(count, dtype=F64), torch.zeros(count, dtype=F64)
    for b in range(count):
        for m in range(len(p)):
            tokens = set(range(m * stride, m * stride + size)) & set(range(b * block, (b + 1) * block))
            units[b] += p[m] * len(tokens) / stride
            if tokens:
                largest[b] = max(largest[b], p[m])
    return units, largest


@check(
    "alternating-sparse-attention",
    "masses of windows brought to blocks, and the choice of a group, equal loops",
    below=1e-12,
    control="windows counted whole in the block where they start",
)
def _() -> tuple[float, float]:
    q, k = torch.randn(1, 4, 50, 8, dtype=F64), torch.randn(1, 2, 50, 8, dtype=F64)
    p = kernel_probabilities(q, kernels(k, 8, 4), 0, 8, 4)
    gap = other = 0.0
    for h in range(4):
        for i in range(50):
            ready = [m for m in range(p.shape[-1]) if m * 4 + 7 <= i]
            row = torch.zeros(p.shape[-1], dtype=F64)
            if ready:
                row[ready] = torch.stack([q[0, h, i] @ k[0, h // 2, m * 4 : m * 4 + 8].mean(0) for m in ready]).softmax(0)
            units, largest = touched_loop(row, 8, 4, 16, 4)
            gap = max(gap, naive.gap(p[0, h, i], row), naive.gap(shared_units(p, 8, 4, 16, 4)[0, h, i], units))
            gap = max(gap, naive.gap(largest_touching(p, 8, 4, 16, 4)[0, h, i], largest))
            whole = torch.zeros(4, dtype=F64).scatter_add_(0, torch.arange(len(row)) * 4 // 16, row * 2)
            other = max(other, naive.gap(whole, units))
    return gap, other


@check(
    "alternating-sparse-attention",
    "12 layers, window 32, 512 tokens: cached numbers a token over those of NSA",
    below=0.55,
    control="global layers only",
)
def _() -> tuple[float, float]:
    sizes = {"size": 8, "stride": 4, "block_size": 16, "top_k": 4}
    layers = asa_layers(12, 64, 8, window=32, groups=1, rope_dim=8, **sizes)
    nsa = [NSAAttention(64, 8, 1, window=32, **sizes) for _ in range(12)]
    far = [layers[1]] * 12
    return cache_floats(layers, 512) / cache_floats(nsa, 512), cache_floats(far, 512) / cache_floats(nsa, 512)  # type: ignore[arg-type]


@check(
    "alternating-sparse-attention",
    "a token 60 back reaches the last row through a local and a global layer of window 16: its gradient",
    above=1e-12,
    control="two local layers",
)
def _() -> tuple[float, float]:
    found = []
    for mixed in (True, False):
        layers = asa_layers(2, 32, 4, window=16, size=4, stride=2, block_size=8, top_k=16)
        if not mixed:
            layers[1] = LocalLatentAttention(32, 4, window=16)
        model = Decoder(layers, vocab=20, dim=32, layers=2, heads=4).double()
        x = model.embed(torch.randint(20, (1, 80))).detach().requires_grad_()
        y = x
        for block in model.blocks:
            y = block(y)
        (grad,) = torch.autograd.grad(y[:, -1].sum(), x)
        found.append(float(grad[0, 19].abs().max()))
    return found[0], found[1]
