"""Checks of dsf."""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.algebra import FeatureMap, Recurrent, elu_plus_one
from regard.engine.door import attend
from regard.lab import naive
from regard.lab.checks.shared.comparing import F64, gap_with_gradients
from regard.lab.checks.shared.layers import drawn, short_conv, silu
from regard.lab.verification import check
from regard.nn.attention import Attention
from regard.nn.selective_scan import selective_scan
from regard.nn.state_layers import QLSTM, NormalizedAttention, QLSTMCell
from regard.zoo.analysis.dsf import (
    System,
    from_linear_attention,
    from_normalized_attention,
    from_qlstm,
    from_s6,
    from_softmax_attention,
    from_ssd,
    monomials,
)


def inputs() -> Tensor:
    return torch.randn(2, 12, 6, dtype=F64)


def lifted(u: Tensor) -> dict[str, tuple[System, Tensor]]:
    """Each native layer of regard as a system, and its own output."""
    out: dict[str, tuple[System, Tensor]] = {}
    for bias in (False, True):
        linear = drawn(Attention(6, 2, Recurrent(feature=FeatureMap(elu_plus_one), readout="sum", scaled=False), bias=bias))
        out[f"linear {bias}"] = from_linear_attention(linear, u, elu_plus_one), linear(u)
        normed = drawn(NormalizedAttention(6, 3, 9, "softplus" if bias else "exp", bias))
        out[f"normalized {bias}"] = from_normalized_attention(normed, u), normed(u)
    plain = drawn(Attention(6, 2, Recurrent(scaled=False)))
    out["one"] = from_linear_attention(plain, u, lambda x: x, eta="one"), plain(u)
    delta, a, skip = F.softplus(torch.randn(2, 6, 12, dtype=F64)), -torch.rand(6, 4, dtype=F64), torch.randn(6, dtype=F64)
    b, c = (torch.randn(2, 4, 12, dtype=F64) for _ in range(2))
    out["s6"] = from_s6(u.mT, delta, a, b, c, skip), selective_scan(u.mT, delta, a, b, c, skip).mT
    x, decay = u.unflatten(2, (2, 3)).transpose(1, 2), -torch.rand(2, 2, 12, dtype=F64)
    b, c = (torch.randn(2, 2, 12, 5, dtype=F64) for _ in range(2))
    y = attend(c, b, x, Recurrent(decay="token", scaled=False), log_decay=decay)
    out["ssd"] = from_ssd(x, decay, b, c), y.transpose(1, 2).flatten(2)
    for turned in (False, True):
        cell = drawn(QLSTMCell(6, turned))
        out[f"qlstm {turned}"] = from_qlstm(cell, u), cell(u)[0]
    return out


@check(
    "dsf",
    "recurrence, unrolled map and scan of 9 lifted layers (linear, normalized, S6, SSD, qLSTM; biases, several heads) equal the layers themselves",
    below=1e-10,
    control="the ratio of normalisers turned over",
)
def _() -> tuple[float, float]:
    u = inputs()
    known = lifted(u)
    gap = max(naive.gap(y, truth) for system, truth in known.values() for y in (system.recurrence(), system.scan(), system.explicit()))
    system, truth = known["normalized True"]
    ratio = torch.cat((system.decay[:, :1], 1 / system.decay[:, 1:]), 1)
    other = System(system.u, ratio, system.write, system.read, system.direct)
    return gap, naive.gap(other.recurrence(), truth)


@check(
    "dsf",
    "softmax attention with its exponential cut behind the power 8, scores within 1: error of the layer's output (falling over 1, 2, 4, 8)",
    below=1e-5,
    control="behind the first power",
)
def _() -> tuple[float, float]:
    u, layer = inputs(), drawn(Attention(6, 2, "softmax", bias=True))
    q, k, _, _ = layer.heads_of(u, u, 0, None)
    with torch.no_grad():
        reach = (q @ k.mT * 3**-0.5).tril().abs().max()
        layer.q.weight /= reach
        layer.q.bias /= reach
    errors = [naive.gap(from_softmax_attention(layer, u, order).recurrence(), layer(u)) for order in (1, 2, 4, 8)]
    falling = all(b < a for a, b in itertools.pairwise(errors))
    return errors[-1] if falling else 1.0, errors[0]


