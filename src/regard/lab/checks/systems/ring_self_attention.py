"""Checks of ring-self-attention."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.lab import naive
from regard.lab.checks.shared.comparing import F64, gap_with_gradients
from regard.lab.memory import largest_tensor
from regard.lab.verification import check
from regard.parallel.hosts import Counted, VirtualHosts, shares
from regard.zoo.systems.lasp_2 import lasp2h_attention
from regard.zoo.systems.ring_self_attention import SequenceParallelBlock, linformer_ring_attention, ring_self_attention


def given(length: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(2, 3, length, d, dtype=F64, requires_grad=True) for d in (4, 4, 5))


@check(
    "ring-self-attention", "1, 2, 4 and 6 hosts, causal or not: outputs and gradients equal loops", below=1e-10, control="each host alone"
)
def _() -> tuple[float, float]:
    own, q, k, v = 0.0, *given()
    for causal in (True, False):
        for count in (1, 2, 4, 6):
            found = torch.cat(ring_self_attention(*(shares(x, count) for x in (q, k, v)), causal=causal), 2)
            own = max(own, gap_with_gradients(found, naive.attention(q, k, v, naive.softmax, naive.causal if causal else None), (q, k, v)))
    scaled = torch.cat(ring_self_attention(*(shares(x, 2) for x in (q, k, v)), scale=0.9), 2)
    own = max(own, naive.gap(scaled, naive.attention(q, k, v, naive.softmax, scale=0.9)))
    parts = [ring_self_attention(*([x[:, :, at : at + 3]] for x in (q, k, v)))[0] for at in range(0, 12, 3)]
    return own, naive.gap(torch.cat(parts, 2), naive.attention(q, k, v, naive.softmax))


@check(
    "ring-self-attention",
    "numbers that a host of N sends: less (N - 1) B H C (d + dv) forward and N times twice as much in blocks and sums backward",
    below=0.0,
    control="keys and values gathered at once",
)
def _() -> tuple[float, float]:
    own = other = 0
    for count, length in ((2, 12), (4, 12), (4, 24)):
        q, k, v = given(length)
        block = 2 * 3 * (length // count) * (4 + 5)
        hosts = Counted(VirtualHosts(count))
        out = torch.cat(ring_self_attention(*(shares(x, count) for x in (q, k, v)), hosts), 2)
        own += abs(hosts.sent["shift"] - (count - 1) * block)
        out.sum().backward()
        own += abs(hosts.sent["shift"] - (count - 1) * block - count * 2 * block)
        assert set(hosts.sent) == {"shift"}
        full = Counted(VirtualHosts(count))
        lasp2h_attention(*(shares(x, count) for x in (q, k, v)), full)
        other += abs(full.sent["gather"] - (count - 1) * block)
    return float(own), float(other)


@check(
    "ring-self-attention",
    "largest tensor of a host over its scores (B, H, C, L), 8 hosts, L = 512",
    below=1.0,
    control="one host, of its share of the scores",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    q, k, v = (torch.randn(1, 2, 512, 8) for _ in range(3))
    cut = [shares(x, 8) for x in (q, k, v)]
    whole = [largest_tensor(lambda parts=parts: ring_self_attention(*parts)) for parts in (cut, [[q], [k], [v]])]
    return tuple(x / (2 * 64 * 512) for x in whole)


@check(
    "ring-self-attention",
    "Linformer over 1, 2 and 4 hosts: outputs and gradients equal unsharded, exchanged numbers B H k (d + dv)",
    below=1e-10,
    control="projections not summed",
)
def _() -> tuple[float, float]:
    q, k, v = given()
    e, f = (torch.randn(6, 12, dtype=F64, requires_grad=True) for _ in range(2))
    own = 0.0
    for count in (1, 2, 4):
        hosts = Counted(VirtualHosts(count))
        cut = [*(shares(x, count) for x in (q, k, v)), *(shares(x, count, 1) for x in (e, f))]
        found = torch.cat(linformer_ring_attention(*cut, hosts), 2)
        assert hosts.sent == {"gather": 2 * 3 * 6 * (4 + 5)} and hosts.calls == {"gather": 1}
        truth = naive.attention(q, torch.einsum("kl,bhld->bhkd", e, k), torch.einsum("kl,bhld->bhkd", f, v), naive.softmax)
        own = max(own, gap_with_gradients(found, truth, (q, k, v, e, f)))
    alone = [linformer_ring_attention(*([x] for x in one))[0] for one in zip(*cut, strict=True)]
    return own, naive.gap(torch.cat(alone, 2), truth)


@check(
    "ring-self-attention",
    "a block over 3 hosts equals the same layer on one: gap of outputs and of gradients of all parameters",
    below=1e-10,
    control="each host alone",
)
def _() -> tuple[float, float]:
    block, x = SequenceParallelBlock(12, 3, causal=True).double(), torch.randn(2, 9, 12, dtype=F64, requires_grad=True)
    q, k, v = block.qkv(block.norm1(x)).view(2, 9, 3, 3, 4).permute(2, 0, 3, 1, 4)
    y = x + block.out(naive.attention(q, k, v, naive.softmax, naive.causal).transpose(1, 2).flatten(2))
    truth = y + block.mlp[2](torch.nn.functional.gelu(block.mlp[0](block.norm2(y))))
    found = torch.cat(block(shares(x, 3, 1)), 1)
    alone = torch.cat([block([part])[0] for part in shares(x, 3, 1)], 1)
    other = naive.gap(alone, truth)
    return gap_with_gradients(found, truth, (x, *block.parameters())), other
