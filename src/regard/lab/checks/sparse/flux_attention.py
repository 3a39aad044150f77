"""Checks of flux-attention."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn

from regard.lab import naive
from regard.lab.checks.shared.comparing import F64
from regard.lab.checks.shared.layer_plans import small
from regard.lab.verification import check
from regard.nn.decoder import Decoder
from regard.zoo.sparse.flux_attention import (
    FluxAttention,
    LayerRouter,
    SparsityController,
    flux_layers,
    flux_model,
    sparsity,
    temperature,
    train_router,
)


def fluxed(**options: int) -> tuple[Decoder, Decoder]:
    dense = small()
    routed = small()
    routed.load_state_dict(dense.state_dict())
    return dense, flux_model(routed, **options).double().eval()


def windowed(layer: FluxAttention, x: Tensor) -> Tensor:
    """The layer's sparse path from a mask written out."""
    q, k, v, _ = layer.inner.heads_of(x, x, 0, None)
    i, j = torch.arange(x.shape[1])[:, None], torch.arange(x.shape[1])
    seen = (j <= i) & ((i - j < layer.window) | (j < layer.sinks))
    k, v = (y.repeat_interleave(2, 1) for y in (k, v))
    return layer.inner.close((q @ k.transpose(-1, -2) / math.sqrt(8)).masked_fill(~seen, -math.inf).softmax(-1) @ v, x)


