"""Checks of flux-attention."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor

from regard.lab import naive
from regard.lab.checks.shared.layer_plans import small
from regard.lab.verification import check
from regard.nn.decoder import Decoder
from regard.zoo.sparse.flux_attention import FluxAttention, SparsityController, flux_layers, flux_model, sparsity, train_router


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