@check(
    "dsf",
    "inner products of monomials are the exponential's series, order by order; each map's entries are C_i Lambda .. B_j",
    below=1e-10,
    control="one order less",
)
def _() -> tuple[float, float]:
    x, y = torch.randn(7, 3, dtype=F64), torch.randn(7, 3, dtype=F64)
    dot, gaps = (x * y).sum(-1), []
    for order in (0, 1, 4):
        series = sum((dot**p / math.factorial(p) for p in range(1, order + 1)), torch.ones_like(dot))
        gaps.append(naive.gap((monomials(x, order) * monomials(y, order)).sum(-1), series))
    system = lifted(inputs())["s6"][0]
    phi = system.phi()
    for i, j in ((0, 0), (5, 2), (11, 11), (3, 7)):
        entry = torch.zeros(2, 6, 6, dtype=F64)
        for b in range(2):
            if j <= i:
                carried = system.write[b, j]
                for t in range(j + 1, i + 1):
                    carried = torch.diag(system.decay[b, t]) @ carried
                entry[b] = system.read[b, i] @ carried + (system.direct[b, i] if i == j else 0)  # type: ignore[index]
        gaps.append(naive.gap(phi[:, i, :, j], entry))
    short = sum((dot**p / math.factorial(p) for p in range(1, 4)), torch.ones_like(dot))
    return max(gaps), naive.gap((monomials(x, 4) * monomials(y, 4)).sum(-1), short)


@check(
    "dsf",
    "S6 of one scalar decay is linear attention with psi = delta W_B u, phi = W_C u and normalisers of that ratio; its gate is sigmoid(-z)^a",
    below=1e-12,
    control="without the normalisers",
)
def _() -> tuple[float, float]:
    z, a = torch.randn(1, 1, 9, dtype=F64), torch.tensor(0.7, dtype=F64)
    x, b, c = (torch.randn(1, n, 9, dtype=F64) for n in (4, 5, 5))
    delta = F.softplus(z)
    s6 = from_s6(x, delta.expand(-1, 4, -1), -a.expand(4, 5), b, c).recurrence()
    eta = (a * delta).cumsum(-1).exp()[:, 0]  # eta_{i-1} / eta_i = exp(-a delta_i)
    psi, phi = (delta * b * eta[:, None]).mT, c.mT
    weights = (phi @ psi.mT).tril()
    gap = naive.gap(s6, weights / eta[..., None] @ x.mT)
    cell = drawn(QLSTMCell(6))
    u = inputs()
    forget = u @ cell.gates.weight[:6].T + cell.gates.bias[:6]
    assert cell.alpha is not None
    gate = torch.sigmoid(-forget) ** cell.alpha.clamp_min(0)
    gap = max(gap, naive.gap(cell.parts(u)[0].exp(), gate), naive.gap(gate, (-cell.alpha.relu() * F.softplus(forget)).exp()))
    return gap, naive.gap(s6, weights @ x.mT)


