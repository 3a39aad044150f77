"""Checks of plans over layers: HyLRA's reuse of indices, Flux's routed layers."""

from __future__ import annotations

import itertools
import math
from typing import cast

import torch
from torch import Tensor

from ...nn import Decoder
from ...nn.layer_router import FluxAttention, SparsityController, flux_layers, flux_model, sparsity, train_router
from ...nn.reused_indices import ReusedIndices, ReusePlan, plan, profile
from .. import naive
from ..verification import check

F64 = torch.float64


def cost_of(modes: tuple[bool, ...], error: Tensor, weight: float, forced: Tensor) -> float:
    """The cost of a vector of full layers (True), or inf where a forced layer is not full."""
    total, last = 0.0, 0
    for n, full in enumerate(modes):
        last = n if full else last
        total += weight if full else float(error[last, n]) + weight * 0.1
    return total if all(full or not f for full, f in zip(modes, forced.tolist(), strict=True)) else math.inf


@check(
    "hylra",
    "40 random instances of 8 layers: the plan's cost over brute force over 128 mode vectors",
    below=1e-12,
    control="every second layer full",
)
def _() -> tuple[float, float]:
    own = other = 0.0
    for _ in range(40):
        error, weight = torch.rand(8, 8, dtype=F64), float(torch.rand(())) * 0.5
        forced = torch.rand(8) < 0.15
        best = min(cost_of((True, *rest), error, weight, forced) for rest in itertools.product((True, False), repeat=7))
        found = plan(error, forced.double(), weight=weight, threshold=0.5)
        own = max(own, abs(found.cost - best), abs(cost_of(tuple(m is None for m in found.modes), error, weight, forced) - best))
        other = max(other, min(cost_of((True, False) * 4, error, weight, forced), 9.0) - best)
    return own, other


def small(layers: int = 4) -> Decoder:
    model = Decoder("softmax", vocab=40, dim=32, layers=layers, heads=4, kv_heads=2).double()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    return model


@check(
    "hylra",
    "count >= length, and a plan of full layers: logits of the dense model, in prompts and in decoding",
    below=1e-10,
    control="count 12 of 60 keys",
)
@torch.no_grad()
def _() -> tuple[float, float]:
    model, tokens = small(), torch.randint(40, (2, 60))
    dense = model(tokens)

    def gap(modes: tuple[int | None, ...], count: int) -> float:
        runner = ReusedIndices(model, ReusePlan(modes, 0.0), count, block=16)
        first, state = runner.step(tokens[:, :40])
        outs = [first]
        for t in range(40, 60):
            out, state = runner.step(tokens[:, t : t + 1], state)
            outs.append(out)
        return max(naive.gap(torch.cat(outs, 1), dense), naive.gap(runner(tokens), dense))

    return max(gap((None, 0, None, 2), 64), gap((None,) * 4, 4)), gap((None, 0, 0, 0), 12)


@check("hylra", "in decoding reuse layers read exactly `count` entries: layers that do not", below=0, control="a plan of full layers")
@torch.no_grad()
def _() -> tuple[float, float]:
    model, tokens, wrong = small(), torch.randint(40, (1, 61)), []
    for modes in ((None, 0, None, 2), (None,) * 4):
        runner = ReusedIndices(model, ReusePlan(modes, 0.0), 20)
        _, state = runner.step(tokens[:, :60])
        runner.step(tokens[:, 60:], state)
        wrong.append(sum(runner.reads[n] != 20 for n in (1, 3)) + sum(runner.reads[n] != 61 for n in (0, 2)))
    return float(wrong[0]), float(wrong[1])


@check(
    "hylra",
    "6 planted layers, 0-2 and 3-5 alike: full at 0 and 3 only, and less error than the fixed plan 0, 2, 4",
    below=0,
    control="a plan that knows no errors",
)
def _() -> tuple[float, float]:
    base = [torch.randn(1, 2, 128, 16, dtype=F64) * 2 for _ in range(2)]
    k = torch.randn(1, 2, 128, 16, dtype=F64)
    layers = [
        (base[n // 3] + (0.1 if n % 3 else 0.0) * torch.randn(1, 2, 128, 16, dtype=F64), k, torch.randn(1, 2, 128, 16, dtype=F64))
        for n in range(6)
    ]
    found = profile(layers, 12).error
    fixed = sum(float(found[n - 1, n]) for n in (1, 3, 5))
    wrong = []
    for error in (found, torch.full_like(found, 0.3)):
        chosen = plan(error, weight=0.6)
        mine = sum(float(found[mode, n]) for n, mode in enumerate(chosen.modes) if mode is not None)
        wrong.append(float(chosen.full_layers != [0, 3]) + max(0.0, mine - fixed))
    return wrong[0], wrong[1]


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
            gaps[-1] = (max(gaps[-1][0], naive.gap(model(tokens), dense(tokens))), math.inf)
    return max(own for own, _ in gaps), min(other for _, other in gaps)


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
