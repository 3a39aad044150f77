"""Checks of mossformer."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.lab import naive
from regard.lab.checks.shared.comparing import F64, gap_with_gradients
from regard.lab.checks.shared.layers import drawn, silu
from regard.lab.checks.shared.planes import layer_norm
from regard.lab.verification import check
from regard.tasks.mixtures import permuted_si_sdr, si_sdr, tones
from regard.zoo.vision.mossformer import ConvModule, JointGatedAttention, MossFormerSeparator, ScaleNorm, joint_attention


def given(length: int = 40, width: int = 8, wide: int = 6) -> tuple[Tensor, ...]:
    views = [torch.randn(2, length, width, dtype=F64).requires_grad_() for _ in range(4)]
    return (*views, torch.randn(2, length, wide, dtype=F64).requires_grad_())


def joint(quad_q: Tensor, quad_k: Tensor, lin_q: Tensor, lin_k: Tensor, values: Tensor, group: int, causal: bool) -> Tensor:
    """By the whole T x T matrix."""
    length = values.shape[1]
    at = torch.arange(length)
    same = at[:, None] // group == at // group
    before = at[:, None] // group > at // group
    near = torch.where(same & (at[:, None] >= at) if causal else same, torch.clamp(quad_q @ quad_k.mT / group, min=0) ** 2, 0.0)
    far = torch.where(before, lin_q @ lin_k.mT / group, 0.0) if causal else lin_q @ lin_k.mT / length
    return (near + far) @ values


@check(
    "mossformer",
    "values and gradients of joint attention, 40, 32 and 5 tokens in chunks of 16, both directions and causal == the whole matrix",
    below=1e-10,
    control="softmax inside chunks",
)
def _() -> tuple[float, float]:
    gaps = []
    for length in (40, 32, 5):
        for causal in (False, True):
            all_of = given(length)
            gaps.append(gap_with_gradients(joint_attention(*all_of, 16, causal), joint(*all_of, 16, causal), all_of))
    quad_q, quad_k, lin_q, lin_k, values = given()
    at = torch.arange(40)
    soft = torch.where(at[:, None] // 16 == at // 16, quad_q @ quad_k.mT / 16, -torch.inf).softmax(-1)
    other = (soft + lin_q @ lin_k.mT / 40) @ values
    return max(gaps), naive.gap(joint(quad_q, quad_k, lin_q, lin_k, values, 16, False), other)


def normed(x: Tensor, layer: Any) -> Tensor:
    if isinstance(layer, ScaleNorm):
        size = x.square().sum(-1, keepdim=True).sqrt() / x.shape[-1] ** 0.5
        return x / torch.clamp(size, min=1e-5) * layer.weight
    return layer_norm(x, layer)


def convolved(x: Tensor, layer: ConvModule, causal: bool) -> Tensor:
    y = silu(normed(x, layer.norm) @ layer.linear.weight.T + layer.linear.bias)
    width = layer.conv.weight.shape[-1]
    start = width - 1 if causal else width // 2
    out = torch.zeros_like(y)
    for tap in range(width):
        moved = F.pad(y, (0, 0, start, width))[:, tap : tap + y.shape[1]]
        out = out + layer.conv.weight[:, 0, tap] * moved
    return y + out


def turned(x: Tensor, dims: int) -> Tensor:
    """Neighbouring channels turned as pairs, the first `dims` of them."""
    pairs = []
    for c in range(0, dims, 2):
        angle = torch.arange(x.shape[1], dtype=F64) * 10000 ** (-c / dims)
        a, b = x[..., c], x[..., c + 1]
        pairs += [a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()]
    return torch.cat((torch.stack(pairs, -1), x[..., dims:]), -1)


def layer_by_hand(x: Tensor, layer: JointGatedAttention, dims: int, gates: int = 3) -> Tensor:
    late = x
    if layer.shift:
        half = -(-x.shape[2] // 2)
        late = torch.cat((F.pad(x[:, :-1, :half], (0, 0, 1, 0)), x[..., half:]), -1)
    values, z = convolved(late, layer.hidden, layer.causal), convolved(late, layer.qk, layer.causal)
    quad_q, lin_q, quad_k, lin_k = (turned(g * z + b, dims) for g, b in zip(layer.gamma, layer.beta, strict=True))
    half = values.shape[-1] // 2
    v, u = values[..., :half], values[..., half:]
    all_v, all_u = (joint(quad_q, quad_k, lin_q, lin_k, y, layer.group, layer.causal) for y in (v, u))
    gate = 1 / (1 + torch.exp(-all_v * u)) if gates == 3 else 1.0
    return x + convolved(all_u * v * gate, layer.out, layer.causal)


@check(
    "mossformer",
    "values and gradients of the layer, both norms, causal, without shift, odd widths, 21 tokens == by hand",
    below=1e-9,
    control="without the sigmoid's gate",
)
def _() -> tuple[float, float]:
    gaps, x = [], torch.randn(2, 21, 7, dtype=F64).requires_grad_()
    cases: tuple[dict[str, Any], ...] = (
        {"group": 8, "qk_dim": 6},
        {"group": 4, "qk_dim": 10, "rotary": 4, "norm": "layernorm", "causal": True, "kernel": 5},
        {"group": 8, "qk_dim": 6, "expansion": 2.0, "shift": False, "kernel": 3},
    )
    for options in cases:
        layer = drawn(JointGatedAttention(7, **options)).eval()
        dims = min(options.get("rotary", 32), options["qk_dim"])
        gaps.append(gap_with_gradients(layer(x), layer_by_hand(x, layer, dims), (x, *layer.parameters())))
    return max(gaps), naive.gap(layer(x), layer_by_hand(x, layer, dims, gates=2))


@check("mossformer", "change of the first output when the last of 40 tokens changes, chunks of 16", above=1e-6, control="no linear keys")
def _() -> tuple[float, float]:
    def change(linear: float) -> float:
        quad_q, quad_k, lin_q, lin_k, values = given()
        other = torch.cat((values[:, :-1], values[:, -1:] + 1), 1)
        return naive.gap(*(joint_attention(quad_q, quad_k, lin_q, linear * lin_k, y, 16)[:, 0] for y in (values, other)))

    return change(1.0), change(0.0)


@check("mossformer", "causal: 37 tokens in steps, and a prefix alone == all at once", below=1e-10, control="both directions")
def _() -> tuple[float, float]:
    def off(causal: bool) -> float:
        layer = drawn(JointGatedAttention(6, 8, 6, causal, kernel=5)).eval()
        x = torch.randn(2, 37, 6, dtype=F64)
        whole = layer(x)
        gaps = [naive.gap(whole[:, :cut], layer(x[:, :cut])) for cut in (16, 21)]
        if causal:
            first, state = layer.step(x[:, :11])
            second, state = layer.step(x[:, 11:], state)
            assert state.position == 37 and state.chunk[0].shape[1] == 5
            gaps.append(naive.gap(torch.cat((first, second), 1), whole))
        return max(gaps)

    return off(True), off(False)


def grouped(x: Tensor, layer: torch.nn.GroupNorm) -> Tensor:
    """Over channels and time together."""
    gap = x - x.mean((1, 2), keepdim=True)
    return gap / (gap.square().mean((1, 2), keepdim=True) + 1e-8).sqrt() * layer.weight[:, None] + layer.bias[:, None]


def separated(net: MossFormerSeparator, x: Tensor, places: bool = True) -> Tensor:
    layers: Any = net
    step = net.kernel // 2
    count = (x.shape[1] - net.kernel) // step + 1
    frames = torch.stack([x[:, t * step : t * step + net.kernel] for t in range(count)], 1)
    heard = torch.clamp(torch.einsum("btk,ck->bct", frames, layers.encoder.weight[:, 0]), min=0)
    y = torch.einsum("oc,bct->bot", layers.first.weight[..., 0], grouped(heard, net.norm1))
    dim = y.shape[1]
    rates = torch.tensor([10000 ** (-2 * c / dim) for c in range(dim // 2)], dtype=F64)
    angle = rates[:, None] * torch.arange(count)
    y = y + layers.scale * torch.cat((angle.sin(), angle.cos())) * places
    z = y.mT
    for block in net.blocks:
        z = block(z) if isinstance(block, JointGatedAttention) else layer_norm(z, block, 1e-6)
    y = grouped(z.mT, net.norm2) + y
    y = torch.where(y > 0, y, layers.act.weight * y)
    out = []
    for source in range(net.sources):
        own = slice(source * dim, (source + 1) * dim)
        part = torch.einsum("oc,bct->bot", layers.split.weight[own, :, 0], y) + layers.split.bias[own, None]
        value, gate = (torch.einsum("oc,bct->bot", one.weight[..., 0], part) + one.bias[:, None] for one in (layers.value, layers.gate))
        mask = torch.clamp(torch.einsum("oc,bct->bot", layers.last.weight[..., 0], torch.tanh(value) / (1 + torch.exp(-gate))), min=0)
        pieces = torch.einsum("bct,ck->btk", mask * heard, layers.decoder.weight[:, 0])
        sound = torch.zeros_like(x)
        for t in range(count):
            sound = sound + F.pad(pieces[:, t], (t * step, x.shape[1] - t * step - net.kernel))
        out.append(sound)
    return torch.stack(out, 1)


@check("mossformer", "the separator of three sources, 45 samples == by hand", below=1e-9, control="no places")
def _() -> tuple[float, float]:
    net = drawn(MossFormerSeparator(3, 10, 6, 2, 6, group=4, qk_dim=4)).eval()
    x = torch.randn(2, 45, dtype=F64)
    with torch.no_grad():
        assert net(x).shape == (2, 3, 45) and float(net(x)[:, :, 45:].sum()) == 0
        return naive.gap(net(x), separated(net, x)), naive.gap(net(x), separated(net, x, places=False))


@check("mossformer", "SI-SDR, and the best order of three sources == by hand, in decibels", below=1e-9, control="the order as it is")
def _() -> tuple[float, float]:
    found, truth = torch.randn(4, 3, 50, dtype=F64), torch.randn(4, 3, 50, dtype=F64)
    found = found + 2 * truth[:, [2, 0, 1]] + 3

    def one(e: list[float], s: list[float]) -> float:
        e, s = ([v - sum(x) / len(x) for v in x] for x in (e, s))
        a = sum(p * q for p, q in zip(e, s, strict=True)) / (sum(q * q for q in s) + 1e-8)
        signal, noise = sum((a * q) ** 2 for q in s), sum((p - a * q) ** 2 for p, q in zip(e, s, strict=True))
        return float(10 * torch.log10(torch.tensor(signal / (noise + 1e-8) + 1e-8, dtype=F64)))

    best, plain = [], []
    for e, s in zip(found.tolist(), truth.tolist(), strict=True):
        table = [[one(a, b) for b in s] for a in e]
        best.append(max(sum(table[k][order[k]] for k in range(3)) / 3 for order in permutations(range(3))))
        plain.append(sum(table[k][k] for k in range(3)) / 3)
    gap = abs(float(si_sdr(found[0, 0], truth[0, 0])) - one(found[0, 0].tolist(), truth[0, 0].tolist()))
    told = permuted_si_sdr(found, truth)
    return max(gap, naive.gap(told, torch.tensor(best, dtype=F64))), naive.gap(told, torch.tensor(plain, dtype=F64))


@check("mossformer", "SI-SDR of two tones told apart after 120 steps, two blocks", above=8.0, control="no block, each frame for itself")
def _() -> tuple[float, float]:
    def run(blocks: int) -> float:
        torch.manual_seed(0)
        net = MossFormerSeparator(2, 32, 32, blocks, 16, group=16, qk_dim=16, rotary=8, dropout=0.0)
        generator, optimizer = torch.Generator().manual_seed(0), torch.optim.AdamW(net.parameters(), 5e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=120)
        for _ in range(120):
            x, y = tones(8, generator, gap=1.5)
            optimizer.zero_grad()
            (-permuted_si_sdr(net(x), y).mean()).backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 5.0)
            optimizer.step()
            schedule.step()
        x, y = tones(100, torch.Generator().manual_seed(1), gap=1.5)
        with torch.no_grad():
            return float(permuted_si_sdr(net.eval()(x), y).mean())

    return run(2), run(0)
