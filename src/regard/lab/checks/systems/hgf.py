"""Checks of hgf."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.layers import drawn, joined, split
from regard.lab.verification import check
from regard.nn.ternary import BitLinear, HGFLinear, penalty, rank_of
from regard.zoo.systems.hgf import HGFAttention, recovered


def bit_by_hand(layer: BitLinear, x: Tensor, levels: bool = True) -> Tensor:
    """Loops over tokens and outputs: RMSNorm, 127 levels a token, weights -gamma, 0, gamma. levels=False: the weights themselves."""
    gamma = sum(abs(w) for w in layer.weight.flatten().tolist()) / layer.weight.numel()
    rows = []
    for token in x.reshape(-1, x.shape[-1]):
        gain = layer.norm.weight
        token = token / (token.square().mean() + 1e-6).sqrt() * gain  # type: ignore[operator]
        top = max(abs(v) for v in token.tolist())
        token = torch.stack([torch.tensor(round(127 * v / top) * top / 127, dtype=F64) for v in token.tolist()])
        out = []
        for row in layer.weight:
            kept = [max(-1, min(1, round(w / (gamma + 1e-5)))) * gamma if levels else w for w in row.tolist()]
            out.append(sum(w * v for w, v in zip(kept, token.tolist(), strict=True)))
        rows.append(torch.tensor(out, dtype=F64))
    return torch.stack(rows).unflatten(0, x.shape[:-1])


def hgf_by_hand(layer: HGFLinear, x: Tensor) -> Tensor:
    g = 1 / (1 + torch.exp(-(x @ layer.gate.weight.T + layer.gate.bias)))
    return bit_by_hand(layer.ternary, x) + g * (x @ layer.down.weight.T @ layer.up.weight.T)


@check(
    "hgf",
    "HGFLinear with gates of tokens and of channels == by loops, and with its gates shut == the ternary layer",
    below=1e-10,
    control="weights that are not rounded",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    x, gaps = torch.randn(2, 5, 12, dtype=F64), []
    for gate in ("token", "channel"):
        layer = drawn(HGFLinear(12, 7, 3, gate))
        gaps += [naive.gap(layer(x), hgf_by_hand(layer, x)), abs(float(penalty(layer)) - float(torch.sigmoid(layer.gate(x)).mean()))]
        other = naive.gap(layer.ternary(x), bit_by_hand(layer.ternary, x, levels=False))
        layer.gate.bias.fill_(-1e4)
        gaps.append(naive.gap(layer(x), bit_by_hand(layer.ternary, x)))
    fresh = HGFLinear(12, 7)
    gaps += [float(fresh.up.weight.abs().max()), float((fresh.gate.bias + 2).abs().max()), float(fresh.gate.weight.abs().max())]
    return max(gaps), other


@check(
    "hgf",
    "activations whole, norm off, gate 1, B A = W - gamma W_t: the dense layer",
    below=1e-10,
    control="B A of half the rank",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    x, gaps = torch.randn(2, 5, 12, dtype=F64), []
    for rank in (8, 4):
        layer = HGFLinear(12, 8, rank, norm=False, quantised=False).double()
        weight = layer.ternary.weight
        gamma = weight.abs().mean()
        u, s, v = torch.linalg.svd(weight - gamma * (weight / (gamma + 1e-5)).round().clamp(-1, 1), full_matrices=False)
        layer.up.weight.copy_(u[:, :rank] * s[:rank])
        layer.down.weight.copy_(v[:rank])
        layer.gate.bias.fill_(1e4)
        gaps.append(naive.gap(layer(x), x @ weight.T))
    return gaps[0], gaps[1]


@check(
    "hgf",
    "gradients of x, W, A, B and gate == those of the same layer with rounding replaced by a constant difference",
    below=1e-10,
    control="rounding left out",
)
def _() -> tuple[float, float]:
    x = torch.randn(2, 5, 12, dtype=F64, requires_grad=True)
    layer = drawn(HGFLinear(12, 7, 3))
    parameters = [x, *layer.parameters()]
    own = torch.autograd.grad(layer(x).square().sum(), parameters)
    inner, w = layer.ternary, layer.ternary.weight
    gamma = w.detach().abs().mean()
    off = (w.detach() / (gamma + 1e-5)).round().clamp(-1, 1) * gamma - w.detach()

    def truth(rounded: float) -> tuple[Tensor, ...]:
        normed = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * inner.norm.get_parameter("weight")
        top = normed.detach().abs().amax(-1, keepdim=True)
        error = (127 * normed.detach() / top).round() * top / 127 - normed.detach()
        g = 1 / (1 + torch.exp(-(x @ layer.gate.weight.T + layer.gate.bias)))
        y = (normed + rounded * error) @ (w + rounded * off).T + g * (x @ layer.down.weight.T @ layer.up.weight.T)
        return torch.autograd.grad(y.square().sum(), parameters)

    return max(map(naive.gap, own, truth(1.0))), max(map(naive.gap, own, truth(0.0)))


@check(
    "hgf",
    "attention of three modes, plain and differential, causal or not == by hand, with gradients of the heads' part",
    below=1e-9,
    control="both maps added",
)
def _() -> tuple[float, float]:
    x, own, other = torch.randn(2, 5, 16, dtype=F64), [], math.inf

    def apply(layer: nn.Module, x: Tensor) -> Tensor:
        if isinstance(layer, HGFLinear):
            return hgf_by_hand(layer, x)
        return bit_by_hand(layer, x) if isinstance(layer, BitLinear) else x @ layer.weight.T  # type: ignore[no-any-return, operator]

    def by_hand(layer: HGFAttention, depth: int, causal: bool, sign: float = -1.0) -> Tensor:
        q, k, v = (split(apply(p, x), 2) for p in (layer.q, layer.k, layer.v))
        seen = torch.ones(5, 5).tril().bool() if causal else torch.ones(5, 5).bool()

        def weights(q: Tensor, k: Tensor) -> Tensor:
            return (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~seen, -math.inf).softmax(-1)

        if layer.lambdas is None:
            return apply(layer.out, joined(weights(q, k) @ v))
        assert layer.head_norm is not None
        start = 0.8 - 0.6 * math.exp(-0.3 * depth)
        a, b, c, d = layer.lambdas
        balance = torch.exp(a @ b) - torch.exp(c @ d) + start
        o = (weights(q[..., :4], k[..., :4]) + sign * balance * weights(q[..., 4:], k[..., 4:])) @ v
        return apply(layer.out, joined((1 - start) * o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.head_norm.weight))

    for mode in ("hgf", "ternary", "full"):
        for differential, depth, causal in ((False, 0, True), (True, 3, False), (True, 0, True)):
            layer = drawn(HGFAttention(16, 2, mode, differential=differential, depth=depth, causal=causal))
            out = layer(x)
            own.append(naive.gap(out, by_hand(layer, depth, causal)))
            if differential:
                other = min(other, naive.gap(out, by_hand(layer, depth, causal, 1.0)))
            if mode == "full":
                parameters = list(layer.parameters())
                pairs = (torch.autograd.grad(y.square().sum(), parameters) for y in (out, by_hand(layer, depth, causal)))
                own += [naive.gap(a, b) for a, b in zip(*pairs, strict=True)]
    return max(own), other


@check(
    "hgf",
    "memory of widths 64 to 4096, default rank: bytes by hand, and factors at 12-15% of ternary weights from 1024 on",
    below=0,
    control="a rank of an eighth of the width",
)
def _() -> tuple[float, float]:
    wrong, other = 0.0, 0.0
    for inputs, outputs in ((64, 64), (64, 256), (512, 512), (1024, 1024), (1024, 4096), (4096, 4096)):
        rank = rank_of(inputs, outputs)
        with torch.device("meta"):
            found = HGFLinear(inputs, outputs, gate="channel").memory()
        truth = {
            "ternary": inputs * outputs * math.log(3, 2) / 8,
            "factors": rank * (inputs + outputs) * 16 / 8,
            "gate": (inputs * outputs + outputs) * 16 / 8,
            "overhead": 16 * rank * (inputs + outputs) / (inputs * outputs * math.log(3, 2)),
        }
        wrong += sum(not math.isclose(found[name], truth[name], rel_tol=1e-12) for name in truth)
        if inputs >= 1024:
            wrong += not 0.12 <= found["overhead"] <= 0.15
            other += not 0.12 <= 16 * (inputs // 8) * (inputs + outputs) / (inputs * outputs * math.log2(3)) <= 0.15
    return wrong + abs(recovered(1.0294, 0.9306, 0.8490) - 0.548) // 0.001, other


def fitted(seed: int) -> tuple[float, float, float, float]:
    """Test errors of full, ternary and HGF students of a tanh net, and of the last without its corrections."""

    def make(kind: str) -> nn.Module:
        def linear(inputs: int, outputs: int) -> nn.Module:
            if kind == "full":
                return nn.Linear(inputs, outputs, bias=False)
            return HGFLinear(inputs, outputs, 16) if kind == "hgf" else BitLinear(inputs, outputs)

        return nn.Sequential(linear(32, 64), nn.Tanh(), linear(64, 32))

    def error(model: nn.Module) -> float:
        with torch.no_grad():
            return float((model(test) - teacher(test)).square().mean())

    torch.manual_seed(seed)
    teacher, found = make("full"), []
    for p in teacher.parameters():
        p.data.normal_(std=p.shape[1] ** -0.5)
    test = torch.randn(1000, 32)
    for kind in ("full", "ternary", "hgf"):
        torch.manual_seed(seed)
        model = make(kind)
        optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400)
        for _ in range(400):
            x = torch.randn(64, 32)
            optimizer.zero_grad()
            (model(x) - teacher(x).detach()).square().mean().backward()
            optimizer.step()
            schedule.step()
        found.append(error(model))
    for layer in (model[0], model[2]):  # type: ignore[index]
        layer.up.weight.data.zero_()
    return found[0], found[1], found[2], error(model)


@check(
    "hgf",
    "students of a tanh net, three seeds together: share of the ternary gap that HGF closes",
    above=0.05,
    control="the same students without their corrections",
)
def _() -> tuple[float, float]:
    # Ternary training is chaotic: rounding alone moves one seed's share by a tenth, and three seeds' together by a few hundredths.
    full, ternary, hgf, bare = (sum(errors) / 3 for errors in zip(*(fitted(seed) for seed in range(3)), strict=True))
    return recovered(ternary, hgf, full), recovered(ternary, bare, full)
