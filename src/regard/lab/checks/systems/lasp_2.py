"""Checks of lasp-2."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.lab import naive
from regard.lab.checks.shared.comparing import F64, gap_with_gradients
from regard.lab.verification import check
from regard.parallel.hosts import Counted, VirtualHosts, shares
from regard.zoo.systems.lasp_2 import lasp2, lasp2h_attention


def given(length: int = 24, width: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(2, 3, length, d, dtype=F64, requires_grad=True) for d in (4, 4, width))


def by_hand(q: Tensor, k: Tensor, v: Tensor, causal: bool = True, slope: Tensor | None = None) -> Tensor:
    """Token by token, every pair."""
    rows = []
    for i in range(q.shape[2]):
        total = torch.zeros_like(v[:, :, 0])
        for j in range(i + 1 if causal else q.shape[2]):
            w = (q[:, :, i] * k[:, :, j]).sum(-1, keepdim=True)
            total = total + (w if slope is None else w * torch.exp(-slope * (i - j))[:, None]) * v[:, :, j]
        rows.append(total)
    return torch.stack(rows, 2)


def sharded(q: Tensor, k: Tensor, v: Tensor, count: int, hosts: Counted | None = None, **options: object) -> Tensor:
    return torch.cat(lasp2(*(shares(x, count) for x in (q, k, v)), hosts, **options), 2)


@check(
    "lasp-2",
    "1, 2, 4 and 6 hosts, causal or not, with a decay or none: outputs and gradients equal loops over pairs",
    below=1e-10,
    control="each host alone",
)
def _() -> tuple[float, float]:
    own, alone = 0.0, []
    slope = torch.tensor([0.0, 0.1, 0.7], dtype=F64)
    for options in ({}, {"causal": False}, {"slope": slope}, {"slope": slope * 0}):
        for count in (1, 2, 4, 6):
            q, k, v = given()
            own = max(own, gap_with_gradients(sharded(q, k, v, count, **options), by_hand(q, k, v, **options), (q, k, v)))
        parts = [sharded(*(x[:, :, at : at + 6] for x in (q, k, v)), 1, **options) for at in range(0, 24, 6)]
        alone.append(naive.gap(torch.cat(parts, 2), by_hand(q, k, v, **options)))
    return own, min(alone)


@check(
    "lasp-2",
    "exchanged, forward and backward, less two states a host, at 24 and at 48 tokens",
    below=0.0,
    control="keys and values gathered",
)
def _() -> tuple[float, float]:
    own = other = 0
    for length in (24, 48):
        q, k, v = given(length)
        hosts = Counted(VirtualHosts(4))
        sharded(q, k, v, 4, hosts).sum().backward()
        assert hosts.calls == {"gather": 2}
        own += abs(hosts.sent["gather"] - 2 * (2 * 3 * 4 * 5))
        full = Counted(VirtualHosts(4))
        torch.cat(lasp2h_attention(*(shares(x, 4) for x in (q, k, v)), full), 2).sum().backward()
        other += abs(sum(full.sent.values()) - 2 * (2 * 3 * 4 * 5))
    return float(own), float(other)


@check("lasp-2", "another token on host 2 of 4: change of outputs before it", below=0.0, control="both directions")
@torch.no_grad()
def _() -> tuple[float, float]:
    q, k, v = given()
    other = v.clone()
    other[:, :, 14] += 1
    found = [[sharded(q, k, x, 4, causal=causal) for x in (v, other)] for causal in (True, False)]
    assert naive.gap(found[0][0][:, :, 14:], found[0][1][:, :, 14:]) > 0.1
    return tuple(naive.gap(a[:, :, :14], b[:, :, :14]) for a, b in found)


@check(
    "lasp-2", "2H: softmax over 1, 2 and 4 hosts, causal or not: outputs and gradients equal loops", below=1e-10, control="each host alone"
)
def _() -> tuple[float, float]:
    own, q, k, v = 0.0, *given(12)
    for causal in (True, False):
        for count in (1, 2, 4):
            found = torch.cat(lasp2h_attention(*(shares(x, count) for x in (q, k, v)), causal=causal), 2)
            own = max(own, gap_with_gradients(found, naive.attention(q, k, v, naive.softmax, naive.causal if causal else None), (q, k, v)))
    parts = [lasp2h_attention(*([x[:, :, at : at + 3]] for x in (q, k, v)))[0] for at in range(0, 12, 3)]
    return own, naive.gap(torch.cat(parts, 2), naive.attention(q, k, v, naive.softmax, naive.causal))