@check(
    "dsf",
    "attention with a learned normaliser (exp, softplus, sigmoid) and the LSTM, both ways, == by hand with gradients; first values",
    below=1e-9,
    control="the LSTM's other gate",
)
def _() -> tuple[float, float]:
    x, gaps = torch.randn(2, 7, 6, dtype=F64, requires_grad=True), []
    forms = {"exp": torch.exp, "softplus": lambda z: torch.log1p(z.exp()), "sigmoid": lambda z: 1 / (1 + (-z).exp())}
    for norm, form in forms.items():
        layer = drawn(NormalizedAttention(6, 2, 8, norm))
        qk, v = x @ layer.qk.weight.T + layer.qk.bias, x @ layer.v.weight.T + layer.v.bias
        eta, heads = form(x @ layer.eta.weight.T + layer.eta.bias), []  # type: ignore[no-untyped-call]
        for h in range(2):
            q, k = qk[..., 4 * h : 4 * h + 4], qk[..., 8 + 4 * h : 12 + 4 * h]
            rows = [
                torch.einsum("bd,bsd,bsv->bv", q[:, t], k[:, : t + 1], v[:, : t + 1, 3 * h : 3 * h + 3]) / eta[:, t, h, None]
                for t in range(7)
            ]
            heads.append(torch.stack(rows, 1))
        truth = torch.cat(heads, -1) @ layer.out.weight.T + layer.out.bias
        gaps.append(gap_with_gradients(layer(x), truth, (x, *layer.parameters())))

    def by_hand(net: QLSTM, turned: bool) -> Tensor:
        gate, y = (x @ net.input.weight.T).chunk(2, -1)
        y = short_conv(y, net.conv.weight, net.conv.bias)
        f, i, o = (y @ net.cell.gates.weight.T + net.cell.gates.bias).chunk(3, -1)
        alpha = net.cell.alpha.clamp_min(0) if net.cell.alpha is not None else 1.0
        keep = (1 / (1 + f.exp())) ** alpha if turned else silu(f) / f
        h, outs = torch.zeros_like(y[:, 0]), []
        for t in range(7):
            h = keep[:, t] * h + silu(i[:, t]) / i[:, t] * y[:, t]
            outs.append(silu(o[:, t]) / o[:, t] * h)
        gate = gate * 0.5 * (1 + torch.erf(gate / 2**0.5))
        return (gate * torch.stack(outs, 1)) @ net.output.weight.T

    for turned in (False, True):
        net = drawn(QLSTM(6, 1.5, 3, turned), 0.2)
        gaps.append(gap_with_gradients(net(x), by_hand(net, turned), (x, *net.parameters())))
    other = naive.gap(net(x), by_hand(net, False))
    fresh = QLSTM(64)
    stds = {"input": 64, "output": 128, "cell.gates": 128}
    off = max(abs(float(fresh.state_dict()[f"{name}.weight"].std()) * n**0.5 - 1) for name, n in stds.items())
    edges = [float(p.detach().abs().max()) for p in (fresh.conv.weight, fresh.conv.bias) if p is not None]
    shaped = fresh.conv.weight.shape == (128, 1, 4) and all(0.4 < e <= 0.5 for e in edges) and float(fresh.cell.alpha.detach()) == 1  # type: ignore[union-attr]
    return max(gaps) if off < 0.1 and shaped else 1.0, other


@check(
    "dsf",
    "both layers step by step, in pieces, equal the whole pass; the LSTM with its gate closed (alpha < 0) keeps all",
    below=1e-10,
    control="a state dropped between pieces",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    gaps: list[float] = []
    x, lost = torch.randn(2, 11, 6, dtype=F64), math.inf
    for layer in (drawn(NormalizedAttention(6, 2)), drawn(QLSTM(6)), drawn(QLSTM(6, reversed=False))):
        whole = layer(x)
        for keep in (True, False):
            state, parts = None, []
            for piece in x.split((4, 1, 1, 5), 1):
                y, state = layer.step(piece, state if keep else None)
                parts.append(y)
            gap = naive.gap(torch.cat(parts, 1), whole)
            gaps, lost = ([*gaps, gap], lost) if keep else (gaps, min(lost, gap))
    cell = drawn(QLSTMCell(6))
    assert cell.alpha is not None
    cell.alpha.fill_(-0.3)
    log_f, written, read = cell.parts(x)
    return max(*gaps, naive.gap(cell(x)[0], read * written.cumsum(1)), float(log_f.abs().max())), lost