@check(
    "flux-attention",
    "all full: the dense model; all sparse, and a mix: models composed by hand from a written-out mask",
    below=1e-10,
    control="the gate scaling the dense output instead",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    dense, model = fluxed(sinks=2, window=6)
    tokens, gaps = torch.randint(40, (2, 40)), []
    for z in ((1, 1, 1, 1), (0, 0, 0, 0), (1, 0, 0, 1)):
        for layer, one in zip(flux_layers(model), z, strict=True):
            layer.decide = torch.tensor(one)
        x = dense.embed(tokens)
        y = x.clone()
        for block, routed, one in zip(dense.blocks, flux_layers(model), z, strict=True):
            n = block.norm1(x)  # type: ignore[operator]
            x = x + (block.mixer(n) if one else windowed(routed, n))  # type: ignore[operator]
            x = x + block.mlp(block.norm2(x))  # type: ignore[operator]
            y = y + one * block.mixer(block.norm1(y))  # type: ignore[operator]
            y = y + block.mlp(block.norm2(y))  # type: ignore[operator]
        gaps.append((naive.gap(model(tokens), dense.logits(x)), naive.gap(dense.logits(y), dense.logits(x))))
        if all(z):
            gaps[-1] = (max(gaps[-1][0], naive.gap(model(tokens), dense(tokens))), gaps[-1][1])
    return max(own for own, _ in gaps), min(other for _, other in gaps[1:])


@check(
    "flux-attention",
    "decoding after the prompt's decision equals the full forward pass, sparse layers holding sinks + window keys",
    below=1e-9,
    control="a path that keeps everything, in keys too many",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    _, model = fluxed(sinks=2, window=6)
    for layer, one in zip(flux_layers(model), ((1, 0), (0, 0), (0, 1), (1, 1)), strict=True):
        layer.decide = torch.tensor(one)
    tokens = torch.randint(40, (2, 40))
    whole, (first, states) = model(tokens), model.step(tokens[:, :20])
    outs = [first]
    for t in range(20, 40):
        out, states = model.step(tokens[:, t : t + 1], states)
        outs.append(out)
    held = [state.entries() for state in states]  # type: ignore[attr-defined]
    wrong = sum(one.get(False, 8) != 8 for one in held) + sum(one.get(True, 40) != 40 for one in held)
    return naive.gap(torch.cat(outs, 1), whole) + wrong, float(max(one.get(True, 0) for one in held) - 8)


@check(
    "flux-attention",
    "300 router steps, targets 0.25 and 1.0 for prompts with and without a marker: the worse of off-target and 0.75 - difference",
    below=0.25,
    control="routers that see no prompt",
)
def _() -> tuple[float, float]:
    off = []
    for blind in (False, True):
        torch.manual_seed(1)
        model = flux_model(small().float(), sinks=2, window=6, ends=16)
        for layer in flux_layers(model):
            if blind:
                layer.router.features[0].weight.data.zero_()  # type: ignore[operator, union-attr]
                layer.router.features[0].weight.requires_grad_(False)  # type: ignore[operator, union-attr]
            cast(Tensor, layer.router.mlp[-1].bias).data.zero_()  # targets this far from the start are reached sooner from even odds
        with_marker = torch.randint(20, 40, (64, 25))
        without = torch.randint(0, 20, (64, 25))
        batches = [(torch.cat((with_marker[n : n + 8], without[n : n + 8])), ["marker"] * 8 + ["plain"] * 8) for n in range(0, 64, 8)]
        controller = SparsityController({"marker": 0.25, "plain": 1.0})
        train_router(model, batches, controller, 300, lr=3e-3, controller_lr=1e-2, lm_weight=0.0)
        with torch.no_grad():
            model(torch.cat((with_marker, without))[:, :-1])
        s = sparsity(model)
        a, b = float(s[:64].mean()), float(s[64:].mean())
        off.append(max(abs(a - 0.25), abs(b - 1.0), 0.75 - (b - a)))
    return off[0], off[1]


def by_hand(router: LayerRouter, shown: Tensor) -> Tensor:
    """Logits from the weights, for what is looked at (B, H, n, D)."""

    def maps(x: Tensor, layers: nn.Sequential) -> Tensor:
        for layer in layers:
            x = x @ layer.weight.T + layer.bias if isinstance(layer, nn.Linear) else x / (1 + torch.exp(-x))
        return x

    return maps(maps(shown.mean(2).mean(1), router.features), router.mlp)


@check(
    "flux-attention",
    "the router's logits by hand: queries before rotation, mean of the first and last P tokens and of heads; decisions at the start are full",
    below=1e-10,
    control="all tokens looked at",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    layer, x = FluxAttention(small().blocks[0].mixer, ends=5).double().eval(), torch.randn(3, 30, 32, dtype=F64)  # type: ignore[arg-type]
    full = float((layer.route(x) != 1).sum())  # the last map starts at zero, its bias in favour of class 1
    for p in layer.router.parameters():
        nn.init.normal_(p)
    q = torch.stack((x @ layer.inner.q.weight.T).chunk(4, -1), 1)
    found = layer.router(q)
    ends = torch.cat((q[:, :, :5], q[:, :, -5:]), 2)
    wrong = (layer.route(x) != (by_hand(layer.router, ends)[:, 1] > by_hand(layer.router, ends)[:, 0])).sum()
    short = naive.gap(layer.router(q[:, :, :4]), by_hand(layer.router, q[:, :, :4]))
    return naive.gap(found, by_hand(layer.router, ends)) + short + float(wrong) + full, naive.gap(found, by_hand(layer.router, q))


@check(
    "flux-attention",
    "training: z is 0 or 1 with the gradient of softmax((logits + Gumbel noise) / tau), outputs are joined by it",
    below=1e-10,
    control="no noise",
)
def _() -> tuple[float, float]:
    layer, x = FluxAttention(small().blocks[0].mixer, ends=5, sinks=2, window=6).double(), torch.randn(3, 30, 32, dtype=F64)  # type: ignore[arg-type]
    layer.tau = 0.7
    for p in layer.router.parameters():
        nn.init.normal_(p, std=0.3)
    torch.manual_seed(3)
    out = layer(x)
    z = layer.z
    assert z is not None
    torch.manual_seed(3)
    uniform = torch.rand(3, 2, dtype=F64)
    q = torch.stack((x @ layer.inner.q.weight.T).chunk(4, -1), 1)
    logits = by_hand(layer.router, torch.cat((q[:, :, :5], q[:, :, -5:]), 2))
    soft = ((logits - torch.log(-torch.log(uniform))) / 0.7).softmax(-1)[:, 1]
    plain = (logits / 0.7).softmax(-1)[:, 1]
    weight = layer.router.features[0].weight
    grads = [torch.autograd.grad(y.sum(), weight, retain_graph=True)[0] for y in (z, soft, plain)]  # type: ignore[arg-type]
    with torch.no_grad():
        dense, sparse = layer.inner(x), windowed(layer, x)
        joined = naive.gap(out, torch.stack([(dense if one else sparse)[n] for n, one in enumerate(soft > 0.5)]))
    return max(naive.gap(z, (soft > 0.5).double()), naive.gap(grads[0], grads[1]), joined), naive.gap(grads[0], grads[2])


@check(
    "flux-attention",
    "the penalty lam1 |s - s*| + lam2 (s - s*)^2, warm targets, multipliers never below zero and moved upwards; tau falls as a cosine",
    below=1e-6,
    control="the linear term alone",
)
def _() -> tuple[float, float]:
    controller = SparsityController({"a": 0.25, "b": 1.0}).double()
    controller.multipliers.data = torch.tensor([[0.3, -0.2], [0.7, 0.4]], dtype=F64)
    s = torch.tensor([0.5, 0.75, 0.1], dtype=F64, requires_grad=True)
    tasks, goals = ["a", "b", "a"], [0.25 * 0.8, 1.0 * 0.8, 0.25 * 0.8]
    lam = {"a": (0.3, 0.7), "b": (0.0, 0.4)}
    off = [x - goal for x, goal in zip(s.tolist(), goals, strict=True)]
    found = controller(s, tasks, 0.8)
    truth = sum(lam[task][0] * abs(d) + lam[task][1] * d * d for task, d in zip(tasks, off, strict=True)) / 3
    slope = [(lam[task][0] * math.copysign(1, d) + 2 * lam[task][1] * d) / 3 for task, d in zip(tasks, off, strict=True)]
    up = -torch.tensor([[abs(off[0]) + abs(off[2]), 0.0], [off[0] ** 2 + off[2] ** 2, off[1] ** 2]], dtype=F64) / 3
    grads = torch.autograd.grad(found, (s, controller.multipliers))
    own = max(abs(float(found) - truth), naive.gap(grads[0], torch.tensor(slope, dtype=F64)), naive.gap(grads[1], up))
    taus = [temperature(n, 10) - (0.3 + 0.35 * (1 + math.cos(math.pi * n / 10))) for n in range(11)]
    own = max(own, max(map(abs, taus)), abs(temperature(20, 10) - 0.3))
    return own, abs(float(found) - sum(lam[task][0] * abs(d) for task, d in zip(tasks, off, strict=True)) / 3)
